//! What the coordinator of the simulation decides, held against what is.

use std::collections::BTreeMap;

use super::check::{Violation, no_orphans, output_is_kept};
use super::process::Role;
use super::world::World;
use crate::engine::{Decided, Place};
use crate::id::Seat;

impl World {
    /// The journal says something new: is it so?
    pub(super) fn check_decision(&mut self, before: Decided) -> Result<(), Violation> {
        let primaries: Vec<_> = self.journal.primaries().map(|primary| primary.seat).collect();
        match (before, self.journal.decided) {
            (Decided::RollingBack { cut }, Decided::Unprotected) => {
                let mut guests = BTreeMap::new();
                for seat in primaries {
                    let process = self.process_of(seat);
                    if let Some(vm) = process.and_then(|process| self.processes[process].vm()) {
                        let released = self.released.entry(seat.member).or_default();
                        output_is_kept(seat.member, &vm.guest, released)?;
                        if Some(&vm.guest) != self.taken.get(&(seat.member, cut)) {
                            return Err(Violation(format!("{seat} is not what it was at cut {cut}")));
                        }
                        guests.insert(seat.member, &vm.guest);
                    }
                }
                no_orphans(&guests)
            }
            (_, Decided::Protected { cut }) => {
                for place in &self.journal.members {
                    let Place::In { primary, standby } = place else {
                        continue;
                    };
                    let standby = standby.as_ref().and_then(|standby| self.process_of(standby.seat));
                    let Some(Role::Standby { image, .. }) = standby.map(|process| &self.processes[process].role) else {
                        return Err(Violation(format!(
                            "cut {cut} is permanent, and {} has no standby",
                            primary.seat
                        )));
                    };
                    if image.at(cut).is_none() {
                        return Err(Violation(format!(
                            "cut {cut} is permanent, and partial: {}",
                            primary.seat
                        )));
                    }
                }
                let taken = |seat: &Seat| Some((seat.member, self.taken.get(&(seat.member, cut))?));
                no_orphans(&primaries.iter().filter_map(taken).collect())
            }
            _ => Ok(()),
        }
    }

    fn process_of(&self, seat: Seat) -> Option<usize> {
        self.processes.iter().rposition(|process| process.seat == seat)
    }
}
