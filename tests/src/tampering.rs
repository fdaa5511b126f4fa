//! A link between two monitors that changes what one asks of the other: nothing protects what goes over `tcp://`.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use twox_hash::XxHash3_64;

/// Bytes of each of the two checksums that end a message's header, that of the message first, and of all of the header.
const SUM: usize = 8;
const HEADER: usize = 24;
/// Where the length of a message is.
const LENGTH: std::ops::Range<usize> = 4..8;

/// A way to the monitor at `address`, for one migration, on which `instead` takes the place of as many bytes that come
/// after the first `find` of what the VM is said to need; the destination cannot know.
#[track_caller]
pub fn tamper_with_reservation(address: SocketAddr, find: &'static str, instead: &'static str) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback interface has a free port");
    let own = listener.local_addr().expect("a bound socket has an address");
    thread::spawn(move || {
        let (source, _) = listener.accept()?;
        let mut destination = TcpStream::connect(address)?;
        // Hello and Welcome.
        destination.write_all(&message(&source)?)?;
        (&source).write_all(&message(&destination)?)?;
        let mut reservation = message(&source)?;
        let at = reservation
            .windows(find.len())
            .position(|text| text == find.as_bytes())
            .ok_or_else(|| io::Error::other(format!("no reservation has {find}")))?;
        let changed = reservation[at + find.len()..].get_mut(..instead.len());
        changed
            .ok_or_else(|| io::Error::other("it ends there"))?
            .copy_from_slice(instead.as_bytes());
        seal(&mut reservation);
        destination.write_all(&reservation)?;
        // Whatever the answer is, and the source's to that.
        let (mut back, mut to_source) = (destination.try_clone()?, source.try_clone()?);
        thread::spawn(move || io::copy(&mut back, &mut to_source));
        io::copy(&mut &source, &mut destination)
    });
    own
}

/// The next message that comes from `peer`.
fn message(mut peer: &TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; HEADER];
    peer.read_exact(&mut message)?;
    let length = message[LENGTH]
        .try_into()
        .map(u32::from_le_bytes)
        .map_err(io::Error::other)?;
    peer.take(length.into()).read_to_end(&mut message)?;
    Ok(message)
}

/// Has the checksums be those of what the message says.
fn seal(message: &mut [u8]) {
    let body = XxHash3_64::oneshot(&message[HEADER..]);
    message[HEADER - 2 * SUM..HEADER - SUM].copy_from_slice(&body.to_le_bytes());
    let header = XxHash3_64::oneshot(&message[..HEADER - SUM]);
    message[HEADER - SUM..HEADER].copy_from_slice(&header.to_le_bytes());
}
