//! What fails, and when.

use std::str::FromStr;

use super::{MS, SECOND};
use crate::lease::Nanos;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// Nothing.
    None,
    /// One host or process after the other, each when the group is protected again: nothing may be lost.
    Successive,
    /// Anything at any time: what is left must be consistent, and protected when it is over.
    Storm,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A host loses its power; it is back after a while, empty.
    PowerOff { host: u16, back_after: Nanos },
    /// A process is killed.
    Kill { process: usize },
    /// The coordinator is killed, and started again after a while.
    Coordinator { back_after: Nanos },
    /// The same, in the middle of what it does next.
    CoordinatorActing { back_after: Nanos },
    /// The control link of a process breaks.
    Link { process: usize },
    /// Nothing goes to or from the coordinator from a host for a while; what runs there runs on.
    Partition { host: u16, length: Nanos },
    /// Messages of the coordinator's links are lost, doubled and late for a while.
    Noise { length: Nanos },
    /// A member cannot reach its standby.
    Replication { process: usize },
    /// The next cut of a process fails.
    Cut { process: usize },
    /// A guest is shut down.
    GuestEnds { process: usize },
}

impl FromStr for Faults {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "successive" => Ok(Self::Successive),
            "storm" => Ok(Self::Storm),
            _ => Err(format!("'{text}' is not none, successive or storm")),
        }
    }
}

impl Faults {
    /// How long until the next fault.
    pub(super) fn pause(self, rng: &mut fastrand::Rng) -> Option<Nanos> {
        match self {
            Self::None => None,
            Self::Successive => Some(rng.u64(600 * MS..1500 * MS)),
            Self::Storm => Some(rng.u64(10 * MS..700 * MS)),
        }
    }

    /// What fails next.
    pub(super) fn next(self, hosts: u16, processes: &[usize], rng: &mut fastrand::Rng) -> Option<Fault> {
        let host = rng.u16(0..hosts);
        let process = rng.choice(processes).copied()?;
        let back_after = rng.u64(50 * MS..3 * SECOND);
        let length = rng.u64(10 * MS..SECOND);
        let kinds = match self {
            Self::None => return None,
            Self::Successive => 6,
            Self::Storm => 10,
        };
        Some(match rng.u8(0..kinds) {
            0 => Fault::PowerOff { host, back_after },
            1 => Fault::Kill { process },
            2 => Fault::Coordinator { back_after },
            3 => Fault::CoordinatorActing { back_after },
            4 => Fault::Link { process },
            5 => Fault::Cut { process },
            6 => Fault::Partition { host, length },
            7 => Fault::Noise { length },
            8 => Fault::Replication { process },
            _ => Fault::GuestEnds { process },
        })
    }
}
