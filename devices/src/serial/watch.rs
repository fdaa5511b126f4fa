//! A descriptor that the event loop watches at times.

use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};
use rustix::io::Errno;

/// One kind of event, watched for on one descriptor at a time or on none.
pub struct Watch {
    interest: EventSet,
    at: Option<RawFd>,
}

impl Watch {
    /// Watches nothing yet.
    pub fn for_events(interest: EventSet) -> Self {
        Self { interest, at: None }
    }

    /// Whether nothing is watched.
    pub fn is_off(&self) -> bool {
        self.at.is_none()
    }

    /// Whether `fd` is watched.
    pub fn is_at(&self, fd: RawFd) -> bool {
        self.at == Some(fd)
    }

    /// Starts afresh on a loop that watches nothing yet.
    pub fn forget(&mut self) {
        self.at = None;
    }

    /// Watches `fd` from now on, or nothing; false if `fd` cannot be watched because it is always ready.
    ///
    /// A descriptor must not be closed while it is watched.
    pub fn point_at(&mut self, fd: Option<RawFd>, ops: &mut EventOps) -> bool {
        match self.try_point_at(fd, ops) {
            Ok(()) => true,
            Err(event_manager::Error::Epoll(error)) if error.errno() == Errno::PERM.raw_os_error() => false,
            Err(error) => {
                tracing::error!(%error, "the event loop cannot watch the serial port's console");
                true
            }
        }
    }

    fn try_point_at(&mut self, fd: Option<RawFd>, ops: &mut EventOps) -> event_manager::Result<()> {
        if self.at == fd {
            return Ok(());
        }
        if let Some(before) = self.at.take() {
            ops.remove(Events::empty_raw(before))?;
        }
        if let Some(fd) = fd {
            ops.add(Events::new_raw(fd, self.interest))?;
            self.at = Some(fd);
        }
        Ok(())
    }
}
