//! An operation on a running VM that takes its time, as the state driver sees it: a snapshot, a migration.
//!
//! ```text
//!  thread      works ──► step ─┐          ┌─► goes on ──► step: it is over
//!                              ▼          │                   │
//!  state driver            does it ─ answer                   └─► answers whoever asked
//! ```
//! The thread does what may take time; what only the state driver may do, it asks of that, one step after the other. An
//! operation ends with the machine it is of: that waits for the thread, which is told to give up.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use cutover_devices::{OnThread, THREAD_STACK_SIZE};
use cutover_snapshot::spec::VmSpec;

use crate::Error;
use crate::control::{JobStep, Mailbox, Reply};
use crate::driver::Options;
use crate::machine::Machine;

/// See the module: an operation of which a `T` comes. Dropping it has its thread give up, waits for that, and answers
/// that nothing came of it.
pub struct Job<T> {
    name: &'static str,
    /// Where the answer goes; nowhere any more once it is over.
    reply: Option<Reply<T>>,
    /// Has the thread give up.
    cancel: Box<dyn Fn() + Send>,
    /// What is answered if it does.
    cancelled: fn() -> Error,
    thread: Option<JoinHandle<()>>,
    mailbox: Arc<Mailbox>,
    /// Whether what waits in the mailbox is a step of it.
    is_step: fn(&JobStep) -> bool,
}

/// What an operation is on.
pub struct Context<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// The VM it is.
    pub spec: &'a VmSpec,
    /// How many monitors have had the VM before this one.
    pub incarnation: u64,
    /// How its threads run.
    pub options: &'a Options,
    /// The way to its state driver.
    pub mailbox: &'a Arc<Mailbox>,
}

/// What is the same for all operations of a kind.
pub struct JobKind {
    /// What it is called in messages, and its thread.
    pub name: &'static str,
    /// What is answered if it is given up.
    pub cancelled: fn() -> Error,
    /// Tells its steps.
    pub is_step: fn(&JobStep) -> bool,
}

impl<T> Job<T> {
    /// Has a thread do `work`, which calls `on_thread` first. Its steps go to `mailbox`. After `cancel` was called, it is
    /// to give up soon, wherever it is.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub fn begin(
        kind: &JobKind,
        mailbox: &Arc<Mailbox>,
        on_thread: OnThread,
        cancel: impl Fn() + Send + 'static,
        work: impl FnOnce(&Mailbox) + Send + 'static,
    ) -> Result<Self, Error> {
        let steps = mailbox.clone();
        let thread = thread::Builder::new()
            .name(kind.name.to_owned())
            .stack_size(THREAD_STACK_SIZE)
            .spawn(move || {
                on_thread();
                work(&steps);
            })
            .map_err(Error::os("create the thread of an operation"))?;
        Ok(Self {
            name: kind.name,
            reply: None,
            cancel: Box::new(cancel),
            cancelled: kind.cancelled,
            thread: Some(thread),
            mailbox: mailbox.clone(),
            is_step: kind.is_step,
        })
    }

    /// What comes of it goes to `reply`.
    pub fn reply_to(&mut self, reply: Reply<T>) {
        self.reply = Some(reply);
    }

    /// Has the thread give up; it reports when it has.
    pub fn cancel(&self) {
        (self.cancel)();
    }

    /// Waits until the thread has done what it does, without a step left that needs the state driver; returns what it has
    /// reported last.
    pub fn wait(&mut self) -> Option<JobStep> {
        self.join();
        self.mailbox.take_step(self.is_step)
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(thread = self.name, "the thread of an operation panicked");
        }
    }

    /// Answers what came of it; the thread has reported that last.
    pub fn finish(mut self, outcome: Result<T, Error>) {
        if let Some(reply) = self.reply.take() {
            reply.send(outcome);
        }
    }
}

impl<T> Drop for Job<T> {
    fn drop(&mut self) {
        self.cancel();
        self.join();
        // Of what it has reported nobody wants to know any more.
        while self.mailbox.take_step(self.is_step).is_some() {}
        if let Some(reply) = self.reply.take() {
            reply.send(Err((self.cancelled)()));
        }
    }
}
