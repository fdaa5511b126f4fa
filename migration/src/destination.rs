//! The destination's part of a migration: each state is a type that has what is legal in it, and one step makes the
//! next of it.
//!
//! ```text
//!  ExpectHello ─► ExpectReserve ─► ExpectPages ─► ExpectState ─► ExpectHandoff ─► runs
//!       └───────────────┴───────────────┴──────────────┴──────────────┘
//!                any error, the link's end, a wrong message: nothing is left of the VM
//! ```
//! An error after the VM was built drops it before the source is told, so that Abort always means: it does not run here,
//! and never will.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cutover_snapshot::manifest::IMAGES_MAX;
use cutover_snapshot::section::{STATE_BYTES_MAX, Sections};
use uuid::Uuid;

use crate::error::Error;
use crate::link::DestinationLink;
use crate::message::{Message, SavedState, ToDestination, ToSource, VERSION, VERSION_OLDEST};
use crate::options::STREAMS_MAX;
use crate::status::{Phase, Status};
use crate::streams::{Incoming, OnThread};
use crate::transport::{Connection, Listener};
use crate::vm::{Descriptors, DestinationHost, DestinationVm, Reservation};
use crate::wire::MESSAGE_BYTES_MAX;

/// How long a peer that connects may take to say who it is.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How long it may take from one message of the source to the next, rounds apart: the source may look for what it has
/// to send, or wait for its guest to stop.
const NEXT_MAX: Duration = Duration::from_secs(60);
/// How long all streams have to connect.
const ATTACH_MAX: Duration = Duration::from_secs(10);
/// Most connections of others that are turned away meanwhile.
const STRANGERS_MAX: usize = 64;
/// How long the source may take from Ready to Handoff.
const HANDOFF_MAX: Duration = Duration::from_secs(30);

/// A host that waits for a VM.
pub struct Waiting<'a> {
    /// Where it comes from.
    pub listener: &'a Listener,
    /// Where it says how far it has come, and learns that nobody waits any more.
    pub status: &'a Status,
    /// What its threads call first.
    pub on_thread: OnThread,
}

/// Somebody has connected.
struct ExpectHello<'a> {
    link: &'a mut DestinationLink,
}

/// Both sides speak the same.
struct ExpectReserve<'a> {
    link: &'a mut DestinationLink,
    session: Uuid,
}

/// The VM is built, and pages come.
struct ExpectPages<'a, Vm> {
    link: &'a mut DestinationLink,
    generation: u64,
    vm: Vm,
    incoming: Incoming,
}

/// All pages are in place.
struct ExpectState<'a, Vm> {
    link: &'a mut DestinationLink,
    generation: u64,
    vm: Vm,
}

/// Nothing is in the way of running it.
struct ExpectHandoff<'a, Vm> {
    link: &'a mut DestinationLink,
    generation: u64,
    vm: Vm,
}

/// Takes in the VM of the next source that connects, and runs it. Who connects and does not speak the protocol is
/// turned away.
///
/// # Errors
/// The host cannot take the VM, the source gave up, or the link broke: nothing is left of the VM here.
pub fn receive<H: DestinationHost>(
    waiting: &Waiting<'_>,
    host: &mut H,
) -> Result<<H::Vm as DestinationVm>::Running, Error> {
    loop {
        let mut link = waiting.next_link()?;
        let welcomed = ExpectHello { link: &mut link }.hello();
        let session = match welcomed {
            Ok(session) => session,
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(error) => {
                let error = link.part(error);
                tracing::warn!(%error, "turned away somebody who connected");
                continue;
            }
        };
        let next = ExpectReserve {
            link: &mut link,
            session,
        };
        return take_in(next, waiting, host).map_err(|error| link.part(error));
    }
}

/// The states from the reservation on.
fn take_in<H: DestinationHost>(
    state: ExpectReserve<'_>,
    waiting: &Waiting<'_>,
    host: &mut H,
) -> Result<<H::Vm as DestinationVm>::Running, Error> {
    state
        .reserve(waiting, host)?
        .pages(waiting.status)?
        .state()?
        .handoff(waiting.status)
}

impl Waiting<'_> {
    fn next_link(&self) -> Result<DestinationLink, Error> {
        self.status.step(|progress| progress.phase = Phase::Connecting);
        loop {
            match self.listener.accept(None, &self.status.cancel_flag()) {
                Ok(Some(connection)) => return Ok(self.link(connection)),
                Ok(None) => return Err(Error::Cancelled),
                Err(error) => tracing::warn!(%error, "turned away somebody who connected"),
            }
        }
    }

    fn link(&self, mut connection: Connection) -> DestinationLink {
        connection.watch(self.status.cancel_flag());
        DestinationLink::new(connection)
    }

    /// The connections of the streams from 1 to `last` of `session`.
    fn streams(&self, session: Uuid, last: u8) -> Result<BTreeMap<u8, Connection>, Error> {
        let until = Instant::now() + ATTACH_MAX;
        let mut streams = BTreeMap::new();
        for _ in 0..STRANGERS_MAX + usize::from(last) {
            if streams.len() == usize::from(last) {
                return Ok(streams);
            }
            let Some(connection) = self.listener.accept(Some(until), &self.status.cancel_flag())? else {
                break;
            };
            let mut link = self.link(connection);
            let left = until.saturating_duration_since(Instant::now());
            match link.receive("Attach", left) {
                Ok(ToDestination::Attach { session: of, stream }) if of == session && (1..=last).contains(&stream) => {
                    streams.insert(stream, link.into_connection());
                }
                Ok(other) => tracing::warn!(message = Message::name(&other), "turned away a stream of another"),
                Err(error) => tracing::warn!(%error, "turned away somebody who connected"),
            }
        }
        Err(Error::Silent {
            expected: "a connection for each page stream",
        })
    }
}

impl ExpectHello<'_> {
    /// Finds a version that both sides speak.
    fn hello(self) -> Result<Uuid, Error> {
        let (oldest, newest) = match self.link.receive("Hello", HELLO_MAX)? {
            ToDestination::Hello { oldest, newest, .. } => (oldest, newest),
            other => return Err(Error::unexpected("Hello", &other)),
        };
        let version = newest.min(VERSION);
        if version < oldest.max(VERSION_OLDEST) {
            return Err(Error::Version {
                theirs_min: oldest,
                theirs_max: newest,
                ours_min: VERSION_OLDEST,
                ours_max: VERSION,
            });
        }
        let session = Uuid::new_v4();
        self.link.send(&ToSource::Welcome {
            version,
            features: 0,
            session,
        })?;
        Ok(session)
    }
}

impl<'a> ExpectReserve<'a> {
    /// Builds the VM, or says why not.
    fn reserve<H: DestinationHost>(self, waiting: &Waiting<'_>, host: &mut H) -> Result<ExpectPages<'a, H::Vm>, Error> {
        let (reservation, streams) = match self.link.receive("Reserve", NEXT_MAX)? {
            ToDestination::Reserve {
                reservation, streams, ..
            } => (reservation, streams),
            other => return Err(Error::unexpected("Reserve", &other)),
        };
        waiting.status.step(|progress| progress.phase = Phase::Reserving);
        let reservation = read_reservation(&reservation, streams)?;
        let vm = match host.reserve(&reservation, Descriptors::new()) {
            Ok(vm) => vm,
            Err(reasons) => {
                self.link.send(&ToSource::Refused {
                    reasons: reasons.clone(),
                })?;
                return Err(Error::Refused(reasons));
            }
        };
        let mut incoming = Incoming::new(vm.images(), &reservation.images, waiting.on_thread.clone());
        self.link.send(&ToSource::Reserved)?;
        for connection in waiting.streams(self.session, streams - 1)?.into_values() {
            incoming.attach(connection);
        }
        Ok(ExpectPages {
            link: self.link,
            generation: reservation.generation,
            vm,
            incoming,
        })
    }
}

impl<'a, Vm: DestinationVm> ExpectPages<'a, Vm> {
    /// Puts pages in place, round by round.
    fn pages(mut self, status: &Status) -> Result<ExpectState<'a, Vm>, Error> {
        for round in 1.. {
            let last = match self.link.receive("Round", NEXT_MAX)? {
                ToDestination::Round { number, last } if number == round => last,
                other => return Err(Error::unexpected("the next Round", &other)),
            };
            status.step(|progress| {
                progress.phase = if last { Phase::Stopping } else { Phase::PreCopy };
                progress.round = round;
            });
            self.incoming.receive_round(self.link.connection(), round)?;
            if last {
                break;
            }
            self.link.send(&ToSource::RoundApplied { number: round })?;
        }
        Ok(ExpectState {
            link: self.link,
            generation: self.generation,
            vm: self.vm,
        })
    }
}

impl<'a, Vm: DestinationVm> ExpectState<'a, Vm> {
    /// Takes over the state.
    fn state(mut self) -> Result<ExpectHandoff<'a, Vm>, Error> {
        let bytes_max = usize::try_from(STATE_BYTES_MAX).expect("some MiB") + MESSAGE_BYTES_MAX;
        let SavedState { sections, bytes, .. } = match self.link.receive_long("State", NEXT_MAX, bytes_max)? {
            ToDestination::State(state) => state,
            other => return Err(Error::unexpected("State", &other)),
        };
        let state = Sections {
            entries: sections,
            bytes: bytes.into_vec(),
        };
        let state = state
            .into_state("the state that was received")
            .map_err(|error| Error::vm("take over the state")(error.into()))?;
        self.vm
            .restore(&state, None)
            .map_err(Error::vm("take over the state"))?;
        self.link.send(&ToSource::Ready)?;
        Ok(ExpectHandoff {
            link: self.link,
            generation: self.generation,
            vm: self.vm,
        })
    }
}

impl<Vm: DestinationVm> ExpectHandoff<'_, Vm> {
    /// Runs the VM: it is this host's.
    fn handoff(self, status: &Status) -> Result<Vm::Running, Error> {
        match self.link.receive("Handoff", HANDOFF_MAX)? {
            ToDestination::Handoff { generation } if generation == self.generation => (),
            other => return Err(Error::unexpected("Handoff of the reserved generation", &other)),
        }
        let running = self.vm.run().map_err(Error::vm("run the VM"))?;
        // It runs, whether the source hears of it or not.
        self.link.connection().watch_nothing();
        if let Err(error) = self.link.send(&ToSource::Running) {
            tracing::warn!(%error, "the source may not know that the VM runs here");
        }
        status.step(|progress| progress.phase = Phase::Done);
        Ok(running)
    }
}

/// A reservation that can be looked at: its numbers are those of a VM.
fn read_reservation(text: &str, streams: u8) -> Result<Reservation, Error> {
    let invalid = |reason: String| Error::Invalid {
        what: "a reservation",
        reason,
    };
    if !(1..=STREAMS_MAX).contains(&streams) {
        return Err(invalid(format!(
            "{streams} streams are none or more than {STREAMS_MAX}"
        )));
    }
    let reservation: Reservation = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
    if reservation.images.len() > IMAGES_MAX {
        return Err(invalid(format!("more than {IMAGES_MAX} images")));
    }
    Ok(reservation)
}
