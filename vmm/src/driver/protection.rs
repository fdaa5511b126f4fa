//! What the state driver does for the protection of a VM: it takes cuts, stops the guest, and takes it back to a cut.
//!
//! ```text
//!  Seed ─► (thread "checkpoint") ─► guard ─► Block ─► TakeCut ─┬─► Validate ─► Permanent
//!                                     ▲                        └─► Invalidate
//!                                     └── RollBack: Machine torn down, built again on the same memory ─► Resume
//! ```

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use cutover_devices::{CheckpointSoon, GuestMemory, OnThread};
use cutover_snapshot::spec::{MacAddr, VmSpec};

use super::{Driver, Options, Outcome, Vmm};
use crate::Error;
use crate::control::{Mailbox, Reply};
use crate::device_manager::DiskLocks;
use crate::dirty::{Baseline, PAGE_SIZE};
use crate::events::EventKind;
use crate::job::Context;
use crate::lifecycle::{self, Action, Exit, Recovery, Refusal, Request, State};
use crate::machine::{Machine, Reserved, confined};
use crate::migration::MemoryImage;
use crate::protection::{
    Begin, CutReport, Guard, Member, MemberStatus, Notice, Output, Protection, Seeding, SeedingDone, StandbyAddress,
    Step, Taking, WayBack, Work, copy_pages, in_full, take_changes,
};
use crate::seccomp::ThreadKind;
use crate::snapshot::{CutSnapshot, Snapshots};

impl Vmm {
    /// The VM of `spec` that was a standby: `machine` has the state of cut `cut`, at which it `ran`, and stands still until
    /// its group says that it may run. What it sends then is held. Its end is reported to `mailbox`.
    pub(crate) fn promoted(
        spec: VmSpec,
        machine: Machine,
        incarnation: u64,
        cut: u64,
        ran: bool,
        options: &Options,
        mailbox: Arc<Mailbox>,
    ) -> Self {
        let mut driver = Driver::new(spec, options, mailbox);
        driver.incarnation = incarnation;
        driver.as_it_is = true;
        driver.enter(State::RolledBack { ran });
        driver.log(EventKind::Promoted { cut });
        machine
            .devices
            .hold_output(&Arc::default(), cut + 1, &(Arc::new(|| {}) as CheckpointSoon));
        Self { machine, driver }
    }

    /// As [`Controller::protect`](crate::Controller::protect), before the VM runs.
    ///
    /// # Errors
    /// As there.
    pub fn protect(&mut self, notices: Sender<Notice>) -> Result<Protection, Error> {
        let macs = self.driver.protect(&self.machine, notices)?;
        Ok(Protection::new(self.controller(), macs))
    }
}

impl Driver {
    /// Tells whoever speaks for the VM in a group how it ended, if it did.
    pub(super) fn tell_end(&mut self, outcome: &Result<Outcome, Error>) {
        match outcome {
            Ok(Outcome::Exit(exit)) => self.end_member(Notice::of_exit(*exit)),
            Ok(Outcome::BuildAnew | Outcome::GoBack(..)) => {}
            Err(error) => self.end_member(Notice::GuestFailed(error.to_string())),
        }
    }

    /// Nobody speaks for the VM any more, of which `notice` is the last that is heard.
    fn end_member(&mut self, notice: Notice) {
        if let Some(member) = self.member.take() {
            member.tell(notice);
        }
    }

    /// Has somebody speak for the VM, who hears what it tells by `notices`; returns the addresses of its interfaces.
    pub(super) fn protect(&mut self, machine: &Machine, notices: Sender<Notice>) -> Result<Vec<MacAddr>, Error> {
        if self.member.is_some() {
            return Err(Refusal::Protected.into());
        }
        if !self.options.managed {
            return Err(Refusal::Confined.into());
        }
        self.member = Some(Member::begin(&self.mailbox, notices, &self.options)?);
        Ok(machine.devices.macs())
    }

    /// Whether the VM is protected, or about to be.
    pub(super) fn is_protected(&self) -> bool {
        self.member.as_ref().is_some_and(Member::is_protected)
    }

    /// Does the next step of the protection of `machine`, and answers.
    pub(super) fn protection_step(&mut self, machine: &Machine, step: Step, reply: Reply<()>) -> Option<Outcome> {
        let done = match step {
            Step::Seed { to, group } => {
                self.begin_seeding(machine, &to, &group, reply);
                return None;
            }
            Step::RollBack(cut) => match self.begin_way_back(machine, cut) {
                Ok(way_back) => return Some(Outcome::GoBack(Box::new(way_back), reply)),
                Err(error) => Err(error),
            },
            Step::Block(epoch) => self.block(machine, epoch),
            Step::Validate(cut) => self.validate(machine, cut),
            Step::Invalidate(cut) => self.invalidate(machine, cut),
            Step::Permanent(cut) => self.make_permanent(machine, cut),
            Step::PrepareSnapshot(snapshot) => self.prepare_snapshot(machine, &snapshot),
            Step::SnapshotAt(cut) => self.snapshots.expect_cut(cut).map_err(Error::from),
            Step::NoSnapshot(id) => {
                self.snapshots.give_up_cut(id);
                Ok(())
            }
            Step::Fence => self.recover(machine, Recovery::Fence),
            Step::Resume => self.go_on_recovered(machine),
            Step::Leave => self.leave_protection(machine),
            Step::End => {
                let over = self.member.as_ref().and_then(|member| member.over);
                reply.send(self.end_protection(machine));
                return over.map(Outcome::Exit);
            }
        };
        reply.send(done);
        None
    }

    /// Whether `after_end`, what follows the end of the guest, is put off: it ended in order, and its group may go back to
    /// before that. What it sent last is held, and leaves when its group says so; it stands still until then.
    pub(super) fn puts_off(&mut self, machine: &Machine, after_end: lifecycle::Step) -> bool {
        let member = self.member.as_mut().filter(|member| member.has_way_back());
        match (after_end.action, member) {
            (Action::End(exit @ (Exit::Shutdown | Exit::Reboot)), Some(member)) => {
                member.over = Some(exit);
                member.tell(Notice::of_exit(exit));
                machine.stop();
                self.enter(State::Fenced { ran: false });
                true
            }
            _ => false,
        }
    }

    fn begin_seeding(&mut self, machine: &Machine, to: &StandbyAddress, group: &[MacAddr], reply: Reply<()>) {
        match self.seeding(machine, to, group) {
            Ok(seeding) => {
                if let Some(member) = &mut self.member
                    && let Some(shipping) = &member.shipping
                {
                    member.seeding = true;
                    shipping.enqueue(Work::Seed(Box::new(seeding), reply));
                }
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    fn seeding(&mut self, machine: &Machine, to: &StandbyAddress, group: &[MacAddr]) -> Result<Seeding, Error> {
        if self.member.is_none() {
            return Err(Refusal::NotProtected.into());
        }
        if self.migration.is_some() {
            return Err(Refusal::MigrationUnderWay.into());
        }
        // What speaks against another monitor having the VM speaks against a standby.
        self.decide(Request::Migrate)?;
        let cancel = self.member.as_mut().and_then(|member| member.shipping.as_mut());
        let cancel = cancel.map(|shipping| shipping.next_standby()).unwrap_or_default();
        let context = Context {
            machine,
            spec: &self.spec,
            incarnation: self.incarnation,
            options: &self.options,
            mailbox: &self.mailbox,
        };
        let filling = self.snapshots.filling().clone();
        Seeding::of(&context, filling, group, to, cancel)
    }

    /// Deals with what came of seeding a standby.
    pub(super) fn finish_seeding(&mut self, done: SeedingDone) {
        let SeedingDone { outcome, reply } = done;
        let Some(member) = &mut self.member else {
            return reply.send(Err(Refusal::NotProtected.into()));
        };
        member.seeding = false;
        reply.send(outcome.map(|seeded| member.guard(seeded)));
    }

    /// Begins to prepare `snapshot` of `machine`, of which its notices tell.
    fn prepare_snapshot(&mut self, machine: &Machine, snapshot: &CutSnapshot) -> Result<(), Error> {
        self.decide(Request::Snapshot)?;
        let member = self.member.as_ref().filter(|member| member.guard.is_some());
        let notices = member.ok_or(Refusal::NotProtected)?.notices();
        let context = Context {
            machine,
            spec: &self.spec,
            incarnation: self.incarnation,
            options: &self.options,
            mailbox: &self.mailbox,
        };
        let (id, told) = (snapshot.id, notices.clone());
        // Whoever does not listen any more does not want it either, here and below.
        let prepared = Box::new(move || drop(told.send(Notice::SnapshotPrepared(id))));
        let job = self.snapshots.begin_for_cut(&context, snapshot, prepared)?;
        job.reply_to(Reply::new(move |outcome| {
            let outcome = outcome.map(Box::new).map_err(|error| in_full(&error));
            let _ = notices.send(Notice::SnapshotOver(id, outcome));
        }));
        let path = snapshot.path();
        self.log(EventKind::SnapshotStarted { path });
        Ok(())
    }

    fn guard(&mut self) -> Result<&mut Guard, Refusal> {
        guard_of(&mut self.member)
    }

    /// Holds all that the guest sends, from the first time on.
    fn block(&mut self, machine: &Machine, epoch: u64) -> Result<(), Error> {
        let (soon, _) = self.early_cuts();
        let guard = self.guard()?;
        if guard.output == Output::Open {
            machine.devices.hold_output(&guard.group, epoch, &soon);
        }
        guard.output = Output::Blocked(epoch);
        machine.devices.block_output();
        Ok(())
    }

    /// Takes cut `epoch` of `machine`, which goes on as before.
    pub(super) fn take_cut(&mut self, machine: &Machine, epoch: u64) -> Result<CutReport, Error> {
        let taken = self.try_cut(machine, epoch);
        match &taken {
            Ok(report) => {
                if let Some(member) = &mut self.member {
                    member.last = *report;
                    member.cuts += 1;
                }
            }
            Err(error) => self.log(EventKind::CheckpointFailed {
                epoch,
                reason: error.to_string(),
            }),
        }
        taken
    }

    fn try_cut(&mut self, machine: &Machine, epoch: u64) -> Result<CutReport, Error> {
        let runs = self.state.check_cut()?;
        let mailbox = self.mailbox.clone();
        let (soon, on_thread) = self.early_cuts();
        let guard = guard_of(&mut self.member)?;
        let buffer = {
            let mut cuts = guard.cuts.lock();
            cuts.check_next(epoch)?;
            cuts.buffer()
        };
        let taking = Taking::begin(machine, &guard.changes, buffer)?;
        self.snapshots.before_cut(epoch);
        let at = Instant::now();
        if runs {
            machine.stop();
        }
        let frozen = match mailbox.has_ending() {
            // The guest has come to its end just before: that is dealt with next.
            true => Err(Refusal::Ended.into()),
            false => taking.finish(at, runs),
        };
        let frozen = frozen.and_then(|(buffer, mut frozen)| {
            let begin = Begin {
                soon: &soon,
                on_thread: &on_thread,
            };
            frozen.disks = guard.disks.cut(machine, epoch, &begin)?;
            Ok((buffer, frozen))
        });
        let mut snapshot = None;
        if let Ok((_, frozen)) = &frozen {
            machine.devices.cut_output(epoch + 1);
            snapshot = self.snapshots.keep_at(epoch, machine, &frozen.state);
        }
        if runs {
            machine.run();
        }
        let pause_ns = u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if let Some(kept) = snapshot {
            self.snapshots.go_on(kept, pause_ns);
        }
        let (buffer, frozen) = frozen?;
        let mut cuts = guard.cuts.lock();
        let pages = buffer.seal(cuts.shadow().pages());
        let disk_pages: u64 = frozen.disks.iter().map(|disk| disk.written().len()).sum();
        let report = CutReport {
            pause_ns,
            dirty_pages: pages.len() as u64,
            disk_bytes: disk_pages * PAGE_SIZE,
        };
        cuts.push(epoch, pages, frozen);
        Ok(report)
    }

    /// What is called when a cut is wanted early, and what threads of disks call first.
    fn early_cuts(&self) -> (CheckpointSoon, OnThread) {
        let soon = self
            .member
            .as_ref()
            .map_or_else(|| Arc::new(|| {}) as CheckpointSoon, Member::soon);
        (soon, confined(&self.options, ThreadKind::Disk))
    }

    /// Cut number `cut` counts: frames to members leave, and the standby gets it.
    fn validate(&mut self, machine: &Machine, cut: u64) -> Result<(), Error> {
        let guard = self.guard()?;
        let taken = std::mem::take(&mut guard.cuts.lock().validate(cut)?.taken);
        // The pages are those of the cut from here on.
        taken.into_iter().for_each(|taken| taken.commit());
        guard.disks.validate(cut);
        self.unblock(machine, cut)?;
        self.enqueue(Work::Ship(cut));
        Ok(())
    }

    /// Cut number `cut` does not count.
    fn invalidate(&mut self, machine: &Machine, cut: u64) -> Result<(), Error> {
        let guard = self.guard()?;
        // What the tracker had told of it goes back there.
        let invalid = guard.cuts.lock().invalidate(cut);
        if invalid.is_some() {
            guard.disks.invalidate(machine, cut);
        }
        self.unblock(machine, cut)
    }

    fn unblock(&mut self, machine: &Machine, cut: u64) -> Result<(), Error> {
        let guard = self.guard()?;
        if guard.output == Output::Blocked(cut) {
            guard.output = Output::Held;
            machine.devices.unblock_output();
        }
        Ok(())
    }

    /// All rely on cut number `cut`.
    fn make_permanent(&mut self, machine: &Machine, cut: u64) -> Result<(), Error> {
        let guard = self.guard()?;
        {
            let cuts = guard.cuts.lock();
            if cuts.permanent() >= Some(cut) {
                return Ok(());
            }
            cuts.check_valid(cut)?;
        }
        let is_first = !std::mem::replace(&mut guard.has_way_back, true);
        let (to, cuts) = (guard.to.clone(), guard.cuts.clone());
        machine.devices.release_output(cut);
        machine.devices.make_disk_cut_permanent(cut);
        self.enqueue(Work::Apply(cut, cuts));
        if is_first {
            self.log(EventKind::Protected { to });
        }
        Ok(())
    }

    fn enqueue(&self, work: Work) {
        if let Some(shipping) = self.member.as_ref().and_then(|member| member.shipping.as_ref()) {
            shipping.enqueue(work);
        }
    }

    fn recover(&mut self, machine: &Machine, recovery: Recovery) -> Result<(), Error> {
        if self.member.is_none() {
            return Err(Refusal::NotProtected.into());
        }
        let step = self.state.after_recovery(recovery)?;
        self.carry_out(machine, step);
        Ok(())
    }

    /// The group says that the VM may run.
    fn go_on_recovered(&mut self, machine: &Machine) -> Result<(), Error> {
        if let State::RolledBack { .. } = self.state {
            let frames = machine.devices.drop_input();
            tracing::debug!(
                frames,
                "what was sent to the VM while it stood still at a cut is dropped"
            );
        }
        let before = self.state;
        self.recover(machine, Recovery::GoOn)?;
        if self.state != before {
            machine.devices.announce();
        }
        Ok(())
    }

    /// Protects the VM no more.
    fn leave_protection(&mut self, machine: &Machine) -> Result<(), Error> {
        let member = self.member.as_mut().ok_or(Refusal::NotProtected)?;
        let was_protected = member.guard.take().is_some();
        if let Some(shipping) = &mut member.shipping {
            shipping.leave();
        }
        machine.devices.open_output();
        machine.devices.end_disk_epochs();
        if was_protected {
            self.log(EventKind::Unprotected);
        }
        Ok(())
    }

    /// Nobody speaks for the VM any more. What it has sent stays held: its group may go on without it.
    fn end_protection(&mut self, machine: &Machine) -> Result<(), Error> {
        let was_protected = self.member.take().is_some_and(|member| member.guard.is_some());
        if was_protected {
            let step = self.state.after_recovery(Recovery::Fence)?;
            self.carry_out(machine, step);
        }
        Ok(())
    }

    /// Stops `machine`, and has its memory be what it was at `cut`.
    fn begin_way_back(&mut self, machine: &Machine, cut: u64) -> Result<WayBack, Error> {
        self.guard()?;
        // Whatever comes of it, it does not run on.
        self.recover(machine, Recovery::Fence)?;
        // What it copies would be what the disks go back to.
        self.snapshots.abandon();
        let guard = self.guard()?;
        let mut cuts = guard.cuts.lock();
        let back = cuts.roll_back(cut)?;
        let (state, at, ran) = (back.rest.state.clone(), back.rest.at, back.rest.ran);
        let mut changed = back.pages;
        changed.union(&take_changes(&guard.changes)?);
        let guest = MemoryImage::of(machine.memory());
        copy_pages(&**cuts.shadow(), &guest, &changed)?;
        drop(cuts);
        machine.devices.roll_back_disks(cut)?;
        // Whatever still reads of a cut, the next machine has them.
        machine.devices.let_go()?;
        machine.devices.release_output(cut);
        machine.devices.discard_output();
        self.enqueue(Work::RolledBack(cut));
        let step = self.state.after_recovery(Recovery::RollBack { ran })?;
        self.carry_out(machine, step);
        Ok(WayBack {
            cut,
            state,
            passed_ns: u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX),
        })
    }

    /// Builds the VM again with the `memory` that it had, which is that of the cut already, and answers. There is nothing
    /// left of the machine before.
    pub(super) fn go_back(&mut self, memory: GuestMemory, back: &WayBack, reply: Reply<()>) -> Result<Machine, Error> {
        let again = self.build_again(memory, back);
        reply.send(match &again {
            Ok(_) => Ok(()),
            Err(error) => {
                self.end_member(Notice::GuestFailed(error.to_string()));
                Err(Refusal::Ended.into())
            }
        });
        again
    }

    fn build_again(&mut self, memory: GuestMemory, back: &WayBack) -> Result<Machine, Error> {
        self.mailbox.forget_ending();
        self.rate_meter = None;
        self.snapshots = Snapshots::default();
        let reserved = Reserved::create(&self.spec, memory, DiskLocks::Taken, &self.options, &self.mailbox)?;
        // KVM writes to memory as the state is loaded.
        let changes = reserved.tracker().register(Baseline::Now)?;
        let machine = reserved.load(&back.state, back.passed_ns)?;
        let (soon, on_thread) = self.early_cuts();
        if let Some(member) = &mut self.member {
            // It is not at its end yet.
            member.over = None;
        }
        let guard = self.guard()?;
        guard.changes = changes;
        guard.output = Output::Held;
        machine.devices.hold_output(&guard.group, back.cut + 1, &soon);
        let begin = Begin {
            soon: &soon,
            on_thread: &on_thread,
        };
        guard.disks.begin_again(&machine, back.cut, &begin)?;
        self.log(EventKind::RolledBack { cut: back.cut });
        Ok(machine)
    }

    /// How the protection of the VM does.
    pub(super) fn protection_status(&self, machine: &Machine) -> Option<MemberStatus> {
        let member = self.member.as_ref()?;
        let snapshot = self.snapshots.progress().unwrap_or_default();
        Some(member.status(machine.devices.held_output(), snapshot))
    }
}

fn guard_of(member: &mut Option<Member>) -> Result<&mut Guard, Refusal> {
    let guard = member.as_mut().and_then(|member| member.guard.as_mut());
    guard.ok_or(Refusal::NotProtected)
}
