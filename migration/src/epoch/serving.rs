//! What a standby does on its link, on a thread of its own: takes in what the primary says, and answers.
//!
//! ```text
//!  Seeding ── Round ► in place at once          Replicating ── Epoch ► verified ► Held
//!     └────── Seeded ─────────────────────────────► │  └────── RolledBack ► dropped
//! ```

use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use cutover_snapshot::section::{STATE_BYTES_MAX, Sections, State};

use super::StandbyLink;
use super::held::{Held, HeldEpoch};
use super::message::{Header, ToPrimary, ToStandby};
use super::standby::Notice;
use crate::batch::{HEADER_BYTES, RECORD_BYTES};
use crate::error::Error;
use crate::pages::PAGE_BYTES;
use crate::streams::{HeldBatch, Incoming};
use crate::vm::{Image, Reservation};
use crate::wire::MESSAGE_BYTES_MAX;

/// What the primary may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Rounds of pages.
    Seeding,
    /// Epochs.
    Replicating,
}

/// See the module.
pub struct Serving {
    link: StandbyLink,
    incoming: Incoming,
    held: Shared,
    notices: Sender<Notice>,
    /// How long the primary may be silent.
    silence: Duration,
    images: Vec<Arc<dyn Image>>,
    generation: u64,
    stage: Stage,
    /// Rounds and epochs that came so far.
    rounds: u32,
    /// Most bytes that an epoch may take.
    epoch_bytes_max: u64,
}

/// Epochs that one thread adds and another applies.
#[derive(Clone)]
pub struct Shared(Arc<(Mutex<Held>, Condvar)>);

impl Shared {
    /// Nothing yet.
    pub fn new(held: Held) -> Self {
        Self(Arc::new((Mutex::new(held), Condvar::new())))
    }

    /// Does something with them that takes a moment: nothing is sent, received or written.
    pub fn with<T>(&self, act: impl FnOnce(&mut Held) -> T) -> T {
        let (held, changed) = &*self.0;
        let done = act(&mut held.lock().unwrap_or_else(PoisonError::into_inner));
        changed.notify_all();
        done
    }

    /// Whether there is room, or will be until `patience` is over.
    fn has_room_within(&self, patience: Duration) -> bool {
        let (held, changed) = &*self.0;
        let held = held.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = changed.wait_timeout_while(held, patience, |held| !held.has_room() && !held.is_closed());
        waited.unwrap_or_else(PoisonError::into_inner).0.has_room()
    }
}

impl Serving {
    /// What serves the primary of the VM of `reservation`, which has these `images`.
    pub fn new(
        link: StandbyLink,
        reservation: &Reservation,
        images: Vec<Arc<dyn Image>>,
        incoming: Incoming,
        held: Shared,
        notices: Sender<Notice>,
        silence: Duration,
    ) -> Self {
        let page_bytes_max = (size_of::<HeldBatch>() + HEADER_BYTES + RECORD_BYTES + PAGE_BYTES) as u64;
        let pages: u64 = images.iter().map(|image| image.pages()).sum();
        Self {
            link,
            incoming,
            held,
            notices,
            silence,
            images,
            generation: reservation.generation,
            stage: Stage::Seeding,
            rounds: 0,
            epoch_bytes_max: pages.saturating_mul(page_bytes_max).saturating_add(STATE_BYTES_MAX),
        }
    }

    /// Takes in what the primary says until the link ends.
    pub fn run(mut self) {
        let ended = loop {
            if let Err(error) = self.step() {
                break error;
            }
        };
        let was_wanted = !matches!(ended, Error::Cancelled);
        let error = self.link.part(ended);
        if was_wanted {
            self.notify(Notice::PrimaryLost(error.to_string()));
        }
    }

    /// Hears one thing, and answers.
    fn step(&mut self) -> Result<(), Error> {
        let bytes_max = usize::try_from(STATE_BYTES_MAX).expect("some MiB") + MESSAGE_BYTES_MAX;
        let expected = match self.stage {
            Stage::Seeding => "Round or Seeded",
            Stage::Replicating => "Epoch",
        };
        match (self.stage, self.link.receive_long(expected, self.silence, bytes_max)?) {
            (Stage::Seeding, ToStandby::Round) => self.round(),
            (Stage::Seeding, ToStandby::Seeded) => {
                self.stage = Stage::Replicating;
                self.link.send(&ToPrimary::Seeded)?;
                self.notify(Notice::Seeded);
                Ok(())
            }
            (Stage::Replicating, ToStandby::Epoch(header)) => self.epoch(header),
            (Stage::Replicating, ToStandby::RolledBack { cut }) => {
                self.held.with(|held| held.drop_after(cut))?;
                self.link.send(&ToPrimary::RolledBack { cut })
            }
            (_, ToStandby::Alive) => {
                // A primary that waits for room hears of it at once, and otherwise long before it takes this side for lost.
                let room = self.held.has_room_within(self.silence / 4);
                self.link.send(&ToPrimary::Alive { room })
            }
            (_, other) => Err(Error::unexpected(expected, &other)),
        }
    }

    /// Puts pages in place as they come: nobody relies on them yet.
    fn round(&mut self) -> Result<(), Error> {
        self.rounds = self.rounds.wrapping_add(1);
        self.incoming
            .receive_round(self.link.connection(), self.rounds, false)?;
        for image in &self.images {
            image
                .settle()
                .map_err(|error| Error::vm("make a disk permanent")(error.into()))?;
        }
        self.link.send(&ToPrimary::RoundApplied)
    }

    /// Keeps an epoch as soon as all of it is here, and is what an epoch can be.
    fn epoch(&mut self, header: Header) -> Result<(), Error> {
        let Header {
            number,
            generation,
            sections,
            state,
        } = header;
        if generation != self.generation {
            return Err(invalid(format!(
                "it is of generation {generation}, where {} was reserved",
                self.generation
            )));
        }
        self.held.with(|held| held.check_next(number))?;
        let mut bytes = state.len() as u64;
        let state = read_state(Sections {
            entries: sections,
            bytes: state.into_vec(),
        })?;
        self.rounds = self.rounds.wrapping_add(1);
        let mut batches = Vec::new();
        while let Some(batch) = self.incoming.hold_batch(self.link.connection(), self.rounds)? {
            bytes += batch.bytes();
            if bytes > self.epoch_bytes_max {
                return Err(invalid(format!(
                    "number {number} has more than {} bytes, as many as the whole VM",
                    self.epoch_bytes_max
                )));
            }
            batches.push(batch);
        }
        let epoch = HeldEpoch {
            number,
            state,
            batches,
            bytes,
        };
        let room = self.held.with(|held| held.add(epoch).map(|()| held.has_room()))?;
        self.link.send(&ToPrimary::Holds { number, room })?;
        self.notify(Notice::Holds(number));
        Ok(())
    }

    fn notify(&self, notice: Notice) {
        // Whoever does not listen does not want to know.
        let _ = self.notices.send(notice);
    }
}

fn read_state(sections: Sections) -> Result<State, Error> {
    sections
        .into_state("the state of an epoch")
        .map_err(|error| Error::vm("read the state of an epoch")(error.into()))
}

fn invalid(reason: String) -> Error {
    Error::Invalid {
        what: "an epoch",
        reason,
    }
}
