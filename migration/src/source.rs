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

mod rounds;

use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;
use uuid::Uuid;

use crate::error::Error;
use crate::link::SourceLink;
use crate::message::{SavedState, ToDestination, ToSource, VERSION, VERSION_OLDEST};
use crate::options::Options;
use crate::pages::PageBits;
use crate::report::Report;
use crate::status::{Phase, Status};
use crate::streams::{OnThread, Outgoing};
use crate::transport::{Connection, Endpoint, Security, connect};
use crate::vm::{Outcome, Reservation, SourceVm, Stopped};

/// How long the destination may take to say which version it speaks.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How long it may take to build the VM: it may have to look what it has of disks already.
const RESERVE_MAX: Duration = Duration::from_secs(300);
/// How long it may take to have the state in place; the guest stands still meanwhile.
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
    started: Instant,
    report: Report,
    /// How long a message and its answer take.
    round_trip: Duration,
    /// For each image what was sent before.
    sent_before: Vec<PageBits>,
    round: u32,
}

/// Times of the stop phase.
struct StopTimes {
    stopped: Instant,
    ready: Instant,
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
        Ok(times) => session.commit(vm, &times),
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
            reservation,
            started,
            report: Report::default(),
            round_trip: Duration::ZERO,
            sent_before,
            round: 0,
        })
    }

    /// Everything before the commit point.
    fn up_to_handoff(&mut self, vm: &mut dyn SourceVm) -> Result<StopTimes, Error> {
        let session = self.hello()?;
        self.reserve()?;
        self.attach(session)?;
        let left = self.pre_copy(vm)?;
        let times = self.stop_and_copy(vm, left)?;
        self.check_wanted()?;
        vm.hand_over().map_err(Error::vm("let go of the VM"))?;
        Ok(times)
    }

    /// Finds a version that both sides speak.
    fn hello(&mut self) -> Result<Uuid, Error> {
        let asked = Instant::now();
        let answer = self.ask(
            &ToDestination::Hello {
                oldest: VERSION_OLDEST,
                newest: VERSION,
                features: 0,
            },
            "Welcome",
            HELLO_MAX,
        )?;
        self.round_trip = asked.elapsed();
        match answer {
            ToSource::Welcome { version, session, .. } if (VERSION_OLDEST..=VERSION).contains(&version) => Ok(session),
            ToSource::Welcome { version, .. } => Err(Error::Version {
                theirs_min: version,
                theirs_max: version,
                ours_min: VERSION_OLDEST,
                ours_max: VERSION,
            }),
            other => Err(Error::unexpected("Welcome", &other)),
        }
    }

    /// Has the destination build the VM, or say why it cannot.
    fn reserve(&mut self) -> Result<(), Error> {
        self.request.status.step(|progress| progress.phase = Phase::Reserving);
        let reservation = serde_json::to_string(&self.reservation).map_err(|error| Error::Invalid {
            what: "a reservation",
            reason: error.to_string(),
        })?;
        let message = ToDestination::Reserve {
            reservation,
            streams: self.request.options.streams.max(1),
            pull: false,
            handed: Vec::new(),
        };
        match self.ask(&message, "Reserved", RESERVE_MAX)? {
            ToSource::Reserved => Ok(()),
            ToSource::Refused { reasons } => Err(Error::Refused(reasons)),
            other => Err(Error::unexpected("Reserved", &other)),
        }
    }

    /// Connects the other page streams.
    fn attach(&mut self, session: Uuid) -> Result<(), Error> {
        for stream in 1..self.request.options.streams {
            let connection = self.connect_stream(session, stream)?;
            self.outgoing.attach(connection);
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

    /// Stops the guest, sends what is left and the state, and waits until all of it is in place.
    fn stop_and_copy(&mut self, vm: &mut dyn SourceVm, mut left: Vec<PageBits>) -> Result<StopTimes, Error> {
        self.outgoing.lift_limit();
        let Stopped { dirty, state, at } = vm.stop().map_err(Error::vm("stop the guest"))?;
        self.report.downtime.stop_ns = ns(at.elapsed());
        for (left, dirty) in left.iter_mut().zip(&dirty) {
            left.union(dirty);
        }
        let (mut round, _) = self.send_round(&left, true)?;
        round.dirtied_pages = count(&dirty);
        self.report.downtime.pages_ns = round.took_ns;
        self.report.add_round(round);
        let sent = Instant::now();
        self.link.send(&ToDestination::State(SavedState {
            sections: state.entries,
            bytes: ByteBuf::from(state.bytes),
            missing: None,
        }))?;
        match self.link.receive("Ready", READY_MAX)? {
            ToSource::Ready => (),
            other => return Err(Error::unexpected("Ready", &other)),
        }
        self.report.downtime.state_ns = ns(sent.elapsed());
        Ok(StopTimes {
            stopped: at,
            ready: Instant::now(),
        })
    }

    /// Hands the VM over, which was let go of here. From here on nothing is an error that has it go on here by itself.
    fn commit(mut self, vm: &mut dyn SourceVm, times: &StopTimes) -> Result<Report, Error> {
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
            Ok(ToSource::Running) => {
                self.report.downtime.handoff_ns = ns(times.ready.elapsed());
                self.report.downtime.total_ns = ns(times.stopped.elapsed());
                self.report.total_ns = ns(self.started.elapsed());
                self.report.wire_bytes += self.link.connection().bytes_written();
                self.request.status.step(|progress| progress.phase = Phase::Done);
                vm.gone(&Outcome::RunsThere);
                Ok(self.report)
            }
            Err(Error::Aborted(reason)) => {
                vm.resume();
                Err(Error::Declined(reason))
            }
            Ok(other) => Err(outcome_unknown(vm, &Error::unexpected("Running", &other))),
            Err(error) => Err(outcome_unknown(vm, &error)),
        }
    }

    /// Whether somebody still wants it.
    fn check_wanted(&self) -> Result<(), Error> {
        if self.request.status.is_cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    fn ask(&mut self, question: &ToDestination, expected: &'static str, limit: Duration) -> Result<ToSource, Error> {
        self.link.send(question)?;
        self.link.receive(expected, limit)
    }
}

fn outcome_unknown(vm: &mut dyn SourceVm, error: &Error) -> Error {
    let reason = error.to_string();
    vm.gone(&Outcome::Unknown { reason: reason.clone() });
    Error::OutcomeUnknown(reason)
}

/// Pages of all images.
fn count(sets: &[PageBits]) -> u64 {
    sets.iter().map(PageBits::len).sum()
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
