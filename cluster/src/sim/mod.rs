//! Groups on made-up hosts, with made-up guests and faults, in made-up time: the state machines are those that run between
//! real hosts, everything around them follows from a seed.
//!
//! ```text
//!  seed ──► Faults ──► World: hosts ─ processes (Member, Standby, agents) ─ network ─ coordinator (Engine, journal)
//!                        └─ at each step: no orphan, no output that is undone, one incarnation, no partial cut
//! ```
//! A run with the same seed and options is the same, event for event, so a failure is found again with its trace. Frames
//! between guests take less time than messages of the coordinator: a frame that was sent before all members stood still
//! has arrived by the time they run again. In a network where it may not have, a rollback is not safe; of a switch, that
//! is microseconds against a write to the journal.

mod check;
mod decisions;
mod faults;
mod guests;
mod hosts;
mod process;
mod storing;
mod vm;
mod world;

pub use check::Violation;
#[cfg(test)]
pub(crate) use check::{is_back_at, no_orphans};
pub use faults::Faults;
#[cfg(test)]
pub(crate) use vm::{Frame, Guest, Image, Shipment, Vm};
pub use world::{Outcome, World};

use crate::id::Host;
use crate::lease::Nanos;
use crate::spec::{GroupSpec, Interval, MemberSpec, Timing};

/// A millisecond of simulated time.
pub const MS: Nanos = 1_000_000;
/// A second of it.
pub const SECOND: Nanos = 1000 * MS;

/// What a simulation is to be.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Members of the group.
    pub members: u16,
    /// Hosts they are on, and that back them up.
    pub hosts: u16,
    /// How long faults happen.
    pub length: Nanos,
    /// What fails.
    pub faults: Faults,
    /// Whether what happens is kept as text.
    pub trace: bool,
}

impl Options {
    fn spec(&self) -> GroupSpec {
        let host = |number| Host(format!("host{number}"));
        let member = |number| MemberSpec {
            name: format!("vm{number}"),
            host: host(number % self.hosts),
            restore: None,
        };
        GroupSpec {
            name: "simulated".to_owned(),
            members: (0..self.members).map(member).collect(),
            backups: (0..self.hosts).map(host).collect(),
            interval: Interval::default(),
            timing: Timing::default(),
        }
    }
}

/// Runs the simulation of `seed` to its end.
///
/// # Errors
/// Something happened that must not, or the group did not recover when all faults were over; with the trace, if it is kept.
pub fn run(seed: u64, options: &Options) -> Result<Outcome, (Violation, Vec<String>)> {
    World::new(seed, options).run()
}

#[cfg(test)]
mod tests;
