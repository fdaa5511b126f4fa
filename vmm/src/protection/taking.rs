//! Taking a cut: what is copied while the guest still runs, and what while it stands.
//!
//! ```text
//!  begin    take what changed ─► copy it ─► once more, if that was much             the guest runs
//!  finish   stop ─► take the rest ─► copy it ─► save state ─► next epoch ─► run
//!           └────────────────────── the pause ─────────────────────────┘
//! ```
//! A page that is written after it was copied is in the rest, and copied again. So the pause depends on how much the guest
//! writes in the moment before, not on how long the epoch was.

use std::sync::Arc;
use std::time::Instant;

use super::disks::DiskAtCut;
use super::pages::PageBuffer;
use crate::Error;
use crate::dirty::{Consumer, Taken};
use crate::machine::Machine;
use crate::state::MachineState;

/// Most times that changes are copied while the guest runs.
const ROUNDS_MAX: usize = 3;

/// So few pages end these rounds: to copy them takes less than to stop the guest.
const FEW_PAGES: u64 = 128;

/// What a cut has besides pages.
pub struct Frozen {
    /// vCPUs and devices.
    pub state: MachineState,
    /// When they were stopped.
    pub at: Instant,
    /// Whether the guest ran.
    pub ran: bool,
    /// Disks that the guest can write, in the order it sees them.
    pub disks: Vec<Arc<DiskAtCut>>,
    /// What it has of the tracker: goes back there if the cut does not count.
    pub taken: Vec<Taken>,
}

/// A cut that is being taken. Dropped, there is none, and the next has all that this would have had.
pub struct Taking<'a> {
    machine: &'a Machine,
    changes: &'a Consumer,
    buffer: PageBuffer,
    taken: Vec<Taken>,
}

impl<'a> Taking<'a> {
    /// Copies what has changed in the memory of `machine`, which may run, to `buffer`.
    ///
    /// # Errors
    /// KVM does not tell what changed.
    pub fn begin(machine: &'a Machine, changes: &'a Consumer, buffer: PageBuffer) -> Result<Self, Error> {
        let mut taking = Self {
            machine,
            changes,
            buffer,
            taken: Vec::new(),
        };
        for _ in 0..ROUNDS_MAX {
            if taking.copy()? <= FEW_PAGES {
                break;
            }
        }
        taking.buffer.reserve(0);
        // For what is taken in the pause.
        taking.taken.reserve(1);
        Ok(taking)
    }

    /// Copies what has changed since; returns how many pages.
    fn copy(&mut self) -> Result<u64, Error> {
        let changed = self.changes.take()?;
        let pages = changed.len();
        self.buffer.reserve(usize::try_from(pages).unwrap_or(usize::MAX));
        self.buffer.copy(self.machine.memory(), &changed)?;
        self.taken.push(changed);
        Ok(pages)
    }

    /// The cut, but for disks: of a guest that stands still since `at`, and `ran` before.
    ///
    /// # Errors
    /// KVM does not tell what changed, or its state.
    pub fn finish(mut self, at: Instant, ran: bool) -> Result<(PageBuffer, Frozen), Error> {
        self.copy()?;
        let frozen = Frozen {
            state: self.machine.save()?,
            at,
            ran,
            disks: Vec::new(),
            taken: self.taken,
        };
        Ok((self.buffer, frozen))
    }
}
