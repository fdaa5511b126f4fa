//! What the coordinator of the model decides and stores, held against what is.

use uuid::Uuid;

use super::world::{Process, Role, World};
use crate::checkpoint::{CheckpointId, StoreRequest, StoredCut};
use crate::engine::{Decided, Event, Place, Request, RequestId};
use crate::id::{MemberId, Seat};
use crate::sim::{Violation, is_back_at, no_orphans};

impl World {
    /// The journal says something new: is it so?
    pub fn check_decision(&mut self, before: Decided) -> Result<(), Violation> {
        let primaries: Vec<_> = self.journal.primaries().map(|primary| primary.seat).collect();
        match (before, self.journal.decided) {
            (Decided::RollingBack { cut }, Decided::Unprotected) => {
                self.recovered = true;
                let guests = self.processes.iter().filter_map(|process| match &process.role {
                    Role::Member { vm, .. } if primaries.contains(&process.seat) => Some((process.seat, &vm.guest)),
                    _ => None,
                });
                is_back_at(cut, guests, &self.taken, &self.released)
            }
            (_, Decided::Protected { cut }) => {
                for place in &self.journal.members {
                    let Place::In {
                        standby: Some(standby), ..
                    } = place
                    else {
                        continue;
                    };
                    let has_cut = |process: &Process| match &process.role {
                        Role::Standby { image, .. } | Role::Dead { image: Some(image) } => image.at(cut).is_some(),
                        _ => false,
                    };
                    if !self
                        .processes
                        .iter()
                        .any(|process| process.seat == standby.seat && has_cut(process))
                    {
                        return Err(Violation(format!(
                            "cut {cut} is permanent, and {} lacks it",
                            standby.seat
                        )));
                    }
                }
                let taken = |seat: &Seat| Some((seat.member, self.taken.get(&(seat.member, cut))?));
                no_orphans(&primaries.iter().filter_map(taken).collect())
            }
            _ => Ok(()),
        }
    }

    /// The next checkpoint, or the last that was asked for.
    pub fn checkpoint(&self) -> CheckpointId {
        CheckpointId(Uuid::from_u64_pair(u64::from(self.left.stores), 1))
    }

    /// Somebody wants a checkpoint to be stored.
    pub fn stores(&mut self) {
        let number = u64::from(self.left.stores);
        let request = StoreRequest {
            id: self.checkpoint(),
            store: "/store".into(),
            name: "checkpoint".to_owned(),
            full: false,
            compress: None,
        };
        self.decide(Event::Asked(RequestId(number), Request::Store(request)));
    }

    /// Whether what is stored is a checkpoint.
    pub fn check_stored(&self, stored: &StoredCut) -> Result<(), Violation> {
        let cut = stored.cut;
        let of_cut = Uuid::from_u64_pair(cut, 0);
        let is_whole = stored.snapshots.len() == self.journal.primaries().count()
            && stored.snapshots.iter().all(|(_, snapshot)| snapshot.id == of_cut);
        if !is_whole || self.journal.permanent() < Some(cut) {
            return Err(Violation(format!("{stored:?} is no checkpoint of a permanent cut")));
        }
        let taken = |(member, _): &(MemberId, _)| Some((*member, self.taken.get(&(*member, cut))?));
        no_orphans(&stored.snapshots.iter().filter_map(taken).collect())
    }
}
