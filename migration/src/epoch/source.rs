//! The primary's end of a link of replication.
//!
//! ```text
//!  connect ─► round ─► round ─► … ─► seeded ─► ship ─► ship ─► roll_back ─► ship ─► …
//!                                       └─ keep_alive, when there is nothing else to say ─┘
//! ```
//! Every call returns when the standby has answered. After an error the standby is lost: it is told why, and the link ends.

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
use crate::vm::{ImageShape, Reservation};

/// How long the standby may take to have a round in place: while it is not seeded, nobody relies on it.
const APPLY_MAX: Duration = Duration::from_secs(60);

/// How to reach a standby.
pub struct Link<'a> {
    /// Where it listens.
    pub to: &'a Endpoint,
    /// What protects the link.
    pub security: &'a Security,
    /// How it is to be.
    pub options: Options,
    /// Set by somebody who does not want the standby any more: nothing is waited for then.
    pub cancelled: Arc<AtomicBool>,
}

/// A standby, as its primary sees it. One thread talks to it.
pub struct Replica {
    /// None if it is lost.
    link: Option<PrimaryLink>,
    outgoing: Outgoing,
    options: Options,
    status: Status,
    images: Vec<ImageShape>,
    generation: u64,
    reserved_at: Instant,
    /// Rounds and epochs sent so far.
    rounds: u32,
    /// Images of which the standby has an older copy, until they were sent whole.
    older: Vec<u8>,
    /// Whether the standby has room for an epoch.
    room: bool,
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
            cancelled,
        } = link;
        let mut connection = connect(to, security)?;
        connection.watch(cancelled);
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
            link: Some(PrimaryLink::new(link.into_connection())),
            outgoing: Outgoing::new(Vec::new(), &reservation.images, &streams, Arc::new(|| ())),
            options,
            status: Status::default(),
            images: reservation.images.clone(),
            generation: reservation.generation,
            reserved_at,
            rounds: 0,
            older,
            room: true,
        })
    }

    /// When the standby was asked to build the VM: it learned of it a little later, so that time it counts from there is
    /// never more than has passed.
    pub fn reserved_at(&self) -> Instant {
        self.reserved_at
    }

    /// Bytes that went over the link so far, both ways.
    pub fn bytes_moved(&mut self) -> u64 {
        self.link.as_mut().map_or(0, |link| link.connection().bytes_moved())
    }

    /// Sends pages while the guest runs, before it is protected: what is written meanwhile is in the next round, or in the
    /// first epoch. Returns when they are in place.
    ///
    /// # Errors
    /// The standby is lost.
    ///
    /// # Panics
    /// `parts` are not one for each image, each with as many pages as it has.
    pub fn round(&mut self, parts: &[Part]) -> Result<Sent, Error> {
        self.check(parts);
        self.or_part(|this, link| {
            // Where an image is not empty there, also pages that are zero have to be sent.
            let mut parts = parts.to_vec();
            for older in std::mem::take(&mut this.older) {
                if let Some(part) = parts.get_mut(usize::from(older)) {
                    part.pages = PageBits::full(part.pages.pages());
                }
            }
            link.send(&ToStandby::Round)?;
            let sent = this.send(link, &parts)?;
            match link.receive("RoundApplied", APPLY_MAX)? {
                ToPrimary::RoundApplied => Ok(sent),
                other => Err(Error::unexpected("RoundApplied", &other)),
            }
        })
    }

    /// From here on there are epochs, no rounds any more.
    ///
    /// # Errors
    /// The standby is lost.
    pub fn seeded(&mut self) -> Result<(), Error> {
        self.or_part(|this, link| {
            link.send(&ToStandby::Seeded)?;
            match link.receive("Seeded", this.options.silence)? {
                ToPrimary::Seeded => Ok(()),
                other => Err(Error::unexpected("Seeded", &other)),
            }
        })
    }

    /// Sends an epoch; returns when the standby holds all of it. Waits first until the standby has room for it, which is
    /// when others have become permanent.
    ///
    /// # Errors
    /// The standby is lost.
    ///
    /// # Panics
    /// As [`round`](Self::round).
    pub fn ship(&mut self, epoch: &Epoch) -> Result<Sent, Error> {
        self.check(&epoch.parts);
        self.or_part(|this, link| {
            while !this.room {
                this.ask_alive(link)?;
            }
            link.send(&ToStandby::Epoch(Header {
                number: epoch.number,
                generation: this.generation,
                sections: epoch.state.entries.clone(),
                state: ByteBuf::from(epoch.state.bytes.clone()),
            }))?;
            let sent = this.send(link, &epoch.parts)?;
            match link.receive("Holds", this.options.silence)? {
                ToPrimary::Holds { number, room } if number == epoch.number => {
                    this.room = room;
                    Ok(sent)
                }
                other => Err(Error::unexpected("Holds of the epoch that was sent", &other)),
            }
        })
    }

    /// The VM is again as it was at `cut`; returns when the standby holds nothing later.
    ///
    /// # Errors
    /// The standby is lost.
    pub fn roll_back(&mut self, cut: u64) -> Result<(), Error> {
        self.or_part(|this, link| {
            link.send(&ToStandby::RolledBack { cut })?;
            match link.receive("RolledBack", this.options.silence)? {
                ToPrimary::RolledBack { cut: there } if there == cut => Ok(()),
                other => Err(Error::unexpected("RolledBack to the same cut", &other)),
            }
        })
    }

    /// Asks whether the standby is there. To be called when nothing else was said for
    /// [`alive_every`](Options::alive_every): otherwise the standby takes its primary for lost.
    ///
    /// # Errors
    /// The standby is lost.
    pub fn keep_alive(&mut self) -> Result<(), Error> {
        self.or_part(Self::ask_alive)
    }

    fn ask_alive(&mut self, link: &mut PrimaryLink) -> Result<(), Error> {
        link.send(&ToStandby::Alive)?;
        match link.receive("Alive", self.options.silence)? {
            ToPrimary::Alive { room } => {
                self.room = room;
                Ok(())
            }
            other => Err(Error::unexpected("Alive", &other)),
        }
    }

    /// Sends pages, as the next round of batches.
    fn send(&mut self, link: &mut PrimaryLink, parts: &[Part]) -> Result<Sent, Error> {
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
            .send_pages(link.connection(), self.rounds, &pages, &self.status)
    }

    fn check(&self, parts: &[Part]) {
        let pages = parts.iter().map(|part| part.pages.pages());
        assert!(
            pages.eq(self.images.iter().map(|image| image.pages)),
            "parts that are not those of the images that were reserved"
        );
    }

    /// Says something on the link, which ends if that fails.
    fn or_part<T>(&mut self, say: impl FnOnce(&mut Self, &mut PrimaryLink) -> Result<T, Error>) -> Result<T, Error> {
        let mut link = self.link.take().ok_or(Error::StandbyLost)?;
        match say(self, &mut link) {
            Ok(value) => {
                self.link = Some(link);
                Ok(value)
            }
            Err(error) => Err(link.part(error)),
        }
    }
}

impl Drop for Replica {
    /// The standby learns that nothing follows.
    fn drop(&mut self) {
        let reason = "the VM needs this standby no more".to_owned();
        if let Some(mut link) = self.link.take()
            && let Err(error) = link.send(&ToStandby::Abort { reason })
        {
            tracing::debug!(%error, "the standby does not hear that it is let go of");
        }
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
