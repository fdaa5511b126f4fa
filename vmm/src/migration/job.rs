//! The migration that is under way, as the state driver sees it.
//!
//! ```text
//!  thread "migration"    … rounds ──► Stop ─┐        ┌─► last pages ──► HandOver ─┐        ┌─► Handoff ──► Done
//!                                           ▼        │                            ▼        │               │
//!  state driver                       stops, saves ──┘                     lets go of it ──┘               └─► ends
//! ```
//! There is one at a time. Told to give up, the thread does so in the middle of whatever it waits for, unless the VM is
//! handed over already.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use cutover_migration::source;
use cutover_migration::status::Status;
use cutover_migration::transport::Endpoint;

use super::request::MigrateRequest;
use super::source::{Source, Still, Subject};
use super::{MigrationProgress, MigrationReport};
use crate::Error;
use crate::control::{JobStep, Reply};
use crate::events::{EventKind, EventLog};
use crate::job::{Context, Job, JobKind};
use crate::machine::confined;
use crate::seccomp::ThreadKind;
use crate::snapshot::Filling;

/// What is the same for all migrations.
const JOB: JobKind = JobKind {
    name: "migration",
    cancelled: || cutover_migration::Error::Cancelled.into(),
    is_step: |step| matches!(step, JobStep::Migration(_)),
};

/// What the thread wants of the state driver. It waits for an answer after each but the last.
pub enum Step {
    /// That the guest stand still; answered with its state.
    Stop,
    /// That it go on: nothing came of it.
    Resume,
    /// That it not go on by itself from here on.
    HandOver,
    /// Nothing: it is over.
    Done(Result<MigrationReport, Error>),
}

/// What the state driver says to a step.
pub type Answer = Result<Option<Box<Still>>, Error>;

/// See the module.
pub struct Migration {
    // In the order they are to be dropped: a thread that waits for an answer has to learn that there is none.
    answers: Sender<Answer>,
    job: Job<MigrationReport>,
    /// Where it goes.
    to: Endpoint,
    status: Arc<Status>,
}

impl Migration {
    /// Begins to do what `request` says, once what is `filling` the VM's memory is done; what comes of it goes to `reply`.
    ///
    /// # Errors
    /// This host has no certificate there, KVM does not tell what changes, or there is no thread.
    pub fn begin(context: &Context<'_>, filling: Filling, request: MigrateRequest) -> Result<Self, Error> {
        let subject = Subject::of(context, &request, filling.external.is_some())?;
        let status = Arc::new(observed(&context.options.events));
        let (answers, answered) = channel();
        let cancel = {
            let (status, filling) = (status.clone(), filling.clone());
            move || {
                status.cancel();
                // It may wait for that.
                filling.wake();
            }
        };
        let on_thread = confined(context.options, ThreadKind::Migration);
        let security = super::security(request.tls.as_deref())?;
        let (to, shared) = (request.to.clone(), status.clone());
        let job = Job::begin(&JOB, context.mailbox, on_thread, cancel, move |driver| {
            // Memory that is not there yet cannot be told from what is zero.
            filling.wait(&|| !shared.is_cancelled());
            let mut vm = Source::new(subject, driver, answered);
            let request = source::Request {
                to: &request.to,
                security: &security,
                options: &request.options,
                status: &shared,
                // They are confined as the thread that starts them.
                on_thread: Arc::new(|| {}),
            };
            let outcome = source::migrate(&mut vm, &request).map_err(Error::from);
            driver.step(JobStep::Migration(Step::Done(outcome)));
        })?;
        Ok(Self {
            answers,
            job,
            to,
            status,
        })
    }

    /// What comes of it goes to `reply`.
    pub fn reply_to(&mut self, reply: Reply<MigrationReport>) {
        self.job.reply_to(reply);
    }

    /// What has begun.
    pub fn started(&self) -> EventKind {
        EventKind::MigrationStarted {
            to: self.to.to_string(),
        }
    }

    /// Whether the VM goes on on another host.
    pub fn leaves_this_host(&self) -> bool {
        !self.to.is_on_this_host()
    }

    /// How far it has come.
    pub fn progress(&self) -> MigrationProgress {
        self.status.progress()
    }

    /// Has it be given up; whoever asked for it is told when it is.
    pub fn cancel(&self) {
        self.job.cancel();
    }

    /// Answers the thread, which waits for that.
    pub fn answer(&self, answer: Answer) {
        // A thread that is gone has reported why.
        let _ = self.answers.send(answer);
    }

    /// It is over; returns what there is to tell.
    pub fn finish(self, outcome: Result<MigrationReport, Error>) -> EventKind {
        let to = self.to.to_string();
        let event = match &outcome {
            Ok(report) => EventKind::MigrationFinished {
                to,
                report: report.clone(),
            },
            Err(error) => EventKind::MigrationFailed {
                to,
                reason: error.to_string(),
            },
        };
        self.job.finish(outcome);
        event
    }
}

/// A status whose phases and rounds are events.
fn observed(events: &EventLog) -> Status {
    let events = events.clone();
    Status::observed(Box::new(move |progress| {
        events.push(EventKind::MigrationRound {
            progress: progress.clone(),
        });
    }))
}
