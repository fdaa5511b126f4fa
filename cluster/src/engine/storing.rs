//! A checkpoint that is stored: members prepare snapshots, the next cut is that of all of them, and they are copied behind
//! the running guests.
//!
//! ```text
//!  Preparing ── all have ──► Due ── a cut begins ──► Cutting(n) ── n is permanent ──► Copying(n) ── all have ──► there is one
//!      └────────────────────────┴───── a failure, an invalid cut, another generation ─────┴──► abandoned, and said why
//! ```
//! The journal says nothing of it: with its coordinator it is gone. Nothing of the group waits for it, but that the cut takes
//! place at once when all are prepared. What was said of it before a link broke may be lost: that ends it, too.

use std::collections::{BTreeMap, BTreeSet};

use super::group::{Action, Group, Out, Phase, RequestId};
use crate::checkpoint::{CheckpointId, StoreRequest, StoredCut, StoredSnapshot};
use crate::id::{Epoch, MemberId, Seat};
use crate::message::ToSeat;

/// A checkpoint that is being stored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Storing {
    /// Who asked.
    by: RequestId,
    request: StoreRequest,
    step: Step,
    /// Snapshots that are permanent.
    stored: BTreeMap<MemberId, StoredSnapshot>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// These have not prepared theirs yet.
    Preparing(BTreeSet<Seat>),
    /// It is to be of the next cut.
    Due,
    /// It is of this one, which is not permanent.
    Cutting(Epoch),
    /// It is of this one, which is.
    Copying(Epoch),
}

impl Group {
    /// Begins to store a checkpoint.
    pub(super) fn store(&mut self, by: RequestId, request: StoreRequest, out: &mut Out) {
        if self.storing.is_some() {
            let reason = "a checkpoint of it is being stored already".to_owned();
            return out.push(Action::Answer(by, Err(reason)));
        }
        for primary in self.record.primaries() {
            let vm = self.record.name(primary.seat.member);
            let order = request.order(&self.record.spec.name, vm);
            self.say(primary.seat, ToSeat::PrepareSnapshot(order), out);
        }
        self.storing = Some(Storing {
            by,
            request,
            step: Step::Preparing(self.primary_seats()),
            stored: BTreeMap::new(),
        });
    }

    /// Whether a checkpoint is being stored.
    pub fn is_storing(&self) -> bool {
        self.storing.is_some()
    }

    /// Nobody wants the checkpoint any more that is being stored.
    pub(super) fn cancel_storing(&mut self, by: RequestId, out: &mut Out) {
        let answer = match self.storing {
            Some(_) => Ok(self.last),
            None => Err("no checkpoint of it is being stored".to_owned()),
        };
        self.abandon("it was cancelled", out);
        out.push(Action::Answer(by, answer));
    }

    fn storing_of(&mut self, id: CheckpointId) -> Option<&mut Storing> {
        self.storing.as_mut().filter(|storing| storing.request.id == id)
    }

    /// `seat` has prepared its snapshot.
    pub(super) fn snapshot_prepared(&mut self, seat: Seat, id: CheckpointId, out: &mut Out) {
        if let Some(storing) = self.storing_of(id)
            && let Step::Preparing(left) = &mut storing.step
            && left.remove(&seat)
            && left.is_empty()
        {
            storing.step = Step::Due;
            self.begin_cut(out);
        }
    }

    /// What came of the snapshot of `seat`.
    pub(super) fn snapshot_over(
        &mut self,
        seat: Seat,
        id: CheckpointId,
        outcome: Result<StoredSnapshot, String>,
        out: &mut Out,
    ) {
        let Some(storing) = self.storing_of(id) else { return };
        match (outcome, &storing.step) {
            (Ok(snapshot), Step::Cutting(_) | Step::Copying(_)) => {
                storing.stored.insert(seat.member, snapshot);
                self.finish_storing(out);
            }
            // It cannot have one before there is a cut.
            (Ok(_), Step::Preparing(_) | Step::Due) => {}
            (Err(reason), _) => {
                let reason = format!("'{}': {reason}", self.record.name(seat.member));
                self.abandon(&reason, out);
            }
        }
    }

    /// Cut `number` begins.
    pub(super) fn store_at(&mut self, number: Epoch, out: &mut Out) {
        if let Some(storing) = &mut self.storing
            && storing.step == Step::Due
        {
            storing.step = Step::Cutting(number);
            self.say_to_primaries(&ToSeat::SnapshotAt(number), out);
        }
    }

    /// Cut `number` is permanent, with all members that there were when it began.
    pub(super) fn stored_cut_is_permanent(&mut self, number: Epoch, out: &mut Out) {
        if let Some(storing) = &mut self.storing
            && storing.step == Step::Cutting(number)
        {
            storing.step = Step::Copying(number);
            self.finish_storing(out);
        }
    }

    /// Cut `number` came to nothing.
    pub(super) fn stored_cut_is_invalid(&mut self, number: Epoch, reason: &str, out: &mut Out) {
        if self
            .storing
            .as_ref()
            .is_some_and(|storing| storing.step == Step::Cutting(number))
        {
            self.abandon(reason, out);
        }
    }

    /// If the cut before was in the way of the one that is wanted, that is next.
    pub(super) fn begin_cut_to_store(&mut self, out: &mut Out) {
        let is_due = self.storing.as_ref().is_some_and(|storing| storing.step == Step::Due);
        if is_due && self.phase == Phase::Idle {
            self.begin_cut(out);
        }
    }

    fn finish_storing(&mut self, out: &mut Out) {
        let members: BTreeSet<_> = self.record.primaries().map(|primary| primary.seat.member).collect();
        let is_complete = |storing: &mut Storing| {
            matches!(storing.step, Step::Copying(_)) && members.iter().all(|member| storing.stored.contains_key(member))
        };
        let Some(storing) = self.storing.take_if(is_complete) else {
            return;
        };
        if let Step::Copying(cut) = storing.step {
            let stored = StoredCut {
                cut,
                generation: self.record.generation,
                snapshots: storing.stored.into_iter().collect(),
            };
            out.push(Action::Stored(storing.by, stored));
        }
    }

    /// Nothing comes of the checkpoint that is being stored, if there is one.
    pub(super) fn abandon(&mut self, reason: &str, out: &mut Out) {
        if let Some(storing) = self.storing.take() {
            self.say_to_primaries(&ToSeat::NoSnapshot(storing.request.id), out);
            out.push(Action::Answer(storing.by, Err(reason.to_owned())));
        }
    }
}
