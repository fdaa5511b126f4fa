//! The state driver: the one thread that owns the VM and makes every lifecycle decision (DESIGN invariant 1).
//!
//! ```text
//!  Controller ── Command ─┐              ┌─ lifecycle: what to do, in which state that ends ─┐
//!  vCPUs, devices ─ end ──┼─► mailbox ──►│                                                   ├─► Machine
//!  the time ── deadline ──┘              └─ events: what happened, for those who watch ──────┘
//! ```
//! A reboot or cycle tears the [`Machine`] down and builds the next one of the same spec; for everyone else the VM stays
//! the same.

mod migration;
mod protection;

use std::ffi::CString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_devices::mmds::Metadata;
use cutover_devices::virtio::net::random_mac;
use cutover_snapshot::spec::VmSpec;

use crate::control::{Command, Controller, Ending, JobStep, Mailbox, Message, Reply};
use crate::device_manager::{BalloonUpdate, DiskUpdate, NetUpdate};
use crate::dirty::{DirtyLog, DirtyRate, RateMeter};
use crate::events::{EventKind, EventLog};
use crate::job::Context;
use crate::lifecycle::{Action, Exit, Refusal, Request, State, Step};
use crate::machine::Machine;
use crate::migration::{Migration, MigrationStatus, ReceiveRequest};
use crate::page_fault::Arriving;
use crate::protection::{Member, WayBack};
use crate::seccomp::{self, ThreadKind};
use crate::snapshot::{self, RestoreRequest, Restored, SnapshotReport, SnapshotRequest, Snapshots};
use crate::stats::VmStats;
use crate::{Error, program_text};

/// How to run, apart from what the guest sees.
#[derive(Clone)]
pub struct Options {
    /// Confine every thread to the system calls it needs.
    pub seccomp: bool,
    /// Let the VM be rebooted and cycled, and its disks be changed, which takes a state driver that may open files.
    pub managed: bool,
    /// How it is noticed what the guest writes.
    pub dirty_log: DirtyLog,
    /// Where it is written what happens.
    pub events: EventLog,
    /// What the VM's metadata service tells, if it has one.
    pub metadata: Arc<Metadata>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seccomp: true,
            managed: false,
            dirty_log: DirtyLog::default(),
            events: EventLog::default(),
            metadata: Arc::default(),
        }
    }
}

/// A VM, built and owned by whoever will be its state driver.
pub struct Vmm {
    machine: Machine,
    driver: Driver,
}

/// What outlives a [`Machine`].
struct Driver {
    spec: VmSpec,
    options: Options,
    mailbox: Arc<Mailbox>,
    state: State,
    /// How many monitors have had the VM before this one.
    incarnation: u64,
    /// Machines built so far.
    boots: u64,
    /// When the present machine first ran.
    running_since: Option<Instant>,
    /// How fast its memory changes, while somebody asks.
    rate_meter: Option<RateMeter>,
    /// Snapshots of the present machine.
    snapshots: Snapshots,
    /// Its migration, if there is one.
    migration: Option<Migration>,
    /// Whoever speaks for it in a group, if somebody does.
    member: Option<Member>,
    /// Leave it as it is, rather than have it run first of all.
    as_it_is: bool,
    /// When the process lets go of what only its start took.
    settles_at: Option<Instant>,
}

/// How long a guest has the processor to itself before its monitor [settles](program_text::release).
const SETTLING: Duration = Duration::from_millis(250);

/// Told what the VM has done when it ends.
type LastStats = Box<dyn FnOnce(VmStats)>;

/// What becomes of a machine.
enum Outcome {
    /// It is the last.
    Exit(Exit),
    /// Another takes its place.
    BuildAnew,
    /// It is built again as it was at a cut; whoever asked for it waits.
    GoBack(Box<WayBack>, Reply<()>),
}

impl Vmm {
    /// Builds the VM of `spec`: memory, devices, boot image, vCPUs, everything but running it.
    ///
    /// # Errors
    /// The spec is wrong, a file is missing or of the wrong kind, or the host lacks something. Nothing is left behind.
    pub fn build(spec: &VmSpec, options: &Options) -> Result<Self, Error> {
        let mut spec = spec.clone();
        // Made up here, so that the guest still knows its network interfaces when it is built anew.
        for net in spec.nets.iter_mut().filter(|net| net.mac.is_none()) {
            net.mac = Some(random_mac()?);
        }
        let mailbox = Arc::<Mailbox>::default();
        let machine = Machine::build(&spec, options, &mailbox)?;
        Ok(Self {
            machine,
            driver: Driver::new(spec, options, mailbox),
        })
    }

    /// Makes a VM of a snapshot, everything but running it. Its guest does not notice, but for the time, a new generation
    /// id, and what `request` has different.
    ///
    /// # Errors
    /// The snapshot is damaged or of another version, the host's CPU lacks something the guest has seen, or what
    /// [`build`](Self::build) can fail of. Nothing is left behind but disks that were created.
    pub fn restore(request: &RestoreRequest, options: &Options) -> Result<Self, Error> {
        let mailbox = Arc::<Mailbox>::default();
        let Restored {
            spec,
            machine,
            snapshots,
        } = snapshot::restore(request, options, &mailbox)?;
        let mut driver = Driver::new(spec, options, mailbox);
        driver.state = State::Paused;
        driver.snapshots = snapshots;
        driver.as_it_is = request.paused;
        Ok(Self { machine, driver })
    }

    /// Waits for a VM that another monitor moves here, and returns when it runs: before the calling thread becomes its state
    /// driver, and without it. `admit` is asked about the VM before anything of it is built; `status` tells how far it has
    /// come, and cancels.
    ///
    /// # Errors
    /// It cannot be listened there, nobody waits any more, the VM cannot run here, or its source gave it up: nothing is
    /// left of it here then, and it goes on there.
    pub fn receive(
        request: &ReceiveRequest,
        options: &Options,
        status: &Arc<MigrationStatus>,
        admit: &mut dyn FnMut(&VmSpec) -> Result<(), String>,
    ) -> Result<Self, Error> {
        crate::migration::receive(request, options, status, admit)
    }

    /// The VM of `spec` that has come from another monitor: `machine`, which [runs](Machine::run) already or is to stay
    /// paused, with what is still `arriving` of its memory. Its end is reported to `mailbox`.
    pub(crate) fn arrived(
        spec: VmSpec,
        machine: Machine,
        incarnation: u64,
        runs: bool,
        arriving: Option<Arc<Arriving>>,
        options: &Options,
        mailbox: Arc<Mailbox>,
    ) -> Self {
        let mut driver = Driver::new(spec, options, mailbox);
        driver.incarnation = incarnation;
        driver.as_it_is = true;
        driver.snapshots = Snapshots::of_arrived(arriving);
        driver.running_since = runs.then(Instant::now);
        driver.enter(if runs { State::Running } else { State::Paused });
        driver.log(EventKind::Migrated);
        Self { machine, driver }
    }

    /// What the VM is.
    pub fn spec(&self) -> &VmSpec {
        &self.driver.spec
    }

    /// A way for other threads to ask things of this VM.
    pub fn controller(&self) -> Controller {
        Controller::new(self.driver.mailbox.clone())
    }

    /// Runs the VM to its end; the calling thread is its state driver.
    ///
    /// # Errors
    /// The monitor, not the guest, could not go on.
    pub fn run(self) -> Result<Exit, Error> {
        self.run_then(None)
    }

    /// As [`run`](Self::run), and has `last` told what the VM has done when it ends in order: the last moment at which
    /// that can be told. For [managed](Options::managed) VMs, others are confined to less than counting takes.
    ///
    /// # Errors
    /// The monitor, not the guest, could not go on.
    pub fn run_counted(self, last: impl FnOnce(VmStats) + 'static) -> Result<Exit, Error> {
        self.run_then(Some(Box::new(last)))
    }

    fn run_then(self, last: Option<LastStats>) -> Result<Exit, Error> {
        let Self { machine, mut driver } = self;
        if let Some(name) = &driver.spec.name {
            show_name(name);
        }
        if driver.options.seccomp {
            seccomp::confine(if driver.options.managed {
                ThreadKind::Supervisor
            } else {
                ThreadKind::StateDriver
            })?;
        }
        let exit = driver.run(machine, last);
        driver.enter(State::Ended);
        driver.log(match &exit {
            Ok(exit) => EventKind::VmEnded { exit: *exit },
            Err(error) => EventKind::VmFailed {
                reason: error.to_string(),
            },
        });
        exit
    }
}

/// Has tools such as top(1) show whose process this is; they show 15 bytes.
fn show_name(name: &str) {
    if let Ok(title) = CString::new(format!("cutover:{name}")) {
        // Nothing depends on it.
        let _ = rustix::thread::set_name(&title);
    }
}

impl Driver {
    fn new(spec: VmSpec, options: &Options, mailbox: Arc<Mailbox>) -> Self {
        Self {
            spec,
            options: options.clone(),
            mailbox,
            state: State::Built,
            incarnation: 0,
            boots: 1,
            running_since: None,
            rate_meter: None,
            snapshots: Snapshots::default(),
            migration: None,
            member: None,
            as_it_is: false,
            settles_at: None,
        }
    }

    /// Runs `machine` and those that take its place; on return, the last is torn down.
    fn run(&mut self, mut machine: Machine, last: Option<LastStats>) -> Result<Exit, Error> {
        self.settles_at = Some(Instant::now() + SETTLING);
        loop {
            if !std::mem::take(&mut self.as_it_is) {
                self.request(&machine, Request::Resume)?;
            }
            let outcome = self.drive(&machine);
            self.migration = None;
            if let Ok(Outcome::Exit(Exit::Migrated)) = outcome
                && let Some(over) = self.snapshots.complete()
            {
                self.log(over);
            }
            self.snapshots.abandon();
            self.tell_end(&outcome);
            let outcome = outcome?;
            if !matches!(outcome, Outcome::Exit(Exit::Ended)) {
                // What the guest has written to a disk that is not complete would be lost.
                self.snapshots.wait_for_disks();
            }
            match outcome {
                Outcome::Exit(exit) => {
                    if let (Some(last), Ok(stats)) = (last, self.stats(&machine)) {
                        last(stats);
                    }
                    return Ok(exit);
                }
                Outcome::BuildAnew => {
                    drop(machine);
                    machine = self.build_anew()?;
                }
                Outcome::GoBack(back, reply) => {
                    let memory = machine.memory().clone();
                    drop(machine);
                    machine = self.go_back(memory, &back, reply)?;
                    self.as_it_is = true;
                }
            }
        }
    }

    /// Builds the next machine, once there is nothing left of the one before.
    fn build_anew(&mut self) -> Result<Machine, Error> {
        self.mailbox.forget_ending();
        self.running_since = None;
        self.rate_meter = None;
        self.snapshots = Snapshots::default();
        let machine = Machine::build(&self.spec, &self.options, &self.mailbox)?;
        self.boots += 1;
        tracing::info!(name = self.spec.name, boots = self.boots, "the VM has been built anew");
        Ok(machine)
    }

    /// Serves everyone until something has to become of `machine`.
    fn drive(&mut self, machine: &Machine) -> Result<Outcome, Error> {
        loop {
            let outcome = match self.mailbox.receive(self.deadline()) {
                Message::Ended(Ending::VcpuFailed { cpu, reason }) => return Err(Error::Vcpu { cpu, reason }),
                Message::Ended(Ending::Guest(end)) => {
                    self.log(end.into());
                    let step = self.state.after_guest_end(end);
                    match self.puts_off(machine, step) {
                        true => None,
                        false => self.carry_out(machine, step),
                    }
                }
                Message::DeadlinePassed => self.pass_deadline(machine, Instant::now()),
                Message::Job(JobStep::Snapshot(step)) => {
                    self.advance_snapshot(machine, step);
                    None
                }
                Message::Job(JobStep::Migration(step)) => self.advance_migration(machine, step),
                Message::Job(JobStep::Protection(done)) => {
                    self.finish_seeding(done);
                    None
                }
                Message::Command(command) => self.serve(machine, command),
            };
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
        }
    }

    /// When something is to be done even if nothing happens.
    fn deadline(&self) -> Option<Instant> {
        let meter = self.rate_meter.as_ref().map(RateMeter::expiry);
        let deadlines = [self.state.deadline(), meter, self.settles_at];
        deadlines.into_iter().flatten().min()
    }

    /// Does what is to be done at `now`.
    fn pass_deadline(&mut self, machine: &Machine, now: Instant) -> Option<Outcome> {
        self.rate_meter.take_if(|meter| meter.expiry() <= now);
        if self.settles_at.take_if(|at| *at <= now).is_some() {
            program_text::release();
        }
        let step = self.state.after_deadline(now)?;
        tracing::warn!(state = %self.state, "the guest has not ended in time, and is ended by force");
        self.log(EventKind::OperationForced { state: self.state });
        self.carry_out(machine, step)
    }

    /// Does what `command` says, or not, and answers.
    fn serve(&mut self, machine: &Machine, command: Command) -> Option<Outcome> {
        match command {
            Command::Lifecycle(Request::Reclaim, reply) => reply.send(self.reclaim(machine)),
            Command::Lifecycle(request, reply) => match self.request(machine, request) {
                Ok(outcome) => {
                    reply.send(Ok(()));
                    return outcome;
                }
                Err(refusal) => reply.send(Err(refusal.into())),
            },
            Command::State(reply) => reply.send(Ok(self.state)),
            Command::Stats(reply) => reply.send(self.stats(machine)),
            Command::DirtyRate(reply) => reply.send(self.dirty_rate(machine)),
            Command::UpdateDisk { id, update, reply } => reply.send(self.update_disk(machine, id, &update)),
            Command::UpdateNet { id, update, reply } => reply.send(self.update_net(machine, id, &update)),
            Command::UpdateBalloon { update, reply } => reply.send(self.update_balloon(machine, &update)),
            Command::BalloonStatistics(reply) => reply.send(machine.devices.balloon_statistics()),
            Command::Snapshot { request, reply } => self.begin_snapshot(machine, request, reply),
            Command::SnapshotProgress(reply) => reply.send(Ok(self.snapshots.progress())),
            Command::CancelSnapshot(reply) => reply.send(self.snapshots.cancel().map_err(Error::from)),
            Command::RestoreProgress(reply) => reply.send(Ok(self.snapshots.restore_progress())),
            Command::Migrate { request, reply } => self.begin_migration(machine, request, reply),
            Command::MigrationProgress(reply) => reply.send(Ok(self.migration.as_ref().map(Migration::progress))),
            Command::CancelMigration(reply) => reply.send(self.cancel_migration().map_err(Error::from)),
            Command::Protect { notices, reply } => reply.send(self.protect(machine, notices)),
            Command::Protection(step, reply) => return self.protection_step(machine, step, reply),
            Command::TakeCut { epoch, reply } => reply.send(self.take_cut(machine, epoch)),
            Command::ProtectionStatus(reply) => {
                reply.send(self.protection_status(machine).ok_or(Refusal::NotProtected.into()));
            }
        }
        None
    }

    /// Carries `request` out if it is accepted.
    fn request(&mut self, machine: &Machine, request: Request) -> Result<Option<Outcome>, Refusal> {
        let step = self.decide(request)?;
        if request.is_power_operation() {
            let operation = request.name();
            self.log(EventKind::OperationRequested { operation });
        }
        Ok(self.carry_out(machine, step))
    }

    fn decide(&self, request: Request) -> Result<Step, Refusal> {
        let step = self.state.after(request, Instant::now())?;
        if request.opens_files() && !self.options.managed {
            return Err(Refusal::Confined);
        }
        if request.ends_protection() && self.is_protected() {
            return Err(Refusal::Protected);
        }
        Ok(step)
    }

    fn carry_out(&mut self, machine: &Machine, step: Step) -> Option<Outcome> {
        let outcome = match step.action {
            Action::Nothing => None,
            Action::Run => {
                machine.run();
                self.running_since.get_or_insert_with(Instant::now);
                None
            }
            Action::Stop => {
                machine.stop();
                None
            }
            Action::PressPowerButton => {
                machine.devices.press_power_button();
                None
            }
            Action::BuildAnew => Some(Outcome::BuildAnew),
            Action::End(exit) => Some(Outcome::Exit(exit)),
        };
        self.enter(step.next);
        outcome
    }

    fn enter(&mut self, state: State) {
        if state != self.state {
            self.state = state;
            self.log(EventKind::VmState { state });
        }
    }

    fn stats(&self, machine: &Machine) -> Result<VmStats, Error> {
        let uptime = self.running_since.map_or(Duration::ZERO, |since| since.elapsed());
        Ok(VmStats {
            state: self.state,
            boots: self.boots,
            uptime_ns: u64::try_from(uptime.as_nanos()).unwrap_or(u64::MAX),
            vcpus: machine.vcpu_stats(),
            memory: machine.memory_stats()?,
            devices: machine.devices.stats(),
            protection: self.protection_status(machine),
        })
    }

    /// How fast `machine` has changed its memory since somebody asked. The first to ask has it watched.
    fn dirty_rate(&mut self, machine: &Machine) -> Result<DirtyRate, Error> {
        let now = Instant::now();
        if let Some(meter) = &mut self.rate_meter {
            return meter.sample(now);
        }
        self.rate_meter = Some(RateMeter::start(&machine.tracker, now)?);
        Ok(DirtyRate::default())
    }

    /// Whether what is behind a device may be changed: not while the VM moves, as the destination has built it as it was.
    fn accept_update(&self) -> Result<(), Refusal> {
        self.decide(Request::UpdateDevice)?;
        match self.migration {
            Some(_) => Err(Refusal::MigrationUnderWay),
            None => Ok(()),
        }
    }

    /// Changes a disk of `machine`, and of those that will take its place.
    fn update_disk(&mut self, machine: &Machine, id: String, update: &DiskUpdate) -> Result<(), Error> {
        self.accept_update()?;
        let mut spec = self.spec.clone();
        let mut disks = spec.disks.iter_mut().enumerate();
        if let Some((_, disk)) = disks.find(|(index, disk)| disk.id_at(*index) == id) {
            disk.path = update.path.clone().unwrap_or_else(|| disk.path.clone());
            disk.rate_limiter = disk.rate_limiter.updated(update.rate_limiter.unwrap_or_default());
        }
        spec.check()?;
        machine.devices.update_disk(&id, update)?;
        self.spec = spec;
        self.log(EventKind::DriveUpdated { drive: id });
        Ok(())
    }

    /// Changes a network interface of `machine`, and of those that will take its place.
    fn update_net(&mut self, machine: &Machine, id: String, update: &NetUpdate) -> Result<(), Error> {
        self.accept_update()?;
        machine.devices.update_net(&id, update)?;
        let mut nets = self.spec.nets.iter_mut().enumerate();
        if let Some((_, net)) = nets.find(|(index, net)| net.id_at(*index) == id) {
            net.rx_rate_limiter = net.rx_rate_limiter.updated(update.rx_rate_limiter.unwrap_or_default());
            net.tx_rate_limiter = net.tx_rate_limiter.updated(update.tx_rate_limiter.unwrap_or_default());
        }
        self.log(EventKind::NetworkInterfaceUpdated { interface: id });
        Ok(())
    }

    /// Changes what is asked of the balloon of `machine`, and of those that will take its place.
    fn update_balloon(&mut self, machine: &Machine, update: &BalloonUpdate) -> Result<(), Error> {
        self.accept_update()?;
        let mut spec = self.spec.clone();
        let balloon = spec.balloon.as_mut().ok_or(Error::NoBalloon)?;
        let before = balloon.stats_interval_s;
        update.apply(balloon);
        if (before == 0) != (balloon.stats_interval_s == 0) {
            return Err(Error::BalloonStatistics(before));
        }
        let after = *balloon;
        spec.check()?;
        machine.devices.update_balloon(&after, update)?;
        self.spec = spec;
        self.log(EventKind::BalloonUpdated);
        Ok(())
    }

    /// Begins a snapshot of `machine`; what comes of it goes to `reply`.
    fn begin_snapshot(&mut self, machine: &Machine, request: SnapshotRequest, reply: Reply<SnapshotReport>) {
        let path = request.target.path();
        let accepted = match self.migration {
            // Disks are copied behind the guest, which may go on elsewhere meanwhile.
            Some(_) if request.copies_disks_of(&self.spec) => Err(Refusal::MigrationUnderWay),
            None if request.copies_disks_of(&self.spec) && self.is_protected() => Err(Refusal::Protected),
            _ => self.decide(Request::Snapshot),
        };
        let accepted = accepted.map_err(Error::from);
        let context = Context {
            machine,
            spec: &self.spec,
            incarnation: self.incarnation,
            options: &self.options,
            mailbox: &self.mailbox,
        };
        match accepted.and_then(|_| self.snapshots.begin(&context, request)) {
            Ok(job) => {
                job.reply_to(reply);
                self.log(EventKind::SnapshotStarted { path });
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    /// Does what the snapshot of `machine` that is being made needs next.
    fn advance_snapshot(&mut self, machine: &Machine, step: snapshot::Step) {
        let runs = matches!(self.state, State::Running | State::ShuttingDown { .. });
        if let Some(over) = self.snapshots.advance(step, machine, runs) {
            self.log(over);
        }
    }

    fn log(&self, kind: EventKind) {
        self.options.events.push(kind);
    }
}

impl Drop for Driver {
    /// Nobody waits for an answer that cannot come any more.
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

#[cfg(test)]
mod tests;
