//! The source's part of a migration: its phases, one call a line.
//!
//! ```text
//!  hello ─► reserve ─► attach ─► pre_copy ─► stop_and_copy ─► hand_over ═ Handoff ═► RunsThere
//!     └────────┴──────────┴──────────┴──────────────┴─────────────┘             ├─► Unknown: never resumes by itself
//!              any error: the guest goes on here                                └─► declined: goes on here
//! ```
//! The commit point is the sending of Handoff. Before it every error has the guest go on as if nothing had been, and
//! cancelling is an error. After it there is no `?`: the guest goes on here only if the destination says that it does
//! not run it there.

mod compare;
mod missing;
mod post_copy;
mod rounds;

use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;
use uuid::Uuid;

use self::post_copy::{Answers, Failure, pull_options};
use self::rounds::Left;
use crate::error::Error;
use crate::handshake::{self, Wanted};
use crate::link::SourceLink;
use crate::message::{SavedState, ToDestination, ToSource};
use crate::options::{Options, PostCopy};
use crate::pages::PageBits;
use crate::report::Report;
use crate::status::{Phase, Status};
use crate::streams::{OnThread, Outgoing};
use crate::transport::{Connection, Endpoint, Security, connect};
use crate::vm::{MEMORY_IMAGE, Outcome, Reservation, SourceVm, Stopped};

/// How long the destination may take to have the state in place; the guest stands still meanwhile.
const READY_MAX: Duration = Duration::from_secs(30);
/// How long it may take to say that it runs the VM.
const RUNNING_MAX: Duration = Duration::from_secs(30);

/// A migration that somebody asks for.
pub struct Request<'a> {
    /// Where to.
    pub to: &'a Endpoint,
    /// What protects the link.
    pub security: &'a Security,
    /// How it is to be.
    pub options: &'a Options,
    /// Where it says how far it has come, and learns that it is not wanted any more.
    pub status: &'a Status,
    /// What its threads call first.
    pub on_thread: OnThread,
}

/// A migration under way.
struct Session<'a> {
    request: &'a Request<'a>,
    link: SourceLink,
    reservation: Reservation,
    outgoing: Outgoing,
    /// Where the destination asks for pages that its guest waits for (post-copy).
    pull: Option<Connection>,
    started: Instant,
    report: Report,
    /// How long a message and its answer take.
    round_trip: Duration,
    /// Images that the destination has an older copy of.
    older: Vec<u8>,
    /// For each image what was sent before.
    sent_before: Vec<PageBits>,
    round: u32,
}

/// A guest that stands still, all of which is at the destination.
struct Stop {
    /// Since when it stands still.
    stopped: Instant,
    /// Since when the destination could run it.
    ready: Instant,
    /// But for pages of memory that this sends when they are wanted (post-copy).
    answers: Option<Answers>,
}

/// Moves `vm`. Returns when it runs at the destination, all of its memory included.
///
/// # Errors
/// It does not run there: then it goes on here. After it was handed over there are two more: it is not known whether
/// it runs there ([`Error::OutcomeUnknown`]), or part of its memory is [lost](Error::Lost).
pub fn migrate(vm: &mut dyn SourceVm, request: &Request<'_>) -> Result<Report, Error> {
    let mut session = match Session::connect(vm, request) {
        Ok(session) => session,
        Err(error) => {
            vm.resume();
            return Err(error);
        }
    };
    match session.up_to_handoff(vm) {
        Ok(stop) => session.commit(vm, stop),
        Err(error) => {
            // Before anybody is told: the guest may stand still.
            vm.resume();
            Err(session.link.part(error))
        }
    }
}

impl<'a> Session<'a> {
    fn connect(vm: &dyn SourceVm, request: &'a Request<'a>) -> Result<Self, Error> {
        let started = Instant::now();
        request.status.step(|progress| progress.phase = Phase::Connecting);
        let mut connection = connect(request.to, request.security)?;
        connection.watch(request.status.cancel_flag());
        let reservation = vm.reservation();
        let images = vm.images();
        let sent_before = images.iter().map(|image| PageBits::empty(image.pages())).collect();
        let on_thread = request.on_thread.clone();
        Ok(Self {
            request,
            link: SourceLink::new(connection),
            outgoing: Outgoing::new(images, &reservation.images, request.options, on_thread),
            pull: None,
            reservation,
            started,
            report: Report::default(),
            round_trip: Duration::ZERO,
            older: Vec::new(),
            sent_before,
            round: 0,
        })
    }

    /// Everything before the commit point.
    fn up_to_handoff(&mut self, vm: &mut dyn SourceVm) -> Result<Stop, Error> {
        let session = self.hello()?;
        self.reserve(vm)?;
        self.attach(session)?;
        let left = self.pre_copy(vm)?;
        let stop = self.stop_and_copy(vm, left)?;
        self.check_wanted()?;
        vm.hand_over().map_err(Error::vm("let go of the VM"))?;
        Ok(stop)
    }

    /// Finds a version that both sides speak.
    fn hello(&mut self) -> Result<Uuid, Error> {
        let asked = Instant::now();
        let agreed = handshake::hello(&mut self.link, 0)?;
        self.round_trip = asked.elapsed();
        Ok(agreed.session)
    }

    /// Has the destination build the VM, or say why it cannot.
    fn reserve(&mut self, vm: &dyn SourceVm) -> Result<(), Error> {
        self.request.status.step(|progress| progress.phase = Phase::Reserving);
        let wanted = Wanted {
            streams: self.request.options.streams.max(1),
            pull: self.may_pull(),
            handed: vm.descriptors().map_err(Error::vm("hand descriptors over"))?,
        };
        self.older = handshake::reserve(&mut self.link, &self.reservation, wanted)?;
        Ok(())
    }

    /// Whether the destination may have to ask for pages.
    fn may_pull(&self) -> bool {
        let first = self.reservation.images.first();
        self.request.options.post_copy != PostCopy::Never && first.is_some_and(|image| image.name == MEMORY_IMAGE)
    }

    /// Connects the other page streams, and that for pages the destination asks for.
    fn attach(&mut self, session: Uuid) -> Result<(), Error> {
        let streams = self.request.options.streams.max(1);
        for stream in 1..streams {
            let connection = self.connect_stream(session, stream)?;
            self.outgoing.attach(connection);
        }
        if self.may_pull() {
            self.pull = Some(self.connect_stream(session, streams)?);
        }
        self.report.preparation_ns = ns(self.started.elapsed());
        Ok(())
    }

    fn connect_stream(&self, session: Uuid, stream: u8) -> Result<Connection, Error> {
        let mut connection = connect(self.request.to, self.request.security)?;
        connection.watch(self.request.status.cancel_flag());
        let mut link = SourceLink::new(connection);
        link.send(&ToDestination::Attach { session, stream })?;
        Ok(link.into_connection())
    }

    /// Stops the guest, sends what is left and the state, and waits until all of it is in place. Of memory that may
    /// follow only those pages are sent that were written in the very end: they will be used first.
    fn stop_and_copy(&mut self, vm: &mut dyn SourceVm, left: Left) -> Result<Stop, Error> {
        self.outgoing.lift_limit();
        let Stopped { dirty, state, at } = vm.stop().map_err(Error::vm("stop the guest"))?;
        // One moment ends a part and begins the next: together they are the whole.
        let saved = Instant::now();
        self.report.downtime.stop_ns = ns(saved - at);
        let Left { mut pages, may_follow } = left;
        let mut missing = match pages.first_mut() {
            Some(memory) if may_follow && self.pull.is_some() => {
                Some(std::mem::replace(memory, PageBits::empty(memory.pages())))
            }
            _ => None,
        };
        for (pages, dirty) in pages.iter_mut().zip(&dirty) {
            pages.union(dirty);
        }
        if let (Some(missing), Some(memory)) = (&mut missing, pages.first()) {
            missing.subtract(memory);
        }
        let (mut round, _) = self.send_round(&pages, true)?;
        round.dirtied_pages = count(&dirty);
        self.report.add_round(round);
        let sent = Instant::now();
        self.report.downtime.pages_ns = ns(sent - saved);
        let answers = match (&missing, self.pull.take()) {
            (Some(missing), Some(pull)) => Some(self.answers(vm, pull, missing)?),
            _ => None,
        };
        self.link.send(&ToDestination::State(SavedState {
            sections: state.entries,
            bytes: ByteBuf::from(state.bytes),
            missing: missing.as_ref().map(|missing| ByteBuf::from(missing.to_bytes())),
        }))?;
        match self.link.receive("Ready", READY_MAX)? {
            ToSource::Ready => (),
            other => return Err(Error::unexpected("Ready", &other)),
        }
        let ready = Instant::now();
        self.report.downtime.state_ns = ns(ready - sent);
        Ok(Stop {
            stopped: at,
            ready,
            answers,
        })
    }

    /// Hands the VM over, which was let go of here. From here on nothing is an error that has it go on here by itself.
    fn commit(mut self, vm: &mut dyn SourceVm, stop: Stop) -> Result<Report, Error> {
        self.request.status.step(|progress| progress.phase = Phase::HandedOver);
        self.link.connection().watch_nothing();
        let before = self.link.connection().bytes_written();
        let handoff = ToDestination::Handoff {
            generation: self.reservation.generation,
        };
        // ═══ THE COMMIT POINT ═══
        let sent = self.link.send(&handoff);
        if let Err(error) = sent
            && self.link.connection().bytes_written() == before
        {
            // Not a byte was taken: nobody can have heard of it.
            vm.resume();
            return Err(self.link.part(error));
        }
        match self.link.receive("Running", RUNNING_MAX) {
            Ok(ToSource::Running { for_ns }) => self.runs_there(vm, stop, Duration::from_nanos(for_ns)),
            Err(Error::Aborted(reason)) => {
                vm.resume();
                Err(Error::Declined(reason))
            }
            Ok(other) => Err(outcome_unknown(vm, &Error::unexpected("Running", &other))),
            Err(error) => Err(outcome_unknown(vm, &error)),
        }
    }

    /// It has run at the destination for so long: sends what is missing there, and ends.
    fn runs_there(mut self, vm: &mut dyn SourceVm, stop: Stop, already: Duration) -> Result<Report, Error> {
        let resumed = Instant::now().checked_sub(already);
        let resumed = resumed.map_or(stop.ready, |resumed| resumed.max(stop.ready));
        self.report.downtime.handoff_ns = ns(resumed - stop.ready);
        self.report.downtime.total_ns = ns(resumed - stop.stopped);
        match stop.answers.map_or(Ok(()), |answers| self.post_copy(answers)) {
            Ok(()) => (),
            Err(Failure::Lost(error)) => return Err(lost(vm, &error)),
            Err(Failure::Unknown(error)) => return Err(outcome_unknown(vm, &error)),
        }
        self.report.resume_ns = ns(resumed.elapsed());
        self.report.total_ns = ns(self.started.elapsed());
        self.report.wire_bytes += self.link.connection().bytes_moved() + self.outgoing.bytes_moved();
        self.request.status.step(|progress| progress.phase = Phase::Done);
        vm.gone(&Outcome::RunsThere);
        Ok(self.report)
    }

    /// Sends pages that are `missing` when they are wanted on `pull`.
    fn answers(&self, vm: &dyn SourceVm, pull: Connection, missing: &PageBits) -> Result<Answers, Error> {
        let options = pull_options(self.request.options);
        let on_thread = self.request.on_thread.clone();
        let outgoing = Outgoing::new(vm.images(), &self.reservation.images, &options, on_thread.clone());
        Answers::begin(pull, outgoing, missing.clone(), on_thread)
    }

    /// Asks, and waits for the answer.
    fn ask(&mut self, question: &ToDestination, expected: &'static str, limit: Duration) -> Result<ToSource, Error> {
        self.link.send(question)?;
        self.link.receive(expected, limit)
    }

    /// Whether somebody still wants it.
    fn check_wanted(&self) -> Result<(), Error> {
        if self.request.status.is_cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(())
    }
}

fn outcome_unknown(vm: &mut dyn SourceVm, error: &Error) -> Error {
    let reason = error.to_string();
    vm.gone(&Outcome::Unknown { reason: reason.clone() });
    Error::OutcomeUnknown(reason)
}

fn lost(vm: &mut dyn SourceVm, error: &Error) -> Error {
    let reason = error.to_string();
    vm.gone(&Outcome::Lost { reason: reason.clone() });
    Error::Lost(reason)
}

/// Pages of all images.
fn count(sets: &[PageBits]) -> u64 {
    sets.iter().map(PageBits::len).sum()
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
