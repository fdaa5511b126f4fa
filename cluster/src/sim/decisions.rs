//! What the coordinator of the simulation decides, held against what is.

use super::check::{Violation, is_back_at, no_orphans};
use super::process::Role;
use super::world::World;
use crate::engine::{Decided, Place};
use crate::id::Seat;

impl World {
    /// The journal says something new: is it so?
    pub(super) fn check_decision(&self, before: Decided) -> Result<(), Violation> {
        let primaries: Vec<_> = self.journal.primaries().map(|primary| primary.seat).collect();
        match (before, self.journal.decided) {
            (Decided::RollingBack { cut }, Decided::Unprotected) => {
                let guest = |seat| Some((seat, &self.processes[self.process_of(seat)?].vm()?.guest));
                let guests = primaries.into_iter().filter_map(guest);
                is_back_at(cut, guests, &self.taken, &self.released)
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
