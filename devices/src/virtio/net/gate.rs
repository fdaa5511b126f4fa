//! The one place through which every frame of the guest leaves, and what is said in its name.
//!
//! A [`Gate`] owns the only descriptor of the tap device that is ever written to. Today it is always open. Output commit
//! (DESIGN invariants 7 and 8: no frame leaves before the checkpoint it belongs to is permanent, none at all during a
//! coordinated cut) belongs here: a closed gate takes copies of frames and releases them in order, and nothing else in
//! the device needs to know.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::virtio::buffers::GuestBuffers;

/// Lets frames out.
pub struct Gate {
    tap: OwnedFd,
}

impl Gate {
    /// A gate to `tap`, which does not block.
    pub fn new(tap: OwnedFd) -> Self {
        Self { tap }
    }

    /// Takes `frame`, with its header, on its way out. On return the buffers are free.
    ///
    /// # Errors
    /// `WouldBlock`: there is no room now, the frame is still the caller's. Anything else: the host does not want this
    /// frame.
    pub fn pass(&mut self, frame: &GuestBuffers) -> io::Result<()> {
        // A tap takes a frame whole or not at all.
        frame.write_to(self.tap.as_fd()).map(drop)
    }

    /// The same for `frame`, with its header, that the monitor sends in the guest's name.
    ///
    /// # Errors
    /// As [`pass`](Self::pass).
    pub fn pass_own(&mut self, frame: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.tap, frame)?;
        Ok(())
    }
}
