//! The way to protect a VM, for the one who speaks for it in a group.

use std::sync::mpsc::Sender;

use cutover_snapshot::spec::MacAddr;
use uuid::Uuid;

use super::request::{CutReport, MemberStatus, Notice, StandbyAddress, Step};
use crate::control::Command;
use crate::snapshot::CutSnapshot;
use crate::{Controller, Error};

/// See the module. There is one of a VM at a time. Each method returns when it is done.
///
/// Dropped while the VM is protected, it has the VM [fenced](Self::fence): nobody can say any more whether it may run.
pub struct Protection {
    vm: Controller,
    macs: Vec<MacAddr>,
}

impl Protection {
    pub(crate) fn new(vm: Controller, macs: Vec<MacAddr>) -> Self {
        Self { vm, macs }
    }

    /// Addresses of the VM's network interfaces.
    pub fn macs(&self) -> &[MacAddr] {
        &self.macs
    }

    /// Brings the standby at `to` up to a state from which an epoch is small, while the guest runs; `epoch` is the first cut
    /// that may follow. `group` are the addresses of all members. Output is held from the first [`block`](Self::block) on.
    ///
    /// # Errors
    /// It is protected already, has what cannot be protected, or the standby cannot be reached or refuses it: then it goes
    /// on as before.
    pub fn seed(&mut self, to: &StandbyAddress, group: &[MacAddr], epoch: u64) -> Result<(), Error> {
        tracing::debug!(epoch, to = %to.endpoint, "the standby is seeded");
        let (to, group) = (to.clone(), group.to_vec());
        self.vm.protection_step(Step::Seed { to, group })
    }

    /// Holds all that the guest sends, until the cut `epoch` is valid or is not to be.
    ///
    /// # Errors
    /// It is not protected.
    pub fn block(&mut self, epoch: u64) -> Result<(), Error> {
        self.vm.protection_step(Step::Block(epoch))
    }

    /// Takes the cut `epoch`.
    ///
    /// # Errors
    /// It is not protected, or KVM did not tell its state: the next cut covers it then.
    pub fn take(&mut self, epoch: u64) -> Result<CutReport, Error> {
        self.vm.take_cut(epoch)
    }

    /// The cut `epoch` was taken by all: frames to members leave, and the standby gets it behind the running guest, of
    /// which [`Notice::Holds`] tells.
    ///
    /// # Errors
    /// There is no such cut.
    pub fn validate(&mut self, epoch: u64) -> Result<(), Error> {
        self.vm.protection_step(Step::Validate(epoch))
    }

    /// The cut `epoch` was not taken by all. Ignored if it was said to be valid.
    ///
    /// # Errors
    /// It is not protected.
    pub fn invalidate(&mut self, epoch: u64) -> Result<(), Error> {
        self.vm.protection_step(Step::Invalidate(epoch))
    }

    /// The cut `epoch` is what everyone goes back to from here on: what the guest sent before it leaves.
    ///
    /// # Errors
    /// There is no such cut.
    pub fn permanent(&mut self, epoch: u64) -> Result<(), Error> {
        self.vm.protection_step(Step::Permanent(epoch))
    }

    /// Prepares a snapshot that is to be of a cut, while the guest runs and other cuts are taken.
    /// [`Notice::SnapshotPrepared`] tells when it is; [`Notice::SnapshotOver`] when it is permanent, or that nothing comes of
    /// it: it does not if the VM goes back to a cut meanwhile.
    ///
    /// # Errors
    /// The VM is not protected, or another snapshot of it is being made.
    pub fn prepare_snapshot(&mut self, snapshot: CutSnapshot) -> Result<(), Error> {
        self.vm.protection_step(Step::PrepareSnapshot(snapshot))
    }

    /// The snapshot that is prepared is to be of cut `cut`, which is yet to be [taken](Self::take).
    ///
    /// # Errors
    /// None is.
    pub fn snapshot_at(&mut self, cut: u64) -> Result<(), Error> {
        self.vm.protection_step(Step::SnapshotAt(cut))
    }

    /// Snapshot `id` is not wanted. It is well if there is none.
    ///
    /// # Errors
    /// The VM has come to its end.
    pub fn no_snapshot(&mut self, id: Uuid) -> Result<(), Error> {
        self.vm.protection_step(Step::NoSnapshot(id))
    }

    /// Has the VM be again as it was at `cut`, and stand still there.
    ///
    /// # Errors
    /// It cannot be had any more, or the machine could not be built again.
    pub fn roll_back(&mut self, cut: u64) -> Result<(), Error> {
        self.vm.protection_step(Step::RollBack(cut))
    }

    /// Has the VM go on that [was fenced](Self::fence), [has gone back](Self::roll_back), or was promoted; its LAN is told
    /// where it is. What was sent to it while it stood still at a cut is dropped: it is of a future that there is not.
    ///
    /// Nothing, if it runs.
    ///
    /// # Errors
    /// It has come to its end.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.vm.protection_step(Step::Resume)
    }

    /// Stops the guest; what it has sent stays held.
    ///
    /// # Errors
    /// It has come to its end.
    pub fn fence(&mut self) -> Result<(), Error> {
        self.vm.protection_step(Step::Fence)
    }

    /// Protects the VM no more: all that is held leaves, in order, and nothing is held from here on.
    ///
    /// # Errors
    /// The VM has come to its end.
    pub fn unprotect(&mut self) -> Result<(), Error> {
        self.vm.protection_step(Step::Leave)
    }

    /// How it does.
    ///
    /// # Errors
    /// The VM has come to its end.
    pub fn status(&self) -> Result<MemberStatus, Error> {
        self.vm.protection_status()
    }
}

impl Drop for Protection {
    fn drop(&mut self) {
        let ended = |outcome: Result<(), Error>| {
            if let Err(error) = outcome {
                tracing::debug!(%error, "nobody speaks for the VM any more");
            }
        };
        self.vm.submit(|reply| Command::Protection(Step::End, reply), ended);
    }
}

impl Controller {
    /// Has the VM be one that can be protected, by what is returned; what it tells by itself goes to `notices`.
    ///
    /// # Errors
    /// Somebody protects it already, or the VM is not [managed](crate::Options::managed).
    pub fn protect(&self, notices: Sender<Notice>) -> Result<Protection, Error> {
        let macs = self.ask(|reply| Command::Protect { notices, reply })?;
        Ok(Protection::new(self.clone(), macs))
    }

    /// As [`protect`](Self::protect), without waiting: `answer` is called on the state driver's thread, and must not wait.
    pub fn protect_then(
        &self,
        notices: Sender<Notice>,
        answer: impl FnOnce(Result<Protection, Error>) + Send + 'static,
    ) {
        let vm = self.clone();
        self.submit(
            |reply| Command::Protect { notices, reply },
            |macs| answer(macs.map(|macs| Protection::new(vm, macs))),
        );
    }

    fn protection_step(&self, step: Step) -> Result<(), Error> {
        self.ask(|reply| Command::Protection(step, reply))
    }

    fn take_cut(&self, epoch: u64) -> Result<CutReport, Error> {
        self.ask(|reply| Command::TakeCut { epoch, reply })
    }

    fn protection_status(&self) -> Result<MemberStatus, Error> {
        self.ask(Command::ProtectionStatus)
    }
}
