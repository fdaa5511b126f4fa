//! Descriptors handed over between two processes of one host (unix(7), `SCM_RIGHTS`): all of them with one byte.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use crate::message::HANDED_MAX;

/// What they travel with: a message without a byte is none.
const CARRIER: [u8; 1] = *b"D";
/// Room for as many as there can be.
const SPACE: usize = rustix::cmsg_space!(ScmRights(HANDED_MAX));

/// Sends `descriptors`.
///
/// # Errors
/// There are more than [`HANDED_MAX`], or as of sendmsg(2).
pub fn send(stream: &UnixStream, descriptors: &[OwnedFd]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other(format!("more than {HANDED_MAX} descriptors")));
    }
    sendmsg(stream, &[IoSlice::new(&CARRIER)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes `count` descriptors.
///
/// # Errors
/// What comes is something else, or as of recvmsg(2).
pub fn receive(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut carrier = [0];
    let message = recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut carrier)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if message.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if carrier != CARRIER || descriptors.len() != count {
        let reason = format!("{} descriptors came where {count} were announced", descriptors.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(descriptors)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn descriptors_arrive_in_order_and_refer_to_the_same_files() {
        let (near, far) = UnixStream::pair().unwrap();
        let files = [b'a', b'b'].map(|content| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&[content]).unwrap();
            File::open(file.path()).unwrap().into()
        });
        send(&near, &files).unwrap();
        let contents = receive(&far, 2).unwrap().into_iter().map(|descriptor| {
            let mut content = String::new();
            File::from(descriptor).read_to_string(&mut content).unwrap();
            content
        });
        assert_eq!(contents.collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn fewer_descriptors_than_announced_and_none_at_all_are_errors() {
        let (mut near, far) = UnixStream::pair().unwrap();
        send(&near, &[File::open("/dev/null").unwrap().into()]).unwrap();
        let error = receive(&far, 2).expect_err("one was sent");
        assert!(error.to_string().contains("1 descriptors came"), "{error}");
        near.write_all(&CARRIER).unwrap();
        receive(&far, 1).expect_err("none was sent");
        drop(near);
        let error = receive(&far, 1).expect_err("the peer is gone");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
