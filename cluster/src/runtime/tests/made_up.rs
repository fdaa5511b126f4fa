//! VMs without guests: all they have is a number that grows with each cut, and standbys that are told it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use cutover_snapshot::spec::MacAddr;

use crate::checkpoint::{CheckpointId, Order, StoredSnapshot};
use crate::id::Epoch;
use crate::runtime::seat::Notices;
use crate::vm::{CutReport, MemberStatus, MemberVm, Notice, StandbyAddress, StandbyNotice, StandbyVm, VmError};

/// A VM of a made-up host.
#[derive(Clone, Debug, Default)]
pub struct VmState {
    pub runs: bool,
    pub is_protected: bool,
    pub number: u64,
    /// The number at each cut.
    pub cuts: BTreeMap<Epoch, u64>,
    pub permanent: Epoch,
    /// The snapshot it makes, and of which cut.
    pub snapshot: Option<(Order, Option<Epoch>)>,
    /// Cuts it went back to, or was promoted at.
    pub went_back_to: Vec<Epoch>,
}

/// What a standby holds.
#[derive(Debug)]
pub struct StandbyState {
    pub seeded: bool,
    pub held: BTreeMap<Epoch, u64>,
    pub permanent: Epoch,
    /// Its host has lost it.
    pub is_lost: bool,
    pub notices: Notices,
}

/// All VMs of one name, of which at most one may run, and all standbys by where they listen.
#[derive(Debug, Default)]
pub struct Registry {
    vms: Mutex<BTreeMap<String, Vec<Shared<VmState>>>>,
    pub standbys: Mutex<BTreeMap<String, Shared<StandbyState>>>,
}

pub type Shared<T> = Arc<Mutex<T>>;

pub fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    super::super::link::lock(shared)
}

impl Registry {
    pub fn add(&self, name: &str, vm: VmState) -> Shared<VmState> {
        let vm = Arc::new(Mutex::new(vm));
        lock(&self.vms)
            .entry(name.to_owned())
            .or_default()
            .push(Arc::clone(&vm));
        vm
    }

    /// The VM that was the last to have this name, and how many had it before.
    pub fn newest(&self, name: &str) -> Option<(Shared<VmState>, usize)> {
        let vms = lock(&self.vms);
        let of_name = vms.get(name)?;
        Some((of_name.last()?.clone(), of_name.len() - 1))
    }

    fn run(&self, name: &str, vm: &Shared<VmState>) {
        let vms = lock(&self.vms);
        let others = vms[name].iter().filter(|other| !Arc::ptr_eq(other, vm));
        let running = others.filter(|other| lock(other).runs).count();
        assert_eq!(running, 0, "two of '{name}' run");
        lock(vm).runs = true;
    }
}

/// A member.
pub struct MadeUp {
    pub name: String,
    pub registry: Arc<Registry>,
    pub vm: Shared<VmState>,
    pub standby: Option<Shared<StandbyState>>,
    pub notices: Notices,
}

impl MemberVm for MadeUp {
    fn macs(&self) -> Vec<MacAddr> {
        vec![MacAddr([2, 0, 0, 0, 0, self.name.as_bytes()[0]])]
    }

    fn seed(&mut self, to: &StandbyAddress, _: &[MacAddr], _: Epoch) -> Result<(), VmError> {
        let standby = lock(&self.registry.standbys).get(&to.0).cloned();
        let standby = standby
            .filter(|standby| !lock(standby).is_lost)
            .ok_or("nobody listens there")?;
        let mut state = lock(&standby);
        state.seeded = true;
        state.notices.tell_of_standby(StandbyNotice::Seeded);
        drop(state);
        self.standby = Some(standby);
        lock(&self.vm).is_protected = true;
        Ok(())
    }

    fn block(&mut self, _: Epoch) -> Result<(), VmError> {
        Ok(())
    }

    fn take(&mut self, epoch: Epoch) -> Result<CutReport, VmError> {
        let mut vm = lock(&self.vm);
        let number = vm.number;
        vm.cuts.insert(epoch, number);
        vm.number += 1;
        if let Some((order, _)) = vm.snapshot.take_if(|(_, cut)| *cut == Some(epoch)) {
            let stored = StoredSnapshot {
                id: order.id.0,
                name: order.snapshot,
                parent: None,
                file_bytes: number,
                pause_ns: 1,
            };
            self.notices.tell(Notice::SnapshotOver(order.id, Ok(stored)));
        }
        Ok(CutReport {
            pause_ns: 1,
            dirty_pages: 1,
            disk_bytes: 0,
        })
    }

    fn validate(&mut self, epoch: Epoch) -> Result<(), VmError> {
        let number = lock(&self.vm).cuts[&epoch];
        let standby = self.standby.as_ref().ok_or("it has no standby")?;
        let mut standby = lock(standby);
        if standby.is_lost {
            self.notices.tell(Notice::StandbyLost("its link broke".to_owned()));
        } else {
            standby.held.insert(epoch, number);
            standby.notices.tell_of_standby(StandbyNotice::Holds(epoch));
            self.notices.tell(Notice::Holds(epoch));
        }
        Ok(())
    }

    fn invalidate(&mut self, epoch: Epoch) -> Result<(), VmError> {
        lock(&self.vm).cuts.remove(&epoch);
        Ok(())
    }

    fn permanent(&mut self, epoch: Epoch) -> Result<(), VmError> {
        let mut vm = lock(&self.vm);
        assert!(vm.cuts.contains_key(&epoch), "{epoch} was never cut: {vm:?}");
        vm.permanent = epoch;
        Ok(())
    }

    fn prepare_snapshot(&mut self, order: &Order) -> Result<(), VmError> {
        self.notices.tell(Notice::SnapshotPrepared(order.id));
        lock(&self.vm).snapshot = Some((order.clone(), None));
        Ok(())
    }

    fn snapshot_at(&mut self, epoch: Epoch) -> Result<(), VmError> {
        let mut vm = lock(&self.vm);
        let (_, cut) = vm.snapshot.as_mut().ok_or("none is prepared")?;
        *cut = Some(epoch);
        Ok(())
    }

    fn no_snapshot(&mut self, _: CheckpointId) -> Result<(), VmError> {
        lock(&self.vm).snapshot = None;
        Ok(())
    }

    fn roll_back(&mut self, cut: Epoch) -> Result<(), VmError> {
        let mut vm = lock(&self.vm);
        vm.runs = false;
        vm.number = *vm.cuts.get(&cut).ok_or("there is no such cut")?;
        vm.went_back_to.push(cut);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.registry.run(&self.name, &self.vm);
        Ok(())
    }

    fn fence(&mut self) -> Result<(), VmError> {
        lock(&self.vm).runs = false;
        Ok(())
    }

    fn unprotect(&mut self) -> Result<(), VmError> {
        self.standby = None;
        lock(&self.vm).is_protected = false;
        Ok(())
    }

    fn status(&self) -> MemberStatus {
        MemberStatus::default()
    }
}

/// A standby.
pub struct MadeUpStandby {
    pub name: String,
    pub registry: Arc<Registry>,
    pub state: Shared<StandbyState>,
    pub notices: Notices,
}

impl StandbyVm for MadeUpStandby {
    type Member = MadeUp;

    fn permanent(&mut self, epoch: Epoch) -> Result<(), VmError> {
        let mut state = lock(&self.state);
        assert!(state.seeded && state.held.contains_key(&epoch), "{epoch}: {state:?}");
        state.permanent = epoch;
        Ok(())
    }

    fn promote(self, cut: Epoch) -> Result<MadeUp, VmError> {
        let number = *lock(&self.state).held.get(&cut).ok_or("it does not hold the cut")?;
        let vm = VmState {
            number,
            cuts: [(cut, number)].into(),
            permanent: cut,
            went_back_to: vec![cut],
            ..VmState::default()
        };
        Ok(MadeUp {
            vm: self.registry.add(&self.name, vm),
            name: self.name,
            registry: self.registry,
            standby: None,
            notices: self.notices,
        })
    }
}
