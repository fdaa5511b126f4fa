//! Faults as they come, for threads that wait for them until told to stop, or for a while.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use cutover_devices::THREAD_STACK_SIZE;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::Unavailable;
use super::space::{self, Space};
use super::uffd::{Mode, Uffd};
use crate::dirty::PageRange;

/// What ends waiting. Written to once, and never read, so that everybody who waits gets to know.
pub struct Stop(OwnedFd);

impl Stop {
    /// One that has not been told.
    ///
    /// # Errors
    /// There is no eventfd to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC)?))
    }

    /// Ends waiting.
    pub fn tell(&self) {
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).expect("an eventfd takes 2^64 - 2 of these");
    }

    /// Waits until waiting is to end, or for so long.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wait_at_most(&self, time: Duration) -> io::Result<()> {
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&time)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until `source` has something to read, or is at its end; false once waiting is to end.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wait_for(&self, source: impl AsFd) -> io::Result<bool> {
        let mut sources = [PollFd::new(&source, PollFlags::IN), PollFd::new(&self.0, PollFlags::IN)];
        loop {
            match poll(&mut sources, None) {
                Ok(_) => return Ok(sources[1].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The faults of a VM's memory. Several threads may wait for them; each fault comes to one of them.
pub struct Faults {
    /// The memory.
    pub space: Space,
    /// What it is registered with.
    pub uffd: Uffd,
    stop: Stop,
}

impl Faults {
    /// Those of `space`, from now on.
    ///
    /// # Errors
    /// The kernel lacks this or does not permit it, or somebody else takes care of this memory's faults.
    pub fn of(space: Space, mode: Mode) -> Result<Self, Unavailable> {
        Ok(Self {
            uffd: space.register(mode)?,
            space,
            stop: Stop::new().map_err(Unavailable::Refused)?,
        })
    }

    /// The page of the next fault; none once there is to be an end.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn next(&self) -> io::Result<Option<PageRange>> {
        while self.stop.wait_for(&self.uffd)? {
            // Another thread may have been faster, and nothing else than this memory is registered.
            if let Some(address) = self.uffd.next_fault()?
                && let Some(page) = self.space.page_at(address)
            {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    /// The pages of the faults that there are, at most `most`, after waiting for one until `patience` is over.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn next_within(&self, patience: Duration, most: usize) -> io::Result<Vec<PageRange>> {
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.uffd, PollFlags::IN)], Some(&patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut pages = Vec::new();
        while pages.len() < most
            && let Some(address) = self.uffd.next_fault()?
        {
            pages.extend(self.space.page_at(address));
        }
        Ok(pages)
    }

    /// Lets so much time go by, unless there is an end before that.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn rest(&self, time: Duration) -> io::Result<()> {
        self.stop.wait_at_most(time)
    }

    /// Ends [`next`](Self::next) for all who wait.
    pub fn stop(&self) {
        self.stop.tell();
    }

    /// Faults are the kernel's again, and everybody goes on.
    pub fn hand_back(&self) {
        space::huge_pages(true);
        for area in self.space.areas() {
            if let Err(error) = self.uffd.unregister(area) {
                tracing::error!(%error, "cannot hand page faults back to the kernel");
            }
        }
    }
}

/// Starts a thread.
///
/// # Errors
/// There is none to be had.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Unavailable> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder
        .stack_size(THREAD_STACK_SIZE)
        .spawn(run)
        .map_err(Unavailable::Thread)
}
