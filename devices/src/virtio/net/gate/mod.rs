//! The one place through which every frame of the guest leaves, and what is said in its name.
//!
//! A [`Gate`] owns the only descriptor of the tap device that is ever written to. While the VM is protected, it keeps
//! copies of what must not be seen yet (DESIGN invariants 7 and 8): a frame that leaves the group waits until the
//! checkpoint that ends its epoch is permanent, and during a coordinated cut no frame leaves at all.
//!
//! ```text
//!            hold                block                          to members of the group   to all others
//!   Open ───────────► Held ◄──────────────► Blocked    Open     at once                   at once
//!    ▲                 │  unblock              │       Held     at once                   once their epoch is released
//!    └─────────────────┴───────────────────────┘       Blocked  later                     later
//!                     open
//! ```
//! What may leave does so in the order in which it was sent, and those that wait for nothing but room on the tap let
//! nothing pass them. Nothing is dropped but by [`discard`](Gate::discard), when the guest goes back to before it was
//! sent: at [`HELD_BYTES_MAX`] the transmit queue waits instead, and at half of that an early checkpoint is asked for.
//!
//! Frames leave on the event loop, several in a turn. Whoever changes the state does so under the device's lock, and the
//! gate's event has the loop go on; so what waits when the device is stopped leaves when it is started again.
//!
//! What is held is no part of the device's saved state. It belongs to epochs that began before that state was, and will
//! leave, or not, with these; a VM that goes on from the state elsewhere is to its neighbours one whose last frames were
//! lost on the way, as any network may lose them.

mod fifo;
mod group;
mod held;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, Events};
use rustix::io::Errno;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::held::HeldFrames;
use self::state::State;
use super::{DeviceError, FRAMES_PER_TURN};
use crate::CheckpointSoon;
use crate::stats::NetCounters;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::log_limit::LogLimit;

pub use self::group::MacTable;
pub use self::held::Held;
pub use self::state::Step;

/// Most bytes that are held of one interface, what keeping them takes included: half a second of a gigabit.
pub const HELD_BYTES_MAX: usize = 64 << 20;

/// Lets frames out.
pub struct Gate {
    tap: OwnedFd,
    /// Of the tap, for messages.
    name: String,
    state: State,
    held: HeldFrames,
    /// Whether the tap had no room for the last frame that may leave.
    needs_room: bool,
    /// Tells the event loop that frames may leave, or that there is space to hold others.
    work: EventFd,
    limit: usize,
    /// Told when half of the limit is used up.
    soon: Option<CheckpointSoon>,
    /// Whether it was used up when that was last looked at.
    asked: bool,
    counters: Arc<NetCounters>,
    refusals_logged: LogLimit,
}

/// What became of a frame on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// It has left, or will. Its buffers are free.
    Taken,
    /// The host does not want it. Its buffers are free.
    Refused,
    /// It is still the caller's, who is to try again when the tap has room or the gate's event comes.
    Waits,
}

impl Gate {
    /// An open gate to `tap`, which does not block and is called `name`.
    ///
    /// # Errors
    /// No event can be had.
    pub fn new(tap: OwnedFd, name: &str, counters: Arc<NetCounters>) -> Result<Self, DeviceError> {
        Ok(Self {
            tap,
            name: name.to_owned(),
            state: State::Open,
            held: HeldFrames::default(),
            needs_room: false,
            work: EventFd::new(EFD_NONBLOCK).map_err(DeviceError::system("create an event for held frames"))?,
            limit: HELD_BYTES_MAX,
            soon: None,
            asked: false,
            counters,
            refusals_logged: LogLimit::default(),
        })
    }

    /// Takes `frame`, with its header, on its way out.
    pub fn pass(&mut self, frame: &GuestBuffers) -> Passage {
        if self.needs_room {
            return Passage::Waits;
        }
        match &self.state {
            State::Open if self.held.is_empty() => self.write_through(frame),
            // Those before it leave first.
            State::Open => Passage::Waits,
            State::Held(_) | State::Blocked(_) if !self.held.has_space(frame.len(), self.limit) => Passage::Waits,
            State::Held(output) | State::Blocked(output) => {
                if let Err(error) = self.held.push(frame, output) {
                    self.refuse(&io::Error::other(error));
                    return Passage::Refused;
                }
                self.flush();
                Passage::Taken
            }
        }
    }

    /// Sends `frame`, with its header, in the guest's name. It overtakes those that are held, as it tells nothing of what
    /// the guest did since a checkpoint.
    ///
    /// # Errors
    /// `WouldBlock`: there is no room now, or the gate is blocked. Anything else: the host does not want this frame.
    pub fn pass_own(&mut self, frame: &[u8]) -> io::Result<()> {
        if let State::Blocked(_) = self.state {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        rustix::io::write(&self.tap, frame)?;
        Ok(())
    }

    /// Counts a frame that the host does not want, or that is none, and says why.
    pub fn refuse(&mut self, error: &io::Error) {
        self.counters.tx_dropped.add(1);
        if self.refusals_logged.allows() {
            tracing::warn!(tap = self.name, %error, "frame of the guest dropped");
        }
    }

    /// Has it take `step`. What may leave from now on does so soon.
    pub fn take(&mut self, step: Step) {
        self.state = std::mem::take(&mut self.state).after(step);
        self.wake();
    }

    /// Calls `soon` each time half of what can be held is held.
    pub fn ask(&mut self, soon: CheckpointSoon) {
        self.soon = Some(soon);
    }

    /// Drops what is held of epochs that are not released: to the guest it will not have been sent. Of the others, what
    /// may leave does so now as far as there is room, as the device is stopped and may be at its end. Returns what was
    /// dropped.
    pub fn discard(&mut self) -> Held {
        let discarded = self.held.discard(&self.state);
        while self.send_first() {}
        self.ask_if_half_full();
        self.wake();
        discarded
    }

    /// What is held.
    pub fn held(&self) -> Held {
        self.held.len()
    }

    /// Whether frames wait for room on the tap and nothing else.
    pub fn needs_room(&self) -> bool {
        self.needs_room
    }

    /// Lets those leave that may, as long as there is room for them and until others have to get their turn.
    pub fn flush(&mut self) {
        self.needs_room = false;
        for _ in 0..FRAMES_PER_TURN {
            if !self.send_first() {
                self.ask_if_half_full();
                return;
            }
        }
        self.ask_if_half_full();
        self.wake();
    }

    /// Has the event loop report with `data` that something may leave, or be held, that could not before.
    ///
    /// Edge-triggered: the event need not be read. One that came while nobody watched is reported at once.
    pub fn watch(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(
            &self.work,
            data,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        ))
    }

    /// Has the event loop report that no more.
    pub fn ignore(&self, ops: &mut EventOps) {
        if let Err(error) = ops.remove(Events::empty(&self.work)) {
            tracing::error!(tap = self.name, %error, "cannot take a gate off the event loop");
        }
    }

    /// Without a copy: nothing is held that would have to leave before.
    fn write_through(&mut self, frame: &GuestBuffers) -> Passage {
        match frame.write_to(self.tap.as_fd()) {
            Ok(_) => Passage::Taken,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.needs_room = true;
                Passage::Waits
            }
            Err(error) => {
                self.refuse(&error);
                Passage::Refused
            }
        }
    }

    /// Sends the first frame that may leave; false if there is none, or no room for it.
    fn send_first(&mut self) -> bool {
        let Some((class, frame)) = self.held.first_of(&self.state) else {
            if self.state == State::Open {
                self.held.clear();
            }
            return false;
        };
        // A tap takes a frame whole or not at all.
        match rustix::io::write(&self.tap, frame) {
            Ok(_) => {}
            Err(Errno::AGAIN) => {
                self.needs_room = true;
                return false;
            }
            Err(Errno::INTR) => return true,
            Err(error) => self.refuse(&error.into()),
        }
        self.held.pop(class);
        true
    }

    fn ask_if_half_full(&mut self) {
        let half_full = self.held.len().bytes >= self.limit / 2;
        if half_full
            && !self.asked
            && let Some(soon) = &self.soon
        {
            soon();
        }
        self.asked = half_full;
    }

    fn wake(&self) {
        if let Err(error) = self.work.write(1) {
            tracing::error!(tap = self.name, %error, "cannot wake the event loop for held frames");
        }
    }
}
