//! The snapshot that is being made, as the state driver sees it.
//!
//! ```text
//!  thread "snapshot"      prepare ──► Step::Prepared ─┐              ┌─► copy ──► Step::Done
//!                                                     ▼              │              │
//!  state driver                                    freeze ── Frozen ─┘              └─► answers, keeps the base
//! ```
//! There is one at a time. It ends with the machine it is of: that waits for the thread, which gives up at the next
//! page.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use cutover_devices::THREAD_STACK_SIZE;
use cutover_snapshot::spec::VmSpec;

use super::base::{Base, Bases};
use super::create::{Frozen, Inputs, Prepared};
use super::filling::Filling;
use super::request::{Disks, Kind, SnapshotProgress, SnapshotReport, SnapshotRequest, Source, Target};
use crate::Error;
use crate::control::{Mailbox, Reply};
use crate::dirty::Baseline;
use crate::driver::Options;
use crate::events::EventKind;
use crate::lifecycle::Refusal;
use crate::machine::{Machine, confined};
use crate::seccomp::ThreadKind;

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
    job: Option<Job>,
}

/// What a snapshot is of.
pub struct Context<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// The VM it is.
    pub spec: &'a VmSpec,
    /// How its threads run.
    pub options: &'a Options,
    /// The way to its state driver.
    pub mailbox: &'a Arc<Mailbox>,
}

/// The snapshot that is being made. Dropping it has its thread give up, and waits for that.
pub struct Job {
    /// Where it goes.
    path: PathBuf,
    status: Arc<Status>,
    /// What it may wait for.
    filling: Filling,
    /// Where the answer goes; nowhere any more once it is over.
    reply: Option<Reply<SnapshotReport>>,
    /// How the thread gets what was frozen.
    go_on: Option<Sender<Result<Frozen, Error>>>,
    thread: Option<JoinHandle<()>>,
    mailbox: Arc<Mailbox>,
}

/// How far it has come, and whether anybody still wants it.
#[derive(Default)]
pub struct Status {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
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
            job: None,
        }
    }

    /// Begins to make the snapshot of `request`.
    ///
    /// # Errors
    /// There is another, nothing to build it on, or no thread.
    pub fn begin(&mut self, context: &Context<'_>, request: SnapshotRequest) -> Result<&mut Job, Error> {
        let inputs = self.inputs(context, request)?;
        let job = Job::begin(inputs, context)?;
        Ok(self.job.insert(job))
    }

    /// What a snapshot begins with.
    fn inputs(&mut self, context: &Context<'_>, request: SnapshotRequest) -> Result<Inputs, Error> {
        if self.job.is_some() {
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
            filling: self.filling.clone(),
            on_fault_thread: confined(context.options, ThreadKind::PageFault),
            on_copy_thread: confined(context.options, ThreadKind::Snapshot),
            started: Instant::now(),
        })
    }

    /// Goes on with the snapshot of `machine`, whose guest `runs` or does not. Returns what there is to tell, once it is over.
    pub fn advance(&mut self, step: Step, machine: &Machine, runs: bool) -> Option<EventKind> {
        let job = self.job.as_mut()?;
        match step {
            Step::Prepared(prepared) => {
                let frozen = job.status.check().and_then(|()| prepared.freeze(machine, runs));
                if let Some(go_on) = job.go_on.take() {
                    // A thread that is gone has reported why.
                    let _ = go_on.send(frozen);
                }
                None
            }
            Step::Done(outcome) => {
                let event = match &outcome {
                    Ok(report) => EventKind::SnapshotFinished { report: report.clone() },
                    Err(error) => EventKind::SnapshotFailed {
                        path: job.path.clone(),
                        reason: error.to_string(),
                    },
                };
                if let Some(reply) = job.reply.take() {
                    reply.send(outcome);
                }
                self.job = None;
                Some(event)
            }
        }
    }

    /// How far the snapshot has come that is being made.
    pub fn progress(&self) -> Option<SnapshotProgress> {
        self.job.as_ref().map(|job| job.status.progress())
    }

    /// Has the snapshot that is being made be given up; whoever asked for it is told when it is.
    ///
    /// # Errors
    /// There is none.
    pub fn cancel(&self) -> Result<(), Refusal> {
        let job = self.job.as_ref().ok_or(Refusal::NoSnapshotUnderWay)?;
        job.cancel();
        Ok(())
    }

    /// Gives the snapshot up that is being made, if there is one; on return there is nothing of it any more.
    pub fn abandon(&mut self) {
        self.job = None;
    }

    /// Waits until disks that come from a snapshot are complete.
    pub fn wait_for_disks(&self) {
        if let Some(disks) = &self.filling.disks {
            disks.wait(&|| true);
        }
    }

    /// How far memory and disks are filled that come from a snapshot.
    pub fn restore_progress(&self) -> SnapshotProgress {
        self.filling.progress()
    }
}

impl Job {
    /// Has the thread give up, at the next page or in the middle of waiting.
    fn cancel(&self) {
        self.status.cancel();
        self.filling.wake();
    }

    /// What comes of it goes to `reply`.
    pub fn reply_to(&mut self, reply: Reply<SnapshotReport>) {
        self.reply = Some(reply);
    }

    fn begin(inputs: Inputs, context: &Context<'_>) -> Result<Self, Error> {
        let path = inputs.request.target.path();
        let filling = inputs.filling.clone();
        let mailbox = context.mailbox.clone();
        let on_thread = inputs.on_copy_thread.clone();
        let status = Arc::<Status>::default();
        let (go_on, gone_on) = channel();
        let (shared, steps) = (status.clone(), mailbox.clone());
        let thread = thread::Builder::new()
            .name("snapshot".to_owned())
            .stack_size(THREAD_STACK_SIZE)
            .spawn(move || {
                on_thread();
                let outcome = make(inputs, &shared, &steps, &gone_on);
                steps.step(Step::Done(outcome));
            })
            .map_err(Error::os("create the snapshot thread"))?;
        Ok(Self {
            path,
            status,
            filling,
            reply: None,
            go_on: Some(go_on),
            thread: Some(thread),
            mailbox,
        })
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
    driver.step(Step::Prepared(Box::new(prepared)));
    // Without an answer, there is no machine any more.
    let frozen = gone_on.recv().map_err(|_| Error::SnapshotCancelled)??;
    frozen.copy(status).map_err(|error| match status.check() {
        Ok(()) => error,
        // Whatever it stumbled over, it was told to.
        Err(cancelled) => cancelled,
    })
}

impl Drop for Job {
    fn drop(&mut self) {
        self.cancel();
        self.go_on = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the snapshot thread panicked");
        }
        self.mailbox.forget_step();
        if let Some(reply) = self.reply.take() {
            reply.send(Err(Error::SnapshotCancelled));
        }
    }
}
