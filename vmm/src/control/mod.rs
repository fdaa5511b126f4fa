//! How everyone else asks the state driver for something.
//!
//! ```text
//!  Controller::pause() … ─┐                           ┌─► lifecycle: accepted, or refused with the reason
//!  Controller::submit(…) ─┴─► Command ── mailbox ──► state driver ── carries it out ──► Reply ──► whoever asked
//! ```
//! A command carries what it needs and the way its answer takes; every command is answered exactly once.

mod mailbox;

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use cutover_devices::virtio::balloon::Statistics as BalloonStatistics;
use cutover_snapshot::spec::MacAddr;

use crate::Error;
use crate::device_manager::{BalloonUpdate, DiskUpdate, NetUpdate};
use crate::dirty::DirtyRate;
use crate::lifecycle::{Refusal, Request, State};
use crate::migration::{MigrateRequest, MigrationProgress, MigrationReport};
use crate::protection::{CutReport, MemberStatus, Notice, Step};
use crate::snapshot::{SnapshotProgress, SnapshotReport, SnapshotRequest};
use crate::stats::VmStats;

pub use mailbox::COMMANDS_MAX;
pub(crate) use mailbox::{Ending, JobStep, Mailbox, Message};

/// What can be asked of the state driver.
pub enum Command {
    /// Something that the VM's state may change by.
    Lifecycle(Request, Reply<()>),
    /// What the VM is doing.
    State(Reply<State>),
    /// What it has done so far.
    Stats(Reply<VmStats>),
    /// How fast its guest changes memory.
    DirtyRate(Reply<DirtyRate>),
    /// Other limits or another file for a disk.
    UpdateDisk {
        /// Which, by the id that its [spec](cutover_snapshot::spec::DiskSpec::id_at) gives it.
        id: String,
        /// What is to be changed.
        update: DiskUpdate,
        /// Where the answer goes.
        reply: Reply<()>,
    },
    /// Other limits for a network interface.
    UpdateNet {
        /// Which, by the id that its [spec](cutover_snapshot::spec::NetSpec::id_at) gives it.
        id: String,
        /// What is to be changed.
        update: NetUpdate,
        /// Where the answer goes.
        reply: Reply<()>,
    },
    /// Another amount of memory, or another interval, for the balloon.
    UpdateBalloon {
        /// What is to be changed.
        update: BalloonUpdate,
        /// Where the answer goes.
        reply: Reply<()>,
    },
    /// How the balloon does.
    BalloonStatistics(Reply<BalloonStatistics>),
    /// A snapshot.
    Snapshot {
        /// Which.
        request: SnapshotRequest,
        /// Where the answer goes, once the snapshot is permanent or there is nothing of it.
        reply: Reply<SnapshotReport>,
    },
    /// How far the snapshot has come that is being made.
    SnapshotProgress(Reply<Option<SnapshotProgress>>),
    /// That no more be made of it.
    CancelSnapshot(Reply<()>),
    /// How much of memory and disks is there, after a restore.
    RestoreProgress(Reply<SnapshotProgress>),
    /// A migration.
    Migrate {
        /// Where to, and how.
        request: MigrateRequest,
        /// Where the answer goes, once the VM is another monitor's or nothing came of it.
        reply: Reply<MigrationReport>,
    },
    /// How far the migration has come that is under way.
    MigrationProgress(Reply<Option<MigrationProgress>>),
    /// That nothing more be done for it.
    CancelMigration(Reply<()>),
    /// That somebody can protect it.
    Protect {
        /// Where it goes what the VM tells by itself.
        notices: Sender<Notice>,
        /// Where the answer goes: the addresses of its network interfaces.
        reply: Reply<Vec<MacAddr>>,
    },
    /// A step of its protection.
    Protection(Step, Reply<()>),
    /// A cut.
    TakeCut {
        /// Its number.
        epoch: u64,
        /// Where the answer goes.
        reply: Reply<CutReport>,
    },
    /// How its protection does.
    ProtectionStatus(Reply<MemberStatus>),
}

/// The way of an answer to whoever asked. It is called on the state driver's thread (a refusal perhaps on the thread
/// that asks), and must not wait.
pub struct Reply<T>(Box<dyn FnOnce(Result<T, Error>) + Send>);

impl<T> Reply<T> {
    /// Answers by calling `answer`.
    pub fn new(answer: impl FnOnce(Result<T, Error>) + Send + 'static) -> Self {
        Self(Box::new(answer))
    }

    /// Answers.
    pub fn send(self, result: Result<T, Error>) {
        (self.0)(result);
    }
}

impl Command {
    /// Answers that nothing comes of it.
    pub fn refuse(self, refusal: Refusal) {
        match self {
            Self::Lifecycle(_, reply)
            | Self::UpdateDisk { reply, .. }
            | Self::UpdateNet { reply, .. }
            | Self::UpdateBalloon { reply, .. }
            | Self::CancelSnapshot(reply)
            | Self::CancelMigration(reply)
            | Self::Protection(_, reply) => reply.send(Err(refusal.into())),
            Self::Protect { reply, .. } => reply.send(Err(refusal.into())),
            Self::TakeCut { reply, .. } => reply.send(Err(refusal.into())),
            Self::ProtectionStatus(reply) => reply.send(Err(refusal.into())),
            Self::Migrate { reply, .. } => reply.send(Err(refusal.into())),
            Self::MigrationProgress(reply) => reply.send(Err(refusal.into())),
            Self::Snapshot { reply, .. } => reply.send(Err(refusal.into())),
            Self::SnapshotProgress(reply) => reply.send(Err(refusal.into())),
            Self::RestoreProgress(reply) => reply.send(Err(refusal.into())),
            Self::State(reply) => reply.send(Err(refusal.into())),
            Self::Stats(reply) => reply.send(Err(refusal.into())),
            Self::BalloonStatistics(reply) => reply.send(Err(refusal.into())),
            Self::DirtyRate(reply) => reply.send(Err(refusal.into())),
        }
    }
}

/// Asks things of a VM, from any thread; clones ask the same VM, which stays the same when it is rebooted.
///
/// Every method fails with [`Error::Refused`] if the VM's state does not allow it, and then the VM is as before.
#[derive(Clone)]
pub struct Controller {
    mailbox: Arc<Mailbox>,
}

impl Controller {
    pub(crate) fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { mailbox }
    }

    /// Asks without waiting, where the command has the way of its answer already.
    pub fn send(&self, command: Command) {
        self.mailbox.submit(command);
    }

    /// Asks without waiting; `answer` is called with what came of it.
    ///
    /// ```no_run
    /// # fn example(vm: cutover_vmm::Controller) {
    /// use cutover_vmm::{Command, Request};
    ///
    /// vm.submit(Command::Stats, |stats| println!("{stats:?}"));
    /// vm.submit(|reply| Command::Lifecycle(Request::Pause, reply), |paused| println!("{paused:?}"));
    /// # }
    /// ```
    pub fn submit<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
        answer: impl FnOnce(Result<T, Error>) + Send + 'static,
    ) {
        self.send(command(Reply::new(answer)));
    }

    /// Asks and waits for the answer.
    pub(crate) fn ask<T: Send + 'static>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (answer, answered) = channel();
        self.submit(command, move |result| {
            // Received below, whatever it is.
            let _ = answer.send(result);
        });
        answered.recv().unwrap_or(Err(Refusal::Ended.into()))
    }

    fn request(&self, request: Request) -> Result<(), Error> {
        self.ask(|reply| Command::Lifecycle(request, reply))
    }

    /// Stops the guest; on return nothing changes its memory.
    ///
    /// # Errors
    /// The guest does not run.
    pub fn pause(&self) -> Result<(), Error> {
        self.request(Request::Pause)
    }

    /// Lets a paused guest go on.
    ///
    /// # Errors
    /// The guest is not paused.
    pub fn resume(&self) -> Result<(), Error> {
        self.request(Request::Resume)
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// The guest does not run.
    pub fn press_power_button(&self) -> Result<(), Error> {
        self.request(Request::PressPowerButton)
    }

    /// Has the guest power down, and the VM end: by force if the guest has not ended after `timeout`. Returns when that
    /// has begun.
    ///
    /// # Errors
    /// The guest does not run, or is shutting down already.
    pub fn shutdown(&self, timeout: Duration) -> Result<(), Error> {
        self.request(Request::Shutdown { timeout })
    }

    /// Has the guest power down, by force after `timeout`, then builds the VM anew and runs it. Returns when that has
    /// begun.
    ///
    /// # Errors
    /// The guest does not run, is shutting down already, or the VM is not [managed](crate::Options::managed).
    pub fn reboot(&self, timeout: Duration) -> Result<(), Error> {
        self.request(Request::Reboot { timeout })
    }

    /// Destroys the VM, builds it anew and runs it. Returns when that has begun.
    ///
    /// # Errors
    /// The guest is shutting down, or the VM is not [managed](crate::Options::managed).
    pub fn cycle(&self) -> Result<(), Error> {
        self.request(Request::Cycle)
    }

    /// Ends the VM by force.
    ///
    /// # Errors
    /// It has ended already.
    pub fn destroy(&self) -> Result<(), Error> {
        self.request(Request::Destroy)
    }

    /// Changes what is behind the disk called `id`, or its limits.
    ///
    /// # Errors
    /// There is no such disk, the file cannot be used, or the VM is not [managed](crate::Options::managed).
    pub fn update_disk(&self, id: String, update: DiskUpdate) -> Result<(), Error> {
        self.ask(|reply| Command::UpdateDisk { id, update, reply })
    }

    /// Changes the limits of the network interface called `id`.
    ///
    /// # Errors
    /// There is no such interface, or the VM is not [managed](crate::Options::managed).
    pub fn update_net(&self, id: String, update: NetUpdate) -> Result<(), Error> {
        self.ask(|reply| Command::UpdateNet { id, update, reply })
    }

    /// Changes what the balloon is asked for.
    ///
    /// # Errors
    /// There is no balloon, the guest has less memory than that, statistics would be switched on or off, or the VM is not
    /// [managed](crate::Options::managed).
    pub fn update_balloon(&self, update: BalloonUpdate) -> Result<(), Error> {
        self.ask(|reply| Command::UpdateBalloon { update, reply })
    }

    /// How the balloon does.
    ///
    /// # Errors
    /// There is none, or the VM has ended.
    pub fn balloon_statistics(&self) -> Result<BalloonStatistics, Error> {
        self.ask(Command::BalloonStatistics)
    }

    /// Makes a snapshot while the guest goes on; returns when it is permanent.
    ///
    /// # Errors
    /// Another is being made, there is nothing to build an incremental one on, it cannot be written, or it was
    /// cancelled: there is nothing of it then, and the next incremental one has what it would have had. The VM is not
    /// [managed](crate::Options::managed).
    pub fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport, Error> {
        self.ask(|reply| Command::Snapshot { request, reply })
    }

    /// How far the snapshot has come that is being made, if there is one.
    ///
    /// # Errors
    /// The VM has ended.
    pub fn snapshot_progress(&self) -> Result<Option<SnapshotProgress>, Error> {
        self.ask(Command::SnapshotProgress)
    }

    /// Has the snapshot that is being made be given up; whoever asked for it is told when it is.
    ///
    /// # Errors
    /// None is being made.
    pub fn cancel_snapshot(&self) -> Result<(), Error> {
        self.ask(Command::CancelSnapshot)
    }

    /// How much of memory and disks is there that come from a snapshot; all of nothing if they do not.
    ///
    /// # Errors
    /// The VM has ended.
    pub fn restore_progress(&self) -> Result<SnapshotProgress, Error> {
        self.ask(Command::RestoreProgress)
    }

    /// Moves the VM to another monitor while its guest goes on; returns when it is that one's. This one ends then.
    ///
    /// # Errors
    /// Another migration is under way, the destination cannot take the VM, the link broke, or it was cancelled: the VM
    /// goes on here, as before. The VM is not [managed](crate::Options::managed). Or the answer to its being handed over
    /// never came: it is [handed over](State::HandedOver) then, and goes on here only when it is [reclaimed](Self::reclaim).
    pub fn migrate(&self, request: MigrateRequest) -> Result<MigrationReport, Error> {
        self.ask(|reply| Command::Migrate { request, reply })
    }

    /// How far the migration has come that is under way, if there is one.
    ///
    /// # Errors
    /// The VM has ended.
    pub fn migration_progress(&self) -> Result<Option<MigrationProgress>, Error> {
        self.ask(Command::MigrationProgress)
    }

    /// Has the migration that is under way be given up; whoever asked for it is told when it is.
    ///
    /// # Errors
    /// There is none, or the VM is handed over already.
    pub fn cancel_migration(&self) -> Result<(), Error> {
        self.ask(Command::CancelMigration)
    }

    /// Has a VM back that was handed over to another monitor of which nothing was heard since; it is paused then. Whoever
    /// asks has made certain that it does not run there: two of it would ruin its disks.
    ///
    /// # Errors
    /// The VM has not been handed over.
    pub fn reclaim(&self) -> Result<(), Error> {
        self.request(Request::Reclaim)
    }

    /// What the VM is doing.
    ///
    /// # Errors
    /// It has ended.
    pub fn state(&self) -> Result<State, Error> {
        self.ask(Command::State)
    }

    /// How fast the guest has changed memory since this was last asked, in no time if nobody has for a while: the guest
    /// is slower while it is watched, so that is done only for as long as somebody keeps asking.
    ///
    /// # Errors
    /// The VM has ended, or KVM does not tell.
    pub fn dirty_rate(&self) -> Result<DirtyRate, Error> {
        self.ask(Command::DirtyRate)
    }

    /// What the VM has done so far. Takes time in proportion to guest memory, to see what of it is resident.
    ///
    /// # Errors
    /// It has ended.
    pub fn stats(&self) -> Result<VmStats, Error> {
        self.ask(Command::Stats)
    }
}
