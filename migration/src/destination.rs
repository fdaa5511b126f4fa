//! The destination's part of a migration: each state is a type that has what is legal in it, and one step makes the
//! next of it.
//!
//! ```text
//!  next_peer ──► ExpectReserve ─► ExpectPages ─► ExpectState ─► ExpectHandoff ─► runs
//!       └───────────────┴───────────────┴──────────────┴──────────────┘
//!                any error, the link's end, a wrong message: nothing is left of the VM
//! ```
//! An error after the VM was built drops it before the source is told, so that Abort always means: it does not run here,
//! and never will.

mod post_copy;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cutover_snapshot::section::{STATE_BYTES_MAX, Sections};
use uuid::Uuid;

use self::post_copy::{Following, Rest};
use crate::disk;
use crate::error::Error;
use crate::handshake::{self, Agreed, Built};
use crate::link::DestinationLink;
use crate::message::{Message, SavedState, ToDestination, ToSource};
use crate::pages::PageBits;
use crate::status::{Phase, Status};
use crate::streams::{Incoming, OnThread};
use crate::transport::{Connection, Listener};
use crate::vm::{ArrivingMemory, DestinationHost, DestinationVm, MEMORY_IMAGE};
use crate::wire::MESSAGE_BYTES_MAX;

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
    pull: Option<Pull>,
    /// Whether there is more than memory.
    moves_disks: bool,
    on_thread: OnThread,
}

/// The stream for what the guest waits for.
struct Pull {
    connection: Connection,
    pulled: Incoming,
    on_thread: OnThread,
}

/// All pages are in place, but those that may follow.
struct ExpectState<'a, Vm> {
    link: &'a mut DestinationLink,
    generation: u64,
    vm: Vm,
    incoming: Incoming,
    pull: Option<Pull>,
    /// The number of the round that may follow.
    next_round: u32,
}

/// Nothing is in the way of running it.
struct ExpectHandoff<'a, Vm> {
    link: &'a mut DestinationLink,
    generation: u64,
    /// Ends before the VM does.
    following: Option<Following>,
    vm: Vm,
    /// What pages came through, to be freed when the guest need not wait for that.
    spent: Option<Incoming>,
}

/// It runs.
struct Arrived<Running> {
    running: Running,
    /// What brings the rest of its memory.
    following: Option<Following>,
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
    let (mut link, agreed) = waiting.next_peer(0)?;
    let next = ExpectReserve {
        link: &mut link,
        session: agreed.session,
    };
    match take_in(next, waiting, host) {
        Ok(Arrived { running, following }) => {
            if let Some(following) = following {
                following.go_on(link);
            }
            Ok(running)
        }
        Err(error) => Err(link.part(error)),
    }
}

/// The states from the reservation on.
fn take_in<H: DestinationHost>(
    state: ExpectReserve<'_>,
    waiting: &Waiting<'_>,
    host: &mut H,
) -> Result<Arrived<<H::Vm as DestinationVm>::Running>, Error> {
    state
        .reserve(waiting, host)?
        .pages(waiting.status)?
        .state()?
        .handoff(waiting.status)
}

impl Waiting<'_> {
    /// The next peer that connects and has the `needed` features. Who does not, or does not speak the protocol, is turned
    /// away.
    ///
    /// # Errors
    /// Nobody waits any more.
    pub(crate) fn next_peer(&self, needed: u64) -> Result<(DestinationLink, Agreed), Error> {
        loop {
            let mut link = self.next_link()?;
            let welcomed = handshake::welcome(&mut link, needed).and_then(|agreed| {
                if agreed.features == needed {
                    return Ok(agreed);
                }
                Err(Error::Invalid {
                    what: "Hello",
                    reason: "what waits here is the standby of a VM that is replicated, not for one that moves"
                        .to_owned(),
                })
            });
            match welcomed {
                Ok(agreed) => return Ok((link, agreed)),
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) => {
                    let error = link.part(error);
                    tracing::warn!(%error, "turned away somebody who connected");
                }
            }
        }
    }

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
            let connection = match self.listener.accept(Some(until), &self.status.cancel_flag()) {
                Ok(Some(connection)) => connection,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "turned away somebody who connected");
                    continue;
                }
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

impl<'a> ExpectReserve<'a> {
    /// Builds the VM, or says why not.
    fn reserve<H: DestinationHost>(self, waiting: &Waiting<'_>, host: &mut H) -> Result<ExpectPages<'a, H::Vm>, Error> {
        let begun = || waiting.status.step(|progress| progress.phase = Phase::Reserving);
        let Built {
            reservation,
            vm,
            streams,
            pull,
        } = handshake::build(self.link, host, &waiting.on_thread, begun)?;
        let mut incoming = Incoming::new(vm.images(), &reservation.images, waiting.on_thread.clone());
        let last = streams - 1 + u8::from(pull);
        let mut connections = waiting.streams(self.session, last)?;
        let pull = pull.then(|| connections.remove(&last)).flatten();
        for connection in connections.into_values() {
            incoming.attach(connection);
        }
        let pull = pull.map(|connection| Pull {
            connection,
            pulled: Incoming::new(vm.images(), &reservation.images, waiting.on_thread.clone()),
            on_thread: waiting.on_thread.clone(),
        });
        Ok(ExpectPages {
            link: self.link,
            generation: reservation.generation,
            vm,
            incoming,
            pull,
            moves_disks: reservation.images.iter().any(|image| image.name != MEMORY_IMAGE),
            on_thread: waiting.on_thread.clone(),
        })
    }
}

impl<'a, Vm: DestinationVm> ExpectPages<'a, Vm> {
    /// Puts pages in place, round by round.
    fn pages(mut self, status: &Status) -> Result<ExpectState<'a, Vm>, Error> {
        let mut round = 1;
        loop {
            let last = match self.next_message(round)? {
                ToDestination::Round { number, last } if number == round => last,
                other => return Err(Error::unexpected("the next Round", &other)),
            };
            status.step(|progress| {
                progress.phase = if last { Phase::Stopping } else { Phase::PreCopy };
                progress.round = round;
            });
            self.incoming.receive_round(self.link.connection(), round, last)?;
            self.settle(last)?;
            if last {
                break;
            }
            self.link.send(&ToSource::RoundApplied { number: round })?;
            round += 1;
        }
        Ok(ExpectState {
            link: self.link,
            generation: self.generation,
            vm: self.vm,
            incoming: self.incoming,
            pull: self.pull,
            next_round: round + 1,
        })
    }
}

impl<Vm: DestinationVm> ExpectPages<'_, Vm> {
    /// Has what came of disks be permanent. In the `last` round that is little, and the guest waits for a thread to be made.
    fn settle(&mut self, last: bool) -> Result<(), Error> {
        let images = self.vm.images();
        let settle = || images.iter().try_for_each(|image| image.settle());
        let settled = if last || !self.moves_disks {
            settle()
        } else {
            self.link.alive_during(&self.on_thread, settle)?
        };
        settled.map_err(|error| Error::vm("make a disk permanent")(error.into()))
    }

    /// What comes before round number `round`, but for questions about disks, which come before the first.
    fn next_message(&mut self, round: u32) -> Result<ToDestination, Error> {
        loop {
            match self.link.receive("Round", NEXT_MAX)? {
                ToDestination::Compare { image, chunk } if round == 1 => self.tell_checksums(image, chunk)?,
                other => return Ok(other),
            }
        }
    }

    fn tell_checksums(&mut self, image: u8, chunk: u64) -> Result<(), Error> {
        let images = self.vm.images();
        let Some(image) = images.get(usize::from(image)).filter(|image| !image.starts_empty()) else {
            return Err(Error::Invalid {
                what: "a question about a disk",
                reason: format!("there is no older copy of image {image}"),
            });
        };
        let checksums = disk::checksums(image.as_ref(), chunk)
            .map_err(|error| Error::vm("read the older copy of a disk")(error.into()))?;
        self.link.send(&ToSource::Checksums { checksums })
    }
}

impl<'a, Vm: DestinationVm> ExpectState<'a, Vm> {
    /// Takes over the state.
    fn state(mut self) -> Result<ExpectHandoff<'a, Vm>, Error> {
        let pages = self.vm.images().first().map_or(0, |memory| memory.pages());
        let missing_bytes = usize::try_from(pages / 8).expect("some MiB");
        let bytes_max = usize::try_from(STATE_BYTES_MAX).expect("some MiB") + missing_bytes + MESSAGE_BYTES_MAX;
        let SavedState {
            sections,
            bytes,
            missing,
        } = match self.link.receive_long("State", NEXT_MAX, bytes_max)? {
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
        let missing = match missing {
            Some(bytes) => Some(PageBits::from_bytes(pages, &bytes).ok_or_else(|| Error::Invalid {
                what: "State",
                reason: format!("{} bytes are not a bit for each of {pages} pages", bytes.len()),
            })?),
            None => None,
        };
        let memory = self
            .vm
            .restore(&state, missing)
            .map_err(Error::vm("take over the state"))?;
        let (following, spent) = match (memory, self.pull) {
            (Some(memory), Some(pull)) => (Some(pull.follow(memory, self.incoming, self.next_round)?), None),
            (Some(_), None) => {
                return Err(Error::Invalid {
                    what: "State",
                    reason: "pages are missing, and there is no stream to ask for them".to_owned(),
                });
            }
            (None, _) => (None, Some(self.incoming)),
        };
        self.link.send(&ToSource::Ready)?;
        Ok(ExpectHandoff {
            link: self.link,
            generation: self.generation,
            following,
            vm: self.vm,
            spent,
        })
    }
}

impl Pull {
    /// Begins to ask for what the guest waits for of `memory`; the rest is that of `incoming`, as round `round`.
    fn follow(self, memory: Arc<dyn ArrivingMemory>, incoming: Incoming, round: u32) -> Result<Following, Error> {
        let rest = Rest {
            memory,
            incoming,
            pull: self.connection,
            pulled: self.pulled,
            round,
            on_thread: self.on_thread,
        };
        rest.follow()
    }
}

impl<Vm: DestinationVm> ExpectHandoff<'_, Vm> {
    /// Runs the VM: it is this host's.
    fn handoff(self, status: &Status) -> Result<Arrived<Vm::Running>, Error> {
        match self.link.receive("Handoff", HANDOFF_MAX)? {
            ToDestination::Handoff { generation } if generation == self.generation => (),
            other => return Err(Error::unexpected("Handoff of the reserved generation", &other)),
        }
        let (running, since) = self.vm.run().map_err(Error::vm("run the VM"))?;
        // It runs, whether the source hears of it or not.
        self.link.connection().watch_nothing();
        let for_ns = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if let Err(error) = self.link.send(&ToSource::Running { for_ns }) {
            tracing::warn!(%error, "the source may not know that the VM runs here");
        }
        // If it is a process of this host it waits for a processor, and whoever waits for it with it.
        thread::yield_now();
        drop(self.spent);
        status.step(|progress| progress.phase = Phase::Done);
        Ok(Arrived {
            running,
            following: self.following,
        })
    }
}
