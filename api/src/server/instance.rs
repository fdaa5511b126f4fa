//! The VM as the server knows it: being configured, being started, or started; and the way to those who own it.
//!
//! ```text
//!  handlers ── configure ──────► Setup (pure)
//!           ── start, restore ─► Builder, on the main thread ──► Plan::build ──► the way to the VM
//!           ── ask ────────────► the state driver, by that way ──► Reply ──► handler
//! ```
//! What follows from an answer, such as the new path of a drive, is noted down by whoever answers, not by the handler:
//! its client may have gone away meanwhile. What it asked for is done all the same.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use axum::http::StatusCode;
use cutover_devices::mmds::Metadata;
use cutover_devices::virtio::balloon::Statistics;
use cutover_snapshot::spec::VmSpec;
use cutover_vmm::dirty::DirtyRate;
use cutover_vmm::events::{Subscription, TooManySubscribers};
use cutover_vmm::snapshot::{RestoreRequest, SnapshotProgress, SnapshotReport, SnapshotRequest};
use cutover_vmm::{
    BalloonUpdate, Command, Controller, Error, EventLog, Options, Refusal, Reply, Request, State, VmStats, Vmm,
};
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore, oneshot, watch};

use super::firecracker::drives::DrivePatch;
use super::firecracker::network_interfaces::NetworkInterfacePatch;
use super::firecracker::rejection::Rejection;
use super::firecracker::setup::{Change, Configuration, Needs, Setup};
use super::http::{Failure, Outcome};
use super::v1::events::{WATCHERS_MAX, Watcher};
use crate::log::Logger;
use crate::metrics::firecracker::MetricsFile;
use crate::metrics::prometheus;
use crate::plan::Plan;

mod migrations;
mod protection;

use migrations::Migrations;
pub use protection::{JoinRequest, Membership, obey};

/// The way to the state driver of a VM.
pub type VmSender = Box<dyn Fn(Command) + Send + Sync>;
/// The way to whoever builds the VM.
pub type Builder = Box<dyn Fn(Build) + Send + Sync>;

/// A request to build a VM and run it.
pub struct Build {
    /// The VM.
    pub plan: Plan,
    /// Called when it is built, or cannot be; must not wait.
    pub answer: Box<dyn FnOnce(Result<Built, Error>) + Send>,
}

/// A VM that has been built.
pub struct Built {
    /// What it consists of.
    pub spec: VmSpec,
    /// The way to it.
    pub vm: VmSender,
    /// The same, of one that can be protected.
    pub controller: Option<Controller>,
}

impl From<&Vmm> for Built {
    fn from(vmm: &Vmm) -> Self {
        Self {
            spec: vmm.spec().clone(),
            vm: sender(vmm.controller()),
            controller: Some(vmm.controller()),
        }
    }
}

/// One VM, for the whole life of its process.
pub struct Instance {
    id: String,
    setup: Mutex<Setup>,
    vm: OnceLock<VmSender>,
    builder: Builder,
    events: EventLog,
    metadata: Arc<Metadata>,
    logger: Logger,
    metrics: Mutex<Option<MetricsFile>>,
    migrations: Migrations,
    controller: OnceLock<Controller>,
    membership: Membership,
    started: Notify,
    watchers: Watchers,
}

/// Those who watch the events.
struct Watchers {
    /// Has `changed` change with every event. Gone when no more are to come.
    subscription: Mutex<Option<Subscription>>,
    changed: watch::Receiver<()>,
    places: Arc<Semaphore>,
}

/// The way to the state driver that `controller` has.
fn sender(controller: Controller) -> VmSender {
    // The command has the way of its answer with it.
    Box::new(move |command| controller.submit::<()>(|_| command, |_| ()))
}

impl Instance {
    /// A VM that is to be configured, and then built by `builder`, with these `options`.
    ///
    /// # Errors
    /// Too many watch the events already.
    pub fn new(id: String, builder: Builder, options: &Options, logger: Logger) -> Result<Self, TooManySubscribers> {
        Self::with(id, Setup::default(), builder, options, logger)
    }

    /// A VM that was built with `options`, without this API.
    ///
    /// # Errors
    /// Too many watch the events already.
    pub fn of_built(id: String, built: Built, options: &Options, logger: Logger) -> Result<Self, TooManySubscribers> {
        // Its setup does not ask for another.
        let instance = Self::with(id, Setup::of_started(&built.spec), Box::new(|_| ()), options, logger)?;
        instance.has_started(built.vm, built.controller);
        Ok(instance)
    }

    fn with(
        id: String,
        setup: Setup,
        builder: Builder,
        options: &Options,
        logger: Logger,
    ) -> Result<Self, TooManySubscribers> {
        let (events, metadata) = (options.events.clone(), options.metadata.clone());
        let (change, changed) = watch::channel(());
        let subscription = events.subscribe(move || change.send_replace(()))?;
        Ok(Self {
            id,
            setup: Mutex::new(setup),
            vm: OnceLock::new(),
            builder,
            events,
            metadata,
            logger,
            metrics: Mutex::default(),
            migrations: Migrations::default(),
            controller: OnceLock::new(),
            membership: Membership::default(),
            started: Notify::new(),
            watchers: Watchers {
                subscription: Mutex::new(Some(subscription)),
                changed,
                places: Arc::new(Semaphore::new(WATCHERS_MAX)),
            },
        })
    }

    /// From here on there is a VM. The setup sees to it that this happens once.
    fn has_started(&self, vm: VmSender, controller: Option<Controller>) {
        let _ = self.vm.set(vm);
        if let Some(controller) = controller {
            let _ = self.controller.set(controller);
        }
    }

    /// What `--id` said.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the metadata service tells.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Number of the newest event.
    pub fn last_event(&self) -> u64 {
        self.events.last()
    }

    /// A place to watch the events after number `seen` from.
    ///
    /// # Errors
    /// Every place is taken.
    pub fn watch(&self, seen: u64) -> Result<Watcher, Failure> {
        let places = self.watchers.places.clone();
        let place = places
            .try_acquire_owned()
            .map_err(|_| Failure::TooManyWatchers(WATCHERS_MAX))?;
        Ok(Watcher {
            log: self.events.clone(),
            changed: self.watchers.changed.clone(),
            seen,
            _place: place,
        })
    }

    /// Tells those who watch that no more events will come; they get what they have not seen yet.
    pub fn end_events(&self) {
        *lock(&self.watchers.subscription) = None;
    }

    /// What is configured.
    pub fn configuration(&self) -> Configuration {
        self.setup().configuration().clone()
    }

    /// Whether a request with these needs can be served.
    ///
    /// # Errors
    /// It comes too early or too late.
    pub fn check(&self, needs: Needs) -> Result<(), Failure> {
        Ok(self.setup().check(needs)?)
    }

    /// Configures something.
    ///
    /// # Errors
    /// It comes too late, or cannot be; nothing has changed.
    pub fn configure(&self, change: Change) -> Outcome {
        let mut setup = self.setup();
        setup.check(Needs::NotStarted(change.subject()))?;
        match &change {
            Change::Logger(logger) => self.logger.reconfigure(logger.clone().into())?,
            Change::Metrics(metrics) => {
                let mut file = lock(&self.metrics);
                if file.is_some() {
                    return Err(Rejection::MetricsTaken.into());
                }
                *file = Some(metrics.open(&self.id)?);
            }
            _ => {}
        }
        setup.configure(change)?;
        Ok(StatusCode::NO_CONTENT)
    }

    /// Has the VM built as it is configured, and run.
    ///
    /// # Errors
    /// It has been started, or cannot be; then it can be configured again.
    pub async fn start(self: &Arc<Self>) -> Outcome {
        let spec = self.begin_start()?;
        self.build(Plan::Boot(spec)).await
    }

    /// Has the VM made of a snapshot, and run, or left paused. Its name and its console are those of this process.
    ///
    /// # Errors
    /// It has been started, something of it is configured already, or the snapshot cannot be restored; then that can be
    /// tried again.
    pub async fn restore(self: &Arc<Self>, request: RestoreRequest) -> Outcome {
        let serial = self.setup().restore(request.track)?;
        let name = Some(self.id.clone());
        self.build(Plan::Restore(RestoreRequest {
            name,
            serial,
            ..request
        }))
        .await
    }

    async fn build(self: &Arc<Self>, plan: Plan) -> Outcome {
        let (answer, answered) = oneshot::channel();
        let instance = self.clone();
        (self.builder)(Build {
            plan,
            answer: Box::new(move |built| {
                // Whoever asked may have gone away.
                let _ = answer.send(instance.finish_start(built));
            }),
        });
        answered.await.unwrap_or(Err(Failure::Ended))
    }

    /// The VM as it is configured, to be built and run; [`finish_start`](Self::finish_start) has to be told how it went.
    ///
    /// # Errors
    /// It has been started, or cannot be.
    pub fn begin_start(&self) -> Result<VmSpec, Failure> {
        let mut spec = self.setup().start()?;
        spec.name = Some(self.id.clone());
        Ok(spec)
    }

    /// Takes over the VM that has been built, or the reason why it has not.
    ///
    /// # Errors
    /// It has not.
    pub fn finish_start(&self, built: Result<Built, Error>) -> Outcome {
        let built = match built {
            Ok(built) => built,
            Err(error) => {
                self.migrations.end_arrival(&error);
                self.setup().finish_start(None);
                return Err(error.into());
            }
        };
        self.has_started(built.vm, built.controller);
        self.setup().finish_start(Some(&built.spec));
        self.started.notify_one();
        Ok(StatusCode::NO_CONTENT)
    }

    /// What the VM is doing; nothing if it has not been started.
    ///
    /// # Errors
    /// Nobody can tell any more.
    pub async fn state(&self) -> Result<Option<State>, Failure> {
        match self.vm.get() {
            None => Ok(None),
            Some(_) => match self.ask(Command::State, |_| ()).await {
                Err(Failure::Ended | Failure::Vm(Error::Refused(Refusal::Ended))) => Ok(Some(State::Ended)),
                state => state.map(Some),
            },
        }
    }

    /// What the VM has done so far.
    ///
    /// # Errors
    /// It has not been started, or has ended.
    pub async fn stats(&self) -> Result<VmStats, Failure> {
        self.ask(Command::Stats, |_| ()).await
    }

    /// How fast the guest has changed its memory since this was last asked.
    ///
    /// # Errors
    /// The VM has not been started, or has ended; or KVM does not tell.
    pub async fn dirty_rate(&self) -> Result<DirtyRate, Failure> {
        self.ask(Command::DirtyRate, |_| ()).await
    }

    /// Asks the started VM for something that its state may change by.
    ///
    /// # Errors
    /// Refused, with the reason.
    pub async fn request(&self, request: Request) -> Outcome {
        self.ask(|reply| Command::Lifecycle(request, reply), |_| ()).await?;
        Ok(StatusCode::NO_CONTENT)
    }

    /// As [`request`](Self::request), and it is well if the VM already is as asked.
    ///
    /// # Errors
    /// Refused, with the reason.
    pub async fn reach(&self, request: Request) -> Outcome {
        match self.request(request).await {
            Err(Failure::Vm(Error::Refused(Refusal::Already(_)))) => Ok(StatusCode::NO_CONTENT),
            outcome => outcome,
        }
    }

    /// Puts another file behind a drive, or changes its limits.
    ///
    /// # Errors
    /// There is no such drive, or the file cannot be used; nothing has changed.
    pub async fn update_drive(self: &Arc<Self>, patch: DrivePatch) -> Outcome {
        let update = patch.update()?;
        let id = self.setup().drive(&patch.drive_id)?.drive_id.clone();
        let instance = self.clone();
        let note_down = move |updated: &Result<(), Error>| {
            if updated.is_ok()
                && let Ok(drive) = instance.setup().drive(&patch.drive_id)
            {
                drive.apply(&patch);
            }
        };
        self.ask(|reply| Command::UpdateDisk { id, update, reply }, note_down)
            .await?;
        Ok(StatusCode::NO_CONTENT)
    }

    /// Changes the limits of a network interface.
    ///
    /// # Errors
    /// There is no such interface; nothing has changed.
    pub async fn update_net(self: &Arc<Self>, patch: NetworkInterfacePatch) -> Outcome {
        let update = patch.update()?;
        let id = self.setup().network_interface(&patch.iface_id)?.iface_id.clone();
        let instance = self.clone();
        let note_down = move |updated: &Result<(), Error>| {
            if updated.is_ok()
                && let Ok(interface) = instance.setup().network_interface(&patch.iface_id)
            {
                interface.apply(&patch);
            }
        };
        self.ask(|reply| Command::UpdateNet { id, update, reply }, note_down)
            .await?;
        Ok(StatusCode::NO_CONTENT)
    }

    /// Changes what the balloon is asked for.
    ///
    /// # Errors
    /// There is none, or it cannot be asked for that; nothing has changed.
    pub async fn update_balloon(self: &Arc<Self>, update: BalloonUpdate) -> Outcome {
        self.setup().balloon()?;
        let instance = self.clone();
        let note_down = move |updated: &Result<(), Error>| {
            if updated.is_ok()
                && let Ok(balloon) = instance.setup().balloon()
            {
                let mut spec = balloon.spec();
                update.apply(&mut spec);
                *balloon = (&spec).into();
            }
        };
        self.ask(|reply| Command::UpdateBalloon { update, reply }, note_down)
            .await?;
        Ok(StatusCode::NO_CONTENT)
    }

    /// How the balloon does.
    ///
    /// # Errors
    /// There is none, or its guest tells nothing.
    pub async fn balloon_statistics(&self) -> Result<Statistics, Failure> {
        if self.setup().balloon()?.stats_polling_interval_s == 0 {
            return Err(Rejection::NoBalloonStatistics.into());
        }
        self.ask(Command::BalloonStatistics, |_| ()).await
    }

    /// Makes a snapshot; the answer comes when it is permanent.
    ///
    /// # Errors
    /// Refused, failed, or cancelled; nothing is left of it.
    pub async fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport, Failure> {
        self.ask(|reply| Command::Snapshot { request, reply }, |_| ()).await
    }

    /// How far the snapshot that is being made is; nothing if none is.
    ///
    /// # Errors
    /// The VM has not been started, or has ended.
    pub async fn snapshot_progress(&self) -> Result<Option<SnapshotProgress>, Failure> {
        self.ask(Command::SnapshotProgress, |_| ()).await
    }

    /// Cancels the snapshot that is being made.
    ///
    /// # Errors
    /// None is.
    pub async fn cancel_snapshot(&self) -> Outcome {
        self.ask(Command::CancelSnapshot, |_| ()).await?;
        Ok(StatusCode::NO_CONTENT)
    }

    /// How much of a restored VM's memory and disks is there.
    ///
    /// # Errors
    /// The VM has not been started, or has ended.
    pub async fn restore_progress(&self) -> Result<SnapshotProgress, Failure> {
        self.ask(Command::RestoreProgress, |_| ()).await
    }

    /// Whether metrics are to be written to a file.
    pub fn has_metrics_file(&self) -> bool {
        lock(&self.metrics).is_some()
    }

    /// Writes the metrics to their file now.
    ///
    /// # Errors
    /// The VM has not been started, there is no file, or it takes no more.
    pub async fn flush_metrics(&self) -> Outcome {
        let stats = self.stats().await?;
        self.write_metrics(&stats)
    }

    /// Writes the metrics to their file for the last time, if there is one: the VM has ended with these.
    pub fn write_last_metrics(&self, stats: &VmStats) {
        if self.has_metrics_file()
            && let Err(error) = self.write_metrics(stats)
        {
            tracing::warn!(%error, "the last metrics are not written");
        }
    }

    fn write_metrics(&self, stats: &VmStats) -> Outcome {
        let mut file = lock(&self.metrics);
        let file = file.as_mut().ok_or(Rejection::NoMetrics)?;
        file.write(Timestamp::now(), stats, self.logger.counts())?;
        Ok(StatusCode::NO_CONTENT)
    }

    /// The metrics in Prometheus's text format.
    ///
    /// # Errors
    /// The VM has not been started, or has ended.
    pub async fn prometheus(&self) -> Result<String, Failure> {
        let stats = self.stats().await?;
        let text = prometheus::text(&self.id, stats, self.migration().await?, self.logger.counts());
        Ok(text.expect("a String takes all that is written to it"))
    }

    /// Waits until the VM has been started. For one who waits.
    pub async fn wait_for_start(&self) {
        self.started.notified().await;
    }

    /// Asks the state driver, which calls `note_down` with what came of it before anyone else is served.
    async fn ask<T: Send + 'static>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
        note_down: impl FnOnce(&Result<T, Error>) + Send + 'static,
    ) -> Result<T, Failure> {
        self.check(Needs::Started)?;
        let vm = self.vm.get().ok_or(Failure::Ended)?;
        let (answer, answered) = oneshot::channel();
        vm(command(Reply::new(move |result: Result<T, Error>| {
            note_down(&result);
            if let Err(unheard) = answer.send(result) {
                let error = unheard.err().map(|error| error.to_string());
                tracing::info!(error, "a request was served whose client has gone away");
            }
        })));
        Ok(answered.await.map_err(|_| Failure::Ended)??)
    }

    fn setup(&self) -> MutexGuard<'_, Setup> {
        lock(&self.setup)
    }
}

/// Whoever panicked with the lock left a whole value behind: each change is complete before anything can panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
