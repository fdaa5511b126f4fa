//! How a disk's operations reach the host without holding up the event loop: io_uring, or a pool of threads.
//!
//! Either way an operation is prepared under a token, prepared operations are submitted together, and the engine's
//! file descriptor becomes readable when tokens can be reaped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use cutover_snapshot::spec::{DiskIo, DiskSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;

use self::threads::Threads;
use self::uring::Uring;
use super::DeviceError;
use crate::OnThread;

mod threads;
mod uring;

/// How often a wait for the host's disk is reported.
const WAIT_REPORT: Duration = Duration::from_secs(5);

/// One operation on the image. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read into the I/O vector.
    Read {
        /// Where from.
        offset: u64,
    },
    /// Write from the I/O vector.
    Write {
        /// Where to.
        offset: u64,
        /// Complete only when the data is on stable storage.
        durable: bool,
    },
    /// Bring all completed writes to stable storage.
    Sync,
    /// `fallocate(2)`.
    Allocate {
        /// What to do with the range.
        mode: FallocateFlags,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
}

/// An operation that is done.
pub struct Completion {
    /// Which.
    pub token: u16,
    /// Bytes read or written, or why not.
    pub result: io::Result<usize>,
}

/// See the module.
pub enum Engine {
    /// The host's kernel does the work.
    Uring(Box<Uring>),
    /// Threads of this process do.
    Threads(Threads),
}

impl Engine {
    /// An engine of the kind `spec` wants, that holds up to `depth` operations. Threads it starts call `on_thread`
    /// first.
    pub fn new(spec: &DiskSpec, depth: u16, on_thread: &OnThread) -> Result<Self, DeviceError> {
        let uring = match spec.io {
            DiskIo::Threads => None,
            DiskIo::Auto => Uring::new(depth)
                .inspect_err(|error| tracing::info!(%error, "no io_uring here; disk uses threads"))
                .ok(),
            DiskIo::IoUring => Some(Uring::new(depth).map_err(|source| DeviceError::IoUring {
                path: spec.path.clone(),
                source,
            })?),
        };
        match uring {
            Some(uring) => Ok(Self::Uring(Box::new(uring))),
            None => Threads::new(on_thread)
                .map(Self::Threads)
                .map_err(DeviceError::system("start the disk's I/O threads")),
        }
    }

    /// Prepares `operation` on `image`, with the memory of `iovecs` where it needs any.
    ///
    /// # Safety
    /// The image stays open, and the vector and the memory it points to stay valid and in place, until the token is
    /// reaped.
    pub unsafe fn prepare(
        &mut self,
        token: u16,
        operation: Operation,
        image: BorrowedFd<'_>,
        iovecs: &[libc::iovec],
    ) -> io::Result<()> {
        match self {
            // SAFETY: the same contract.
            Self::Uring(uring) => unsafe { uring.prepare(token, operation, image, iovecs) },
            // SAFETY: the same contract.
            Self::Threads(threads) => unsafe { threads.prepare(token, operation, image, iovecs) },
        }
    }

    /// Lets the host begin with everything prepared.
    pub fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Uring(uring) => uring.submit(),
            Self::Threads(threads) => {
                threads.submit();
                Ok(())
            }
        }
    }

    /// Appends everything done since the last call to `completions`.
    pub fn reap(&mut self, completions: &mut Vec<Completion>) {
        match self {
            Self::Uring(uring) => uring.reap(completions),
            Self::Threads(threads) => threads.reap(completions),
        }
    }

    /// Waits until something can be reaped, for as long as the host takes; says so when it takes long.
    pub fn wait(&mut self, device: &str, in_flight: usize) {
        let unsubmitted = self.submit();
        let timeout = Timespec::try_from(WAIT_REPORT).ok();
        let mut ready = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::IN)];
        match poll(&mut ready, timeout.as_ref()) {
            Ok(0) => tracing::warn!(device, in_flight, ?unsubmitted, "waiting for the host's disk"),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => tracing::error!(device, %error, "cannot wait for the host's disk"),
        }
    }
}

impl AsFd for Engine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Uring(uring) => uring.as_fd(),
            Self::Threads(threads) => threads.as_fd(),
        }
    }
}

impl AsRawFd for Engine {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
