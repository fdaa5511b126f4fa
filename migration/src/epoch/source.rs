//! The primary's end of a link of replication.
//!
//! ```text
//!  whoever protects the VM          thread "replication", which owns the link
//!  round, seeded, ship, roll_back ─► one after the other ══════════════════════► standby
//!           ◄──── what came of it ─┘   └─ nothing to do for a while: Alive ════► standby
//! ```
//! Whatever goes wrong ends the link: after an error the standby is lost, and every later call says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::session::Session;
use super::{Epoch, Options, Part};
use crate::error::Error;
use crate::streams::{OnThread, Sent};
use crate::transport::{Endpoint, Security};
use crate::vm::{ImageShape, Reservation};

/// How to reach a standby.
pub struct Link<'a> {
    /// Where it listens.
    pub to: &'a Endpoint,
    /// What protects the link.
    pub security: &'a Security,
    /// How it is to be.
    pub options: Options,
    /// What the thread calls first.
    pub on_thread: OnThread,
    /// Set by somebody who does not want the standby any more, also while it is being connected to, or when the replica
    /// is dropped: nothing is waited for then.
    pub let_go: Arc<AtomicBool>,
    /// Called with the reason, on the thread, if the standby is lost; not if it is let go of.
    pub lost: Box<dyn FnOnce(String) + Send>,
}

/// A standby, as its primary sees it. Dropped, it is let go of: what is being sent is not sent to its end.
pub struct Replica {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    let_go: Arc<AtomicBool>,
    images: Vec<ImageShape>,
    reserved_at: Instant,
}

/// Whoever waits for what comes of a job.
type Reply<T> = Sender<Result<T, Error>>;

enum Job {
    Round(Vec<Part>, Reply<Sent>),
    Seeded(Reply<()>),
    Ship(Epoch, Reply<Sent>),
    RollBack(u64, Reply<()>),
}

/// Why there is no standby any more.
enum End {
    LetGo,
    Lost(String),
}

impl Replica {
    /// Connects to a standby and has it build the VM of `reservation`.
    ///
    /// # Errors
    /// It cannot be reached, is none, or cannot build the VM.
    pub fn connect(reservation: &Reservation, link: Link<'_>) -> Result<Self, Error> {
        let Link {
            to,
            security,
            options,
            on_thread,
            let_go,
            lost,
        } = link;
        let alive_every = options.alive_every;
        let session = Session::connect(reservation, to, security, options, let_go.clone())?;
        let reserved_at = session.reserved_at();
        let (jobs, asked) = channel();
        let body = move || {
            on_thread();
            if let End::Lost(reason) = serve(session, &asked, alive_every) {
                lost(reason);
            }
        };
        let thread = thread::Builder::new().name("replication".to_owned()).spawn(body);
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread.map_err(Error::Thread)?),
            let_go,
            images: reservation.images.clone(),
            reserved_at,
        })
    }

    /// When the standby was asked to build the VM: it learned of it a little later, so that time it counts from there is
    /// never more than has passed.
    pub fn reserved_at(&self) -> Instant {
        self.reserved_at
    }

    /// Sends pages while the guest runs, before it is protected: what is written meanwhile is in the next round, or in the
    /// first epoch. Returns when they are in place.
    ///
    /// # Errors
    /// The standby is lost.
    ///
    /// # Panics
    /// `parts` are not one for each image, each with as many pages as it has.
    pub fn round(&self, parts: Vec<Part>) -> Result<Sent, Error> {
        self.check(&parts);
        self.ask(|reply| Job::Round(parts, reply))
    }

    /// From here on there are epochs, no rounds any more.
    ///
    /// # Errors
    /// The standby is lost.
    pub fn seeded(&self) -> Result<(), Error> {
        self.ask(Job::Seeded)
    }

    /// Sends an epoch; returns when the standby holds all of it. Waits first until the standby has room for it, which is
    /// when others have become permanent, or were dropped.
    ///
    /// # Errors
    /// The standby is lost.
    ///
    /// # Panics
    /// As [`round`](Self::round).
    pub fn ship(&self, epoch: Epoch) -> Result<Sent, Error> {
        self.check(&epoch.parts);
        self.ask(|reply| Job::Ship(epoch, reply))
    }

    /// The VM is again as it was at `cut`; returns when the standby holds nothing later.
    ///
    /// # Errors
    /// The standby is lost.
    pub fn roll_back(&self, cut: u64) -> Result<(), Error> {
        self.ask(|reply| Job::RollBack(cut, reply))
    }

    fn check(&self, parts: &[Part]) {
        let pages = parts.iter().map(|part| part.pages.pages());
        assert!(
            pages.eq(self.images.iter().map(|image| image.pages)),
            "parts that are not those of the images that were reserved"
        );
    }

    fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = channel();
        let jobs = self.jobs.as_ref().ok_or(Error::StandbyLost)?;
        jobs.send(job(reply)).map_err(|_| Error::StandbyLost)?;
        answer.recv().map_err(|_| Error::StandbyLost)?
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.let_go.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was reported.
            let _ = thread.join();
        }
    }
}

impl End {
    /// What `error` means. Somebody may let go of a standby because it is lost: then it is lost.
    fn of(error: &Error) -> Self {
        match error {
            Error::Cancelled => Self::LetGo,
            error => Self::Lost(error.to_string()),
        }
    }
}

/// Does what is asked until the standby is lost or let go of.
fn serve(mut session: Session, jobs: &Receiver<Job>, alive_every: Duration) -> End {
    loop {
        let done = match jobs.recv_timeout(alive_every) {
            Ok(job) => carry_out(&mut session, job),
            Err(RecvTimeoutError::Timeout) => session.ask_alive().map_err(|error| End::of(&session.part(error))),
            Err(RecvTimeoutError::Disconnected) => {
                session.let_go();
                return End::LetGo;
            }
        };
        if let Err(end) = done {
            return end;
        }
    }
}

fn carry_out(session: &mut Session, job: Job) -> Result<(), End> {
    match job {
        Job::Round(parts, reply) => {
            let done = session.round(parts);
            answer(session, &reply, done)
        }
        Job::Seeded(reply) => {
            let done = session.seeded();
            answer(session, &reply, done)
        }
        Job::Ship(epoch, reply) => {
            let done = session.ship(epoch);
            answer(session, &reply, done)
        }
        Job::RollBack(cut, reply) => {
            let done = session.roll_back(cut);
            answer(session, &reply, done)
        }
    }
}

/// Tells whoever asked what came of it, and, if that is an error, the standby too.
fn answer<T>(session: &mut Session, reply: &Reply<T>, done: Result<T, Error>) -> Result<(), End> {
    let (done, goes_on) = match done {
        Ok(value) => (Ok(value), Ok(())),
        Err(error) => {
            let error = session.part(error);
            let end = End::of(&error);
            (Err(error), Err(end))
        }
    };
    // Whoever asked may not wait any more.
    let _ = reply.send(done);
    goes_on
}
