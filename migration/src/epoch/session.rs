//! What a primary says on its link, and what it is answered: see [the module above](super).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;

use super::message::{Header, ToPrimary, ToStandby};
use super::{Epoch, Options, PROTECT, Part, PrimaryLink};
use crate::error::Error;
use crate::handshake::{self, Wanted};
use crate::link::SourceLink;
use crate::options;
use crate::pages::PageBits;
use crate::status::Status;
use crate::streams::{Outgoing, Pages, Sent};
use crate::transport::{Endpoint, Security, connect};
use crate::vm::Reservation;

/// How long the standby may take to have a round in place: while it is not seeded, nobody relies on it.
const APPLY_MAX: Duration = Duration::from_secs(60);

/// How long a standby may have no room for an epoch. What it holds becomes permanent long before, unless its group has
/// gone back: then nothing of it ever will, and another standby is of more use.
const ROOM_MAX: Duration = Duration::from_secs(30);

/// A link to a standby. Each call returns when that has answered; after an error the link is of no use but to
/// [part](Self::part).
pub struct Session {
    link: PrimaryLink,
    outgoing: Outgoing,
    options: Options,
    status: Status,
    generation: u64,
    reserved_at: Instant,
    /// Rounds and epochs sent so far.
    rounds: u32,
    /// Images of which the standby has an older copy, until they were sent whole.
    older: Vec<u8>,
    /// Whether the standby has room for an epoch.
    room: bool,
}

impl Session {
    /// Connects to the standby at `to`, and has it build the VM of `reservation`. Nothing is waited for any more once
    /// `let_go` is set.
    ///
    /// # Errors
    /// It cannot be reached, is none, or cannot build the VM.
    pub fn connect(
        reservation: &Reservation,
        to: &Endpoint,
        security: &Security,
        options: Options,
        let_go: Arc<AtomicBool>,
    ) -> Result<Self, Error> {
        let mut connection = connect(to, security)?;
        connection.watch(let_go);
        connection.silent_at_most(options.silence);
        let mut link = SourceLink::new(connection);
        let (older, reserved_at) = match agree(&mut link, reservation) {
            Ok(agreed) => agreed,
            Err(error) => return Err(link.part(error)),
        };
        let streams = options::Options {
            streams: 1,
            compression: options.compression,
            ..options::Options::default()
        };
        Ok(Self {
            link: PrimaryLink::new(link.into_connection()),
            // One stream is served by the thread that calls.
            outgoing: Outgoing::new(Vec::new(), &reservation.images, &streams, Arc::new(|| ())),
            options,
            status: Status::default(),
            generation: reservation.generation,
            reserved_at,
            rounds: 0,
            older,
            room: true,
        })
    }

    /// When the standby was asked to build the VM.
    pub fn reserved_at(&self) -> Instant {
        self.reserved_at
    }

    /// Sends pages that the standby puts in place at once.
    pub fn round(&mut self, mut parts: Vec<Part>) -> Result<Sent, Error> {
        for older in std::mem::take(&mut self.older) {
            // Where an image is not empty there, also pages that are zero have to be sent.
            if let Some(part) = parts.get_mut(usize::from(older)) {
                part.pages = PageBits::full(part.pages.pages());
            }
        }
        self.say(&ToStandby::Round)?;
        let sent = self.send(&parts)?;
        match self.link.receive("RoundApplied", APPLY_MAX)? {
            ToPrimary::RoundApplied => Ok(sent),
            other => Err(Error::unexpected("RoundApplied", &other)),
        }
    }

    /// Says that rounds are over.
    pub fn seeded(&mut self) -> Result<(), Error> {
        self.say(&ToStandby::Seeded)?;
        match self.receive("Seeded")? {
            ToPrimary::Seeded => Ok(()),
            other => Err(Error::unexpected("Seeded", &other)),
        }
    }

    /// Sends an epoch as soon as the standby has room for it.
    pub fn ship(&mut self, epoch: Epoch) -> Result<Sent, Error> {
        let until = Instant::now() + ROOM_MAX;
        while !self.room {
            if Instant::now() > until {
                return Err(Error::Silent {
                    expected: "room for an epoch",
                });
            }
            // A standby without room takes its time to answer.
            self.ask_alive()?;
        }
        let Epoch { number, parts, state } = epoch;
        self.say(&ToStandby::Epoch(Header {
            number,
            generation: self.generation,
            sections: state.entries,
            state: ByteBuf::from(state.bytes),
        }))?;
        let sent = self.send(&parts)?;
        match self.receive("Holds")? {
            ToPrimary::Holds { number: held, room } if held == number => {
                self.room = room;
                Ok(sent)
            }
            other => Err(Error::unexpected("Holds of the epoch that was sent", &other)),
        }
    }

    /// Has the standby drop what it holds after `cut`.
    pub fn roll_back(&mut self, cut: u64) -> Result<(), Error> {
        self.say(&ToStandby::RolledBack { cut })?;
        match self.receive("RolledBack")? {
            ToPrimary::RolledBack { cut: there } if there == cut => {
                // What was dropped there was sent.
                self.outgoing.forget();
                Ok(())
            }
            other => Err(Error::unexpected("RolledBack to the same cut", &other)),
        }
    }

    /// Asks whether the standby is there.
    pub fn ask_alive(&mut self) -> Result<(), Error> {
        self.say(&ToStandby::Alive)?;
        match self.receive("Alive")? {
            ToPrimary::Alive { room } => {
                self.room = room;
                Ok(())
            }
            other => Err(Error::unexpected("Alive", &other)),
        }
    }

    /// Ends the link as `error` says, and returns what there is to be told.
    pub fn part(&mut self, error: Error) -> Error {
        if matches!(error, Error::Cancelled) {
            self.let_go();
            return error;
        }
        self.link.part(error)
    }

    /// Says that the standby is not needed.
    pub fn let_go(&mut self) {
        self.link.connection().watch_nothing();
        let reason = "the VM needs this standby no more".to_owned();
        if let Err(error) = self.link.send(&ToStandby::Abort { reason }) {
            tracing::debug!(%error, "the standby does not hear that it is let go of");
        }
    }

    /// Sends pages, as the next round of batches.
    fn send(&mut self, parts: &[Part]) -> Result<Sent, Error> {
        self.rounds = self.rounds.wrapping_add(1);
        let parts = parts.iter().enumerate();
        let pages: Vec<_> = parts
            .map(|(image, part)| Pages {
                image,
                set: &part.pages,
                content: part.content.as_ref(),
                base: part.base.as_deref(),
            })
            .collect();
        self.outgoing
            .send_pages(self.link.connection(), self.rounds, &pages, &self.status)
    }

    fn say(&mut self, message: &ToStandby) -> Result<(), Error> {
        self.link.send_within(message, self.options.silence)
    }

    fn receive(&mut self, expected: &'static str) -> Result<ToPrimary, Error> {
        self.link.receive(expected, self.options.silence)
    }
}

/// Finds out that the peer is a standby, and has it build the VM. Returns which images are not empty there, and when it
/// was asked.
fn agree(link: &mut SourceLink, reservation: &Reservation) -> Result<(Vec<u8>, Instant), Error> {
    let agreed = handshake::hello(link, PROTECT)?;
    if agreed.features != PROTECT {
        return Err(Error::Invalid {
            what: "Welcome",
            reason: "it takes in VMs that move, and is no standby".to_owned(),
        });
    }
    let asked = Instant::now();
    let wanted = Wanted {
        streams: 1,
        ..Wanted::default()
    };
    Ok((handshake::reserve(link, reservation, wanted)?, asked))
}
