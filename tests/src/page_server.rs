//! [`PageServer`]: a process's part in Firecracker's page-fault protocol: it fills a guest's memory as the guest touches
//! it (its docs/snapshotting/handling-page-faults-on-snapshot-resume.md).

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

/// Bytes that are put for one fault.
const PIECE: u64 = 64 << 10;

/// `UFFDIO_COPY` and its argument (Linux include/uapi/linux/userfaultfd.h).
const COPY: Opcode = opcode::read_write::<Copy>(0xaa, 0x03);

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// Bytes of `struct uffd_msg`, where the kind of event is in it, and where the address.
const MESSAGE: usize = 32;
const MESSAGE_EVENT: usize = 0;
const MESSAGE_ADDRESS: usize = 16;
const EVENT_PAGEFAULT: u8 = 0x12;

/// Where a region of guest memory is in the monitor, and in the file.
#[derive(Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
}

/// Fills the memory of one guest from a file.
pub struct PageServer {
    thread: JoinHandle<io::Result<u32>>,
}

impl PageServer {
    /// Listens at `socket`, and fills from `memory` whoever comes; goes away after `faults` faults if that is given.
    #[track_caller]
    pub fn start(socket: &Path, memory: &Path, faults: Option<u32>) -> Self {
        let listener = UnixListener::bind(socket).expect("a new socket");
        let memory = File::open(memory).expect("the file of memory");
        Self {
            thread: std::thread::spawn(move || serve(&listener, &memory, faults)),
        }
    }

    /// Waits until it has gone away, and tells how many faults it has served.
    #[track_caller]
    pub fn wait(self) -> u32 {
        let served = self.thread.join().expect("the server does not panic");
        served.expect("the server serves")
    }
}

/// Serves until the guest's monitor has gone, or there were enough faults.
fn serve(listener: &UnixListener, memory: &File, faults: Option<u32>) -> io::Result<u32> {
    let (stream, _) = listener.accept()?;
    let (mappings, uffd) = meet(&stream)?;
    let uffd = File::from(uffd);
    let mut served = 0;
    while faults != Some(served) {
        let mut ready = [
            PollFd::new(&uffd, PollFlags::IN),
            PollFd::new(&stream, PollFlags::IN | PollFlags::HUP),
        ];
        poll(&mut ready, None)?;
        if !ready[1].revents().is_empty() {
            break;
        }
        let mut message = [0; MESSAGE];
        match (&uffd).read(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            read => read?,
        };
        if message[MESSAGE_EVENT] != EVENT_PAGEFAULT {
            continue;
        }
        let address = message[MESSAGE_ADDRESS..].first_chunk().expect("it has an address");
        put(&mappings, &uffd, memory, u64::from_ne_bytes(*address))?;
        served += 1;
    }
    Ok(served)
}

/// What the monitor says first: where memory is, and its userfault descriptor.
fn meet(stream: &UnixStream) -> io::Result<(Vec<Mapping>, OwnedFd)> {
    let mut text = vec![0; 4096];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let mut into = [IoSliceMut::new(&mut text)];
    let received = recvmsg(stream, &mut into, &mut ancillary, RecvFlags::empty())?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let descriptor = descriptor.ok_or_else(|| io::Error::other("no descriptor came"))?;
    Ok((serde_json::from_slice(&text[..received.bytes])?, descriptor))
}

/// Puts the page at `address`, and those around it.
fn put(mappings: &[Mapping], uffd: &File, memory: &File, address: u64) -> io::Result<()> {
    let mapping = mappings
        .iter()
        .find(|mapping| (mapping.base_host_virt_addr..mapping.base_host_virt_addr + mapping.size).contains(&address))
        .ok_or_else(|| io::Error::other("a fault outside of guest memory"))?;
    let start = address / PIECE * PIECE;
    let mut piece = vec![0; usize::try_from(PIECE).expect("small")];
    memory.read_exact_at(&mut piece, start - mapping.base_host_virt_addr + mapping.offset)?;
    let mut copy = Copy {
        dst: start,
        src: piece.as_ptr() as u64,
        len: PIECE,
        mode: 0,
        copied: 0,
    };
    // SAFETY: `COPY` takes a pointer to this structure; the kernel reads the piece, which lives until after the call, and
    // writes into the monitor's memory, not into this process's.
    match unsafe { ioctl(uffd.as_fd(), Updater::<COPY, _>::new(&mut copy)) } {
        // It is there already: two vCPUs wanted it.
        Err(rustix::io::Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}
