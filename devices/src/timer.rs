//! Timers on the event loop.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::errno;
use vmm_sys_util::timerfd::TimerFd;

use crate::virtio::DeviceError;

/// Rings once each time it is set. It is reported edge-triggered: it need not be read, setting it takes back that it rang,
/// and if it rang while nobody watched, that is reported at once.
pub(crate) struct Timer {
    fd: TimerFd,
    /// Whose it is, for people.
    of: &'static str,
}

impl Timer {
    /// The timer of `of`, which is not set.
    ///
    /// # Errors
    /// There is none to be had.
    pub fn new(of: &'static str) -> Result<Self, DeviceError> {
        let fd = TimerFd::new().map_err(DeviceError::system("create a timer"))?;
        Ok(Self { fd, of })
    }

    /// Has it ring after `wait`, which is not zero, and not before.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn set(&mut self, wait: Duration) -> Result<(), errno::Error> {
        self.fd.reset(wait, None)
    }

    /// Has it not ring.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn clear(&mut self) -> Result<(), errno::Error> {
        self.fd.clear()
    }

    /// Has the event loop report it with `data`.
    ///
    /// # Errors
    /// The event loop refused.
    pub fn watch(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(
            &self.fd,
            data,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        ))
    }

    /// Has the event loop report it no more.
    pub fn ignore(&self, ops: &mut EventOps) {
        if let Err(error) = ops.remove(Events::empty(&self.fd)) {
            tracing::error!(%error, "cannot take the timer of {} off the event loop", self.of);
        }
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
