//! Checkpoints that are stored in the simulation: asked for at any time, copied for a while, of which any may fail.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::check::{Violation, no_orphans};
use super::process::Role;
use super::vm::Guest;
use super::world::{Happening, World};
use super::{MS, SECOND};
use crate::checkpoint::{CheckpointId, StoreRequest, StoredCut, StoredSnapshot};
use crate::engine::{Engine, Event, Input, Request, RequestId};
use crate::id::{Epoch, MemberId};
use crate::member;
use crate::vm::Notice;

/// Snapshots of members, by their ids: whose, of which cut, and what the guest was then.
pub(super) type Snapshots = BTreeMap<Uuid, (MemberId, Epoch, Guest)>;

/// Of so many snapshots, one cannot be written.
const FAILS_ONE_IN: u8 = 10;

impl World {
    /// Somebody wants a checkpoint, or not any more.
    pub(super) fn wants_checkpoint(&mut self) -> Result<(), Violation> {
        let again = self.rng.u64(50 * MS..SECOND);
        self.after(again, Happening::WantsCheckpoint);
        self.requests += 1;
        let is_storing = self
            .coordinator
            .as_ref()
            .is_some_and(|engine| Engine::store_progress(engine).is_some());
        let request = match is_storing {
            // What was said of it may have been lost.
            true if self.rng.bool() => Request::CancelStore,
            true => return Ok(()),
            false => Request::Store(StoreRequest {
                id: CheckpointId(Uuid::from_u64_pair(self.requests, 2)),
                store: "/store".into(),
                name: "checkpoint".to_owned(),
                full: false,
                compress: None,
            }),
        };
        self.decide(Input::Event(Event::Asked(RequestId(self.requests), request)))
    }

    /// A member's VM is asked for a snapshot.
    pub(super) fn call_snapshot(&mut self, process: usize, call: &member::Call) {
        let Some(vm) = self.processes[process].vm_mut() else {
            return;
        };
        match call {
            member::Call::PrepareSnapshot(order) => {
                vm.snapshot = Some((order.id, None));
                let (id, takes) = (order.id, self.rng.u64(MS..100 * MS));
                self.after(takes, Happening::SnapshotPrepared { process, id });
            }
            member::Call::SnapshotAt(cut) => {
                if let Some((_, at)) = &mut vm.snapshot {
                    *at = Some(*cut);
                }
            }
            _ => vm.snapshot = None,
        }
    }

    /// It can be of a cut.
    pub(super) fn snapshot_prepared(&mut self, process: usize, id: CheckpointId) {
        self.member_input(process, member::Input::Notice(Notice::SnapshotPrepared(id)));
    }

    /// A member takes cut `cut`: is there a snapshot of it?
    pub(super) fn snapshot_taken(&mut self, process: usize, cut: Epoch) {
        let this = &mut self.processes[process];
        let member = this.seat.member;
        let Role::Member { vm, .. } = &mut this.role else {
            return;
        };
        let Some((id, _)) = vm.snapshot.take_if(|(_, at)| *at == Some(cut)) else {
            return;
        };
        let guest = vm.guest.clone();
        let snapshot = Uuid::from_u64_pair(self.requests, 1 << 32 | self.snapshots.len() as u64);
        self.snapshots.insert(snapshot, (member, cut, guest));
        let takes = self.rng.u64(MS..200 * MS);
        self.after(takes, Happening::SnapshotOver { process, id, snapshot });
    }

    /// It is copied.
    pub(super) fn snapshot_over(&mut self, process: usize, id: CheckpointId, snapshot: Uuid) {
        let outcome = match self.rng.u8(0..FAILS_ONE_IN) {
            0 => Err("there is no room".to_owned()),
            _ => Ok(StoredSnapshot {
                id: snapshot,
                name: "checkpoint".to_owned(),
                parent: None,
                file_bytes: 0,
                pause_ns: 0,
            }),
        };
        self.member_input(process, member::Input::Notice(Notice::SnapshotOver(id, outcome)));
    }

    /// The coordinator says that there is a checkpoint: is it one?
    pub(super) fn stored(&mut self, stored: &StoredCut) -> Result<(), Violation> {
        self.outcome.stored += 1;
        let cut = stored.cut;
        if self.permanent() < Some(cut) {
            return Err(Violation(format!("cut {cut} is stored, and was never permanent")));
        }
        let mut guests = BTreeMap::new();
        for (member, snapshot) in &stored.snapshots {
            match self.snapshots.get(&snapshot.id) {
                Some((whose, of, guest)) if whose == member && *of == cut => guests.insert(*member, guest),
                other => {
                    return Err(Violation(format!(
                        "member {} in the checkpoint of cut {cut} is {other:?}",
                        member.0
                    )));
                }
            };
        }
        let missing = self.members().find(|member| !guests.contains_key(member));
        if let Some(member) = missing {
            return Err(Violation(format!(
                "member {} is not in the checkpoint of cut {cut}",
                member.0
            )));
        }
        no_orphans(&guests)
    }
}
