//! What may leave through a gate: its states, and every step from one to another.

use std::sync::Arc;

use super::group::MacTable;

/// What may leave.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Everything: nobody protects this VM.
    #[default]
    Open,
    /// What stays in the group, and what is committed.
    Held(Output),
    /// Nothing: a coordinated cut is being made.
    Blocked(Output),
}

/// How far the guest's output is committed, and for whom that matters.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    group: Arc<MacTable>,
    /// The epoch that the guest is in.
    epoch: u64,
    /// The first epoch that is not permanent; at most `epoch`.
    uncommitted: u64,
}

/// What changes it.
#[derive(Debug)]
pub enum Step {
    /// The guest is in `epoch` of a group whose members have these addresses.
    Hold {
        /// The members.
        group: Arc<MacTable>,
        /// Where the guest is.
        epoch: u64,
    },
    /// A cut begins.
    Block,
    /// It was made everywhere, or given up.
    Unblock,
    /// The guest is in this epoch from here on.
    Cut(u64),
    /// This epoch and those before it are permanent.
    Release(u64),
    /// Nobody protects the VM any more.
    Open,
}

/// For whom a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A member of the group.
    Inside,
    /// Anybody else.
    Outside,
}

impl State {
    /// The state after `step`. One that makes no sense now changes nothing: it was taken already, or is late.
    pub fn after(self, step: Step) -> Self {
        match (self, step) {
            (_, Step::Open) => Self::Open,
            (Self::Open, Step::Hold { group, epoch }) => Self::Held(Output::new(group, epoch, epoch)),
            (Self::Held(output) | Self::Blocked(output), Step::Hold { group, epoch }) => {
                // What is held already has to be released all the same.
                Self::Held(Output::new(group, epoch, output.uncommitted.min(epoch)))
            }
            (Self::Held(output), Step::Block) => Self::Blocked(output),
            (Self::Blocked(output), Step::Unblock) => Self::Held(output),
            (Self::Held(output), Step::Cut(next)) => Self::Held(output.cut(next)),
            (Self::Blocked(output), Step::Cut(next)) => Self::Blocked(output.cut(next)),
            (Self::Held(output), Step::Release(epoch)) => Self::Held(output.release(epoch)),
            (Self::Blocked(output), Step::Release(epoch)) => Self::Blocked(output.release(epoch)),
            (state @ Self::Open, Step::Block | Step::Unblock | Step::Cut(_) | Step::Release(_))
            | (state @ Self::Held(_), Step::Unblock)
            | (state @ Self::Blocked(_), Step::Block) => state,
        }
    }

    /// Whether what was sent in `epoch` was sent for good.
    pub fn is_committed(&self, epoch: u64) -> bool {
        match self {
            Self::Open => true,
            Self::Held(output) | Self::Blocked(output) => epoch < output.uncommitted,
        }
    }

    /// Whether a frame of `class` that was sent in `epoch` may leave.
    pub fn allows(&self, class: Class, epoch: u64) -> bool {
        match self {
            Self::Open | Self::Held(_) => class == Class::Inside || self.is_committed(epoch),
            Self::Blocked(_) => false,
        }
    }
}

impl Output {
    fn new(group: Arc<MacTable>, epoch: u64, uncommitted: u64) -> Self {
        Self {
            group,
            epoch,
            uncommitted,
        }
    }

    /// The epoch of what is sent now.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// For whom a frame to `destination` is.
    pub fn class_of(&self, destination: [u8; 6]) -> Class {
        if self.group.has(destination) {
            Class::Inside
        } else {
            Class::Outside
        }
    }

    /// Epochs only follow each other.
    fn cut(self, next: u64) -> Self {
        Self {
            epoch: next.max(self.epoch),
            ..self
        }
    }

    /// One that has not ended cannot be permanent, whatever anybody says.
    fn release(self, epoch: u64) -> Self {
        let permanent = epoch.saturating_add(1).min(self.epoch);
        Self {
            uncommitted: permanent.max(self.uncommitted),
            ..self
        }
    }
}
