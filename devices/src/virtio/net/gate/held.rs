//! Copies of frames that wait at a gate, each with its epoch: those for the group and all others, as far as order goes.

use std::ops::AddAssign;

use vm_memory::GuestMemoryError;

use super::fifo::Fifo;
use super::state::{Class, Output, State};
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::net::HEADER_LEN;

/// Bytes of a MAC address.
const MAC_LEN: usize = 6;

/// How much is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Frames.
    pub frames: usize,
    /// Bytes that keeping them takes.
    pub bytes: usize,
}

/// See the module.
#[derive(Default)]
pub struct HeldFrames {
    inside: Fifo<Sent>,
    outside: Fifo<Sent>,
    /// The number of the next frame.
    next: u64,
    bytes: usize,
}

/// When a frame was sent.
struct Sent {
    /// Frames are numbered in the order of sending.
    number: u64,
    epoch: u64,
}

impl HeldFrames {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.inside.len() + self.outside.len() == 0
    }

    /// How much there is.
    pub fn len(&self) -> Held {
        Held {
            frames: self.inside.len() + self.outside.len(),
            bytes: self.bytes,
        }
    }

    /// Whether a frame of `len` bytes can be held too, if no more than `limit` bytes are to be.
    pub fn has_space(&self, len: usize, limit: usize) -> bool {
        self.bytes + Fifo::<Sent>::cost(len) <= limit
    }

    /// Holds a copy of `frame`, which is sent now.
    ///
    /// # Errors
    /// Guest memory that was there before is not there now.
    pub fn push(&mut self, frame: &GuestBuffers, output: &Output) -> Result<(), GuestMemoryError> {
        let mut head = [0; HEADER_LEN + MAC_LEN];
        let looked_at = frame.copy_to(&mut head)?;
        let (_, destination) = head
            .split_last_chunk::<MAC_LEN>()
            .expect("an address is behind the header");
        let class = output.class_of(*destination);
        let sent = Sent {
            number: self.next,
            epoch: output.epoch(),
        };
        self.of(class).push(frame.len(), sent, |copy| {
            let copied = frame.copy_to(copy);
            // The guest may change it meanwhile, but not to whom it goes.
            copy[..looked_at].copy_from_slice(&head[..looked_at]);
            copied.map(drop)
        })?;
        self.next += 1;
        self.bytes += Fifo::<Sent>::cost(frame.len());
        Ok(())
    }

    /// Of those that `state` allows to leave, the one that was sent first.
    pub fn first_of(&self, state: &State) -> Option<(Class, &[u8])> {
        let candidates = [(Class::Inside, &self.inside), (Class::Outside, &self.outside)];
        let firsts = candidates.into_iter().filter_map(|(class, fifo)| {
            let (sent, frame) = fifo.first()?;
            state.allows(class, sent.epoch).then_some((sent.number, class, frame))
        });
        let first = firsts.min_by_key(|(number, ..)| *number);
        first.map(|(_, class, frame)| (class, frame))
    }

    /// Takes the first of `class` off.
    pub fn pop(&mut self, class: Class) {
        self.bytes -= self.of(class).pop().unwrap_or_default();
    }

    /// Drops those that `state` says are not committed, which were sent last; returns how much these were.
    pub fn discard(&mut self, state: &State) -> Held {
        let mut discarded = Held::default();
        for fifo in [&mut self.inside, &mut self.outside] {
            while fifo.last().is_some_and(|sent| !state.is_committed(sent.epoch))
                && let Some(bytes) = fifo.pop_last()
            {
                discarded += Held { frames: 1, bytes };
            }
        }
        self.bytes -= discarded.bytes;
        discarded
    }

    /// Forgets them all, and gives their memory back.
    pub fn clear(&mut self) {
        *self = Self {
            next: self.next,
            ..Self::default()
        };
    }

    fn of(&mut self, class: Class) -> &mut Fifo<Sent> {
        match class {
            Class::Inside => &mut self.inside,
            Class::Outside => &mut self.outside,
        }
    }
}

impl AddAssign for Held {
    fn add_assign(&mut self, other: Self) {
        self.frames += other.frames;
        self.bytes += other.bytes;
    }
}
