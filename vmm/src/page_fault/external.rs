//! Filling memory by another process: Firecracker's page-fault handlers (its docs/snapshotting/
//! handling-page-faults-on-snapshot-resume.md).
//!
//! ```text
//!  monitor ── connects to a Unix socket ──► handler
//!          ── one message: the userfault descriptor (SCM_RIGHTS), where memory is (JSON) ──►
//!          ◄── UFFDIO_COPY of page after page; nothing more goes through the socket
//! ```
//! A handler that goes away leaves accesses waiting for ever, so the connection is watched.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use cutover_devices::{GuestMemory, OnThread};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;

use super::end::{EndOnPanic, end_process};
use super::faults::{Stop, spawn};
use super::space::{Backing, Space};
use super::uffd::{Mode, Uffd};
use super::untouched::PageMap;
use crate::Error;
use crate::dirty::PAGE_SIZE;
use crate::reclaim::Kept;

/// Bytes of the pages of [`Backing::HugePages`].
const HUGE_PAGE: u64 = 2 << 20;

/// Where a region of memory is, as handlers are told.
#[derive(Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    /// Where its content is in the file of memory.
    offset: u64,
    page_size: u64,
    /// The same, whatever the name says.
    page_size_kib: u64,
}

/// Memory that another process fills. To be dropped only when nobody uses the memory any more.
pub struct ExternalMemory {
    stop: Arc<Stop>,
    /// Until it is joined.
    thread: Option<JoinHandle<()>>,
    /// Has nothing be discarded: the handler is not told of that, and brings what was there before.
    kept: OnceLock<Kept>,
}

impl ExternalMemory {
    /// Hands `memory`, which nobody has touched, to the handler that listens at `socket`. The thread that watches it calls
    /// `on_thread` first.
    ///
    /// # Errors
    /// Nobody listens there, or the kernel does not hand over faults of this memory.
    pub fn start(memory: &GuestMemory, socket: &Path, on_thread: OnThread) -> Result<Self, Error> {
        let space = Space::of(memory)?;
        let uffd = space.register(Mode::Missing)?;
        let connection = introduce(&space, &uffd, socket).map_err(|source| Error::PageFaultHandler {
            path: socket.to_owned(),
            source,
        })?;
        let stop = Arc::new(Stop::new().map_err(Error::os("create an eventfd"))?);
        let page_map = PageMap::open()?;
        let (told, path) = (stop.clone(), socket.to_owned());
        let thread = spawn("page-fault", move || {
            let _guard = EndOnPanic;
            on_thread();
            // With the last descriptor the kernel would go on with zeros in place of what is missing.
            let _kept = uffd;
            let is_complete = || matches!(page_map.untouched(&space.memory), Ok(missing) if missing.is_empty());
            if goes_away(connection, &told) && !is_complete() {
                end_process(&format!(
                    "the page-fault handler at {} has gone away and left memory of the VM missing",
                    path.display()
                ));
            }
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
            kept: OnceLock::new(),
        })
    }

    /// Has memory be `kept` as long as this lives.
    pub fn keep(&self, kept: Kept) {
        // Who has it kept already has it kept.
        let _ = self.kept.set(kept);
    }
}

impl Drop for ExternalMemory {
    fn drop(&mut self) {
        self.stop.tell();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watched the page-fault handler panicked");
        }
    }
}

/// Tells the handler at `socket` where memory is, and gives it `uffd`.
fn introduce(space: &Space, uffd: &Uffd, socket: &Path) -> io::Result<UnixStream> {
    let page_size = match space.backing {
        Backing::Anonymous | Backing::Shared => PAGE_SIZE,
        Backing::HugePages => HUGE_PAGE,
    };
    let mappings: Vec<Mapping> = (space.areas().zip(space.layout.slots()))
        .map(|(area, slot)| Mapping {
            base_host_virt_addr: area.start,
            size: area.bytes,
            offset: slot.first_number * PAGE_SIZE,
            page_size,
            page_size_kib: page_size,
        })
        .collect();
    let message = serde_json::to_vec(&mappings)?;
    let connection = UnixStream::connect(socket)?;
    let descriptors = [uffd.as_fd()];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    assert!(
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)),
        "there is room for one"
    );
    let sent = sendmsg(
        &connection,
        &[IoSlice::new(&message)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    // The first message on a socket is far smaller than its buffer.
    if sent < message.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(connection)
}

/// Waits until the handler behind `connection` goes away; false if waiting is to end before.
fn goes_away(mut connection: UnixStream, stop: &Stop) -> bool {
    let mut ignored = [0; 64];
    loop {
        match stop.wait_for(&connection) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(_) => return true,
        }
        match connection.read(&mut ignored) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
}
