//! The snapshot that is being made, as the state driver sees it.
//!
//! ```text
//!  thread "snapshot"      prepare ──► Step::Prepared ─┐              ┌─► copy ──► Step::Done
//!                                                     ▼              │              │
//!  state driver                                    freeze ── Frozen ─┘              └─► answers, keeps the base
//! ```
//! There is one at a time. Told to give up, the thread does so at the next page. See [`Job`] for the rest. One that is of a
//! [cut](super::at_cut) waits between `Prepared` and `freeze` until that is taken.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use cutover_snapshot::spec::VmSpec;
use uuid::Uuid;

use super::at_cut::{AtCut, CutSnapshot};
use super::base::{Base, Bases};
use super::create::{Frozen, Inputs, Prepared};
use super::filling::Filling;
use super::request::{Disks, Kind, SnapshotProgress, SnapshotReport, SnapshotRequest, Source, Target};
use crate::Error;
use crate::control::{JobStep, Mailbox};
use crate::dirty::Baseline;
use crate::events::EventKind;
use crate::job::{Context, Job, JobKind};
use crate::lifecycle::Refusal;
use crate::machine::{Machine, confined};
use crate::page_fault::Arriving;
use crate::seccomp::ThreadKind;
use crate::state::MachineState;

/// What is the same for all snapshots.
const JOB: JobKind = JobKind {
    name: "snapshot",
    cancelled: || Error::SnapshotCancelled,
    is_step: |step| matches!(step, JobStep::Snapshot(_)),
};

/// What the thread reports to the state driver.
pub enum Step {
    /// The guest may be stopped.
    Prepared(Box<Prepared>),
    /// It is over: what came of it.
    Done(Result<SnapshotReport, Error>),
}

/// Snapshots of one machine: what they are built on, and the one that is being made.
#[derive(Default)]
pub struct Snapshots {
    bases: Bases,
    /// What still fills memory and disks, if the machine was restored.
    filling: Filling,
    under_way: Option<UnderWay>,
}

/// The snapshot that is being made.
pub struct UnderWay {
    // In the order they are to be dropped: a thread that waits for an answer has to learn that there is none.
    /// How the thread gets what was frozen.
    go_on: Option<Sender<Result<Frozen, Error>>>,
    /// Whether it is of a cut, rather than of the next moment that will do.
    at_cut: Option<AtCut>,
    job: Job<SnapshotReport>,
    /// Whether it has disks.
    copies_disks: bool,
    /// Where it goes.
    path: PathBuf,
    status: Arc<Status>,
}

/// How far it has come, and whether anybody still wants it.
#[derive(Default)]
pub struct Status {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl SnapshotRequest {
    /// Whether disks of the VM of `spec` are copied while its guest goes on.
    pub(crate) fn copies_disks_of(&self, spec: &VmSpec) -> bool {
        self.disks == Disks::Copied && spec.disks.iter().any(|disk| !disk.readonly)
    }
}

impl Status {
    /// There are so many bytes to be copied.
    pub fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// So many more bytes are copied.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// It was cancelled.
    pub fn check(&self) -> Result<(), Error> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::SnapshotCancelled);
        }
        Ok(())
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    fn progress(&self) -> SnapshotProgress {
        SnapshotProgress {
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        }
    }
}

impl Snapshots {
    /// Those of a machine that was restored from `source`: it is being filled, and snapshots can be built on that one if
    /// there is a `base`.
    pub fn of_restored(source: &Source, filling: Filling, base: Option<Base>) -> Self {
        let mut bases = Bases::default();
        *bases.of_source(source) = base.map(Arc::new);
        Self {
            bases,
            filling,
            under_way: None,
        }
    }

    /// Those of a machine that has moved here, of which some memory may be `arriving` yet.
    pub fn of_arrived(arriving: Option<Arc<Arriving>>) -> Self {
        Self {
            filling: Filling {
                arriving,
                ..Filling::default()
            },
            ..Self::default()
        }
    }

    /// Begins to make the snapshot of `request`.
    ///
    /// # Errors
    /// There is another, nothing to build it on, or no thread.
    pub fn begin(
        &mut self,
        context: &Context<'_>,
        request: SnapshotRequest,
    ) -> Result<&mut Job<SnapshotReport>, Error> {
        let inputs = self.inputs(context, request)?;
        let under_way = UnderWay::begin(inputs, None, context)?;
        Ok(&mut self.under_way.insert(under_way).job)
    }

    /// Begins to make one of a cut that is yet to be taken; `prepared` is called when that may be.
    ///
    /// # Errors
    /// As of [`begin`](Self::begin).
    pub fn begin_for_cut(
        &mut self,
        context: &Context<'_>,
        snapshot: &CutSnapshot,
        prepared: Box<dyn FnOnce() + Send>,
    ) -> Result<&mut Job<SnapshotReport>, Error> {
        let mut inputs = self.inputs(context, snapshot.request())?;
        inputs.chain = Some(snapshot.chain());
        let at_cut = AtCut::new(snapshot.id, prepared);
        let under_way = UnderWay::begin(inputs, Some(at_cut), context)?;
        Ok(&mut self.under_way.insert(under_way).job)
    }

    /// The snapshot that waits for a cut is to be of cut `cut`.
    ///
    /// # Errors
    /// There is none.
    pub fn expect_cut(&mut self, cut: u64) -> Result<(), Refusal> {
        self.at_cut()
            .ok_or(Refusal::NoSnapshotUnderWay)
            .map(|at_cut| at_cut.expect(cut))
    }

    /// Cut `cut` is about to be taken, of a guest that still runs.
    pub fn before_cut(&mut self, cut: u64) {
        let caught_up = self.at_cut().map_or(Ok(()), |at_cut| at_cut.catch_up(cut));
        if let (Err(error), Some(under_way)) = (caught_up, &mut self.under_way) {
            under_way.go_on(Err(error));
        }
    }

    /// Cut `cut` of the stopped `machine`, which has this `state`, is being taken: keeps what the snapshot has that is to be of
    /// it, if there is one. It is to [go on](Self::go_on) when the guest does.
    pub fn keep_at(&mut self, cut: u64, machine: &Machine, state: &MachineState) -> Option<Result<Frozen, Error>> {
        let prepared = self.at_cut()?.take(cut)?;
        Some(prepared.keep(machine, state.clone()))
    }

    /// What was `kept` is copied from here on, of a guest that stood still for `pause_ns`.
    pub fn go_on(&mut self, kept: Result<Frozen, Error>, pause_ns: u64) {
        if let Some(under_way) = &mut self.under_way {
            under_way.go_on(kept.map(|frozen| Frozen { pause_ns, ..frozen }));
        }
    }

    /// Gives the snapshot `id` of a cut up, taken or not, if it is being made.
    pub fn give_up_cut(&mut self, id: Uuid) {
        if let Some(under_way) = &mut self.under_way
            && under_way.at_cut.as_ref().is_some_and(|at_cut| at_cut.id == id)
        {
            under_way.cancel();
        }
    }

    fn at_cut(&mut self) -> Option<&mut AtCut> {
        self.under_way.as_mut()?.at_cut.as_mut()
    }

    /// What a snapshot begins with.
    fn inputs(&mut self, context: &Context<'_>, request: SnapshotRequest) -> Result<Inputs, Error> {
        if self.under_way.is_some() {
            return Err(Refusal::SnapshotUnderWay.into());
        }
        if matches!(request.target, Target::Files { .. }) && request.disks == Disks::Copied {
            return Err(Error::NoPlaceForDisks);
        }
        let base = match self.bases.of(&request.target) {
            Some(base) => base.clone(),
            none => {
                if request.kind == Kind::Incremental && matches!(request.target, Target::Store { .. }) {
                    return Err(Error::NoBase);
                }
                none.insert(Arc::new(Base::begin(context.machine, Baseline::Nothing)?))
                    .clone()
            }
        };
        Ok(Inputs {
            request,
            spec: context.spec.clone(),
            memory: context.machine.memory().clone(),
            base,
            chain: None,
            filling: self.filling.clone(),
            kept: context.machine.devices.keep_memory(),
            on_fault_thread: confined(context.options, ThreadKind::PageFault),
            on_copy_thread: confined(context.options, ThreadKind::Snapshot),
            started: Instant::now(),
        })
    }

    /// Goes on with the snapshot of `machine`, whose guest `runs` or does not. Returns what there is to tell, once it is over.
    pub fn advance(&mut self, step: Step, machine: &Machine, runs: bool) -> Option<EventKind> {
        match step {
            Step::Prepared(prepared) => {
                let under_way = self.under_way.as_mut()?;
                let wanted = under_way.status.check();
                match (&mut under_way.at_cut, wanted) {
                    (Some(at_cut), Ok(())) => match prepared.check_behind() {
                        Ok(()) => at_cut.is_prepared(prepared),
                        Err(error) => under_way.go_on(Err(error)),
                    },
                    (None, Ok(())) => under_way.go_on(prepared.freeze(machine, runs)),
                    (_, Err(cancelled)) => under_way.go_on(Err(cancelled)),
                }
                None
            }
            Step::Done(outcome) => {
                let under_way = self.under_way.take()?;
                Some(under_way.finish(outcome))
            }
        }
    }

    /// How far the snapshot has come that is being made.
    pub fn progress(&self) -> Option<SnapshotProgress> {
        self.under_way.as_ref().map(|under_way| under_way.status.progress())
    }

    /// Has the snapshot that is being made be given up; whoever asked for it is told when it is.
    ///
    /// # Errors
    /// There is none.
    pub fn cancel(&mut self) -> Result<(), Refusal> {
        let under_way = self.under_way.as_mut().ok_or(Refusal::NoSnapshotUnderWay)?;
        under_way.cancel();
        Ok(())
    }

    /// Whether a snapshot is being made that copies disks: they have to stay this VM's until that is done.
    pub fn needs_disks(&self) -> bool {
        self.under_way.as_ref().is_some_and(|under_way| under_way.copies_disks)
    }

    /// Gives the snapshot up that is being made if what it is of is yet to come: there will be no such moment here.
    pub fn expect_no_moment(&mut self) {
        if let Some(under_way) = self.under_way.as_mut().filter(|under_way| under_way.go_on.is_some()) {
            under_way.cancel();
        }
    }

    /// Waits for the snapshot that is being made and needs the machine no more; returns what there is to tell of it.
    pub fn complete(&mut self) -> Option<EventKind> {
        let mut under_way = self.under_way.take_if(|under_way| under_way.go_on.is_none())?;
        match under_way.job.wait()? {
            JobStep::Snapshot(Step::Done(outcome)) => Some(under_way.finish(outcome)),
            _ => None,
        }
    }

    /// Gives the snapshot up that is being made, if there is one; on return there is nothing of it any more.
    pub fn abandon(&mut self) {
        self.under_way = None;
    }

    /// Waits until disks that come from a snapshot are complete.
    pub fn wait_for_disks(&self) {
        if let Some(disks) = &self.filling.disks {
            disks.wait(&|| true);
        }
    }

    /// What still fills memory and disks that come from a snapshot.
    pub fn filling(&self) -> &Filling {
        &self.filling
    }

    /// How far memory and disks are filled that come from a snapshot.
    pub fn restore_progress(&self) -> SnapshotProgress {
        self.filling.progress()
    }
}

impl UnderWay {
    fn begin(inputs: Inputs, at_cut: Option<AtCut>, context: &Context<'_>) -> Result<Self, Error> {
        let path = inputs.request.target.path();
        let copies_disks = inputs.request.copies_disks_of(&inputs.spec);
        let on_thread = inputs.on_copy_thread.clone();
        let status = Arc::<Status>::default();
        let (go_on, gone_on) = channel();
        let (cancelled, filling) = (status.clone(), inputs.filling.clone());
        let cancel = move || {
            cancelled.cancel();
            // It may wait for that.
            filling.wake();
        };
        let shared = status.clone();
        let job = Job::begin(&JOB, context.mailbox, on_thread, cancel, move |driver| {
            let outcome = make(inputs, &shared, driver, &gone_on);
            driver.step(JobStep::Snapshot(Step::Done(outcome)));
        })?;
        Ok(Self {
            go_on: Some(go_on),
            at_cut,
            job,
            copies_disks,
            path,
            status,
        })
    }

    /// Has the thread go on with what was frozen, or not at all.
    fn go_on(&mut self, frozen: Result<Frozen, Error>) {
        if let Some(go_on) = self.go_on.take() {
            // A thread that is gone has reported why.
            let _ = go_on.send(frozen);
        }
    }

    /// Has the thread give up, also if it waits for a cut.
    fn cancel(&mut self) {
        self.job.cancel();
        if self.at_cut.as_mut().is_some_and(AtCut::give_up) {
            self.go_on(Err(Error::SnapshotCancelled));
        }
    }

    /// Answers what came of it, and returns what there is to tell.
    fn finish(self, outcome: Result<SnapshotReport, Error>) -> EventKind {
        let event = match &outcome {
            Ok(report) => EventKind::SnapshotFinished { report: report.clone() },
            Err(error) => EventKind::SnapshotFailed {
                path: self.path,
                reason: error.to_string(),
            },
        };
        self.job.finish(outcome);
        event
    }
}

/// Makes a snapshot; see the module.
fn make(
    inputs: Inputs,
    status: &Arc<Status>,
    driver: &Mailbox,
    gone_on: &Receiver<Result<Frozen, Error>>,
) -> Result<SnapshotReport, Error> {
    let prepared = inputs.prepare(status)?;
    driver.step(JobStep::Snapshot(Step::Prepared(Box::new(prepared))));
    // Without an answer, there is no machine any more.
    let frozen = gone_on.recv().map_err(|_| Error::SnapshotCancelled)??;
    frozen.copy(status).map_err(|error| match status.check() {
        Ok(()) => error,
        // Whatever it stumbled over, it was told to.
        Err(cancelled) => cancelled,
    })
}
