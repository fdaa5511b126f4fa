//! Chunks of a disk that are not ready for its guest: requests for them wait until somebody has copied them.
//!
//! ```text
//!   hold(Writes, chunks)      a snapshot copies chunks out: until then they are not changed
//!   hold(Everything, chunks)  a restore copies chunks in: until then they are neither read nor changed
//!
//!            hold                           the Copier is dropped; if it held everything,
//!   Open ──────────► Held(chunks) ──────────────────────────────────────────────────────► Open
//!                      │      ▲             when all is released
//!      next_chunks ◄───┘      └─── release
//! ```
//! A disk asks before it begins a request. If the request has to wait, it stays in the queue, the disk serves no more
//! of them, and goes on when the gate's event tells that what the request wants is there: so nothing is taken from the
//! queue and kept here, and a pause or a reset has nothing to lose. Those behind it in the queue wait as well, for as
//! long as the [`Copier`] takes for the few chunks of one request, which come next. Requests without a range, a flush
//! above all, are never held.
//!
//! The gate is closed only while the disk is stopped: then no request is under way that it would have held.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::chunks::{CHUNK_SIZE, ChunkSet};
use super::request::Request;

/// Most chunks that [`Copier::next_chunks`] names at once: few enough that a request that begins to wait meanwhile does
/// not wait long, and as many as a chunk of a snapshot's image has.
pub const COPY_CHUNKS: u64 = 4;
/// Bytes of these.
pub const COPY_BYTES: u64 = COPY_CHUNKS * CHUNK_SIZE;

/// What is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Requests that change chunks.
    Writes,
    /// Also those that read them.
    Everything,
}

/// The disk's side.
pub(super) struct Gate {
    shared: Arc<Shared>,
}

/// The side of whoever makes chunks ready; there is one at a time. Several threads may work through it.
///
/// Dropping one that holds writes releases what is left. One that holds everything leaves it held: the guest must not
/// see what was never filled.
pub struct Copier {
    shared: Arc<Shared>,
}

struct Shared {
    /// Whether chunks are left, for the disk to look at before it takes the lock.
    closed: AtomicBool,
    state: Mutex<State>,
    /// Tells the disk that what it waits for is ready.
    ready: EventFd,
}

enum State {
    Open,
    Held(Held),
}

struct Held {
    holds: Holds,
    chunks: ChunkSet,
    /// How many these are.
    left: u64,
    /// Those of them that nobody copies yet.
    unclaimed: ChunkSet,
    /// Where copying in order goes on.
    next: u64,
    /// What the first request in the queue waits for.
    wanted: Option<Range<u64>>,
}

impl Gate {
    /// An open one.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                closed: AtomicBool::new(false),
                state: Mutex::new(State::Open),
                ready: EventFd::new(EFD_NONBLOCK)?,
            }),
        })
    }

    /// Holds `chunks`, unless somebody copies already. No request is under way.
    pub fn hold(&self, holds: Holds, chunks: ChunkSet) -> Option<Copier> {
        let mut state = self.shared.state();
        if matches!(*state, State::Held(_)) {
            return None;
        }
        let left = chunks.len();
        self.shared.closed.store(left > 0, Ordering::Release);
        *state = State::Held(Held {
            holds,
            unclaimed: chunks.clone(),
            chunks,
            left,
            next: 0,
            wanted: None,
        });
        Some(Copier {
            shared: self.shared.clone(),
        })
    }

    /// Whether somebody copies.
    pub fn is_held(&self) -> bool {
        matches!(*self.shared.state(), State::Held(_))
    }

    /// Whether somebody fills the disk, and has not filled all of it.
    pub fn holds_everything(&self) -> bool {
        matches!(&*self.shared.state(), State::Held(held) if held.holds == Holds::Everything && held.left > 0)
    }

    /// Whether `request` may begin. If not, the event comes when it is worth asking again.
    pub fn admits(&self, request: &Request) -> bool {
        if !self.shared.closed.load(Ordering::Acquire) {
            return true;
        }
        match &mut *self.shared.state() {
            State::Held(held) if held.holds_back(request) => {
                held.wanted = Some(request.bytes());
                false
            }
            State::Held(_) | State::Open => true,
        }
    }

    /// Has the event loop report with `data` that it is worth asking again.
    ///
    /// Edge-triggered: the event need not be read. One that came while nobody watched is reported at once.
    pub fn watch(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(
            &self.shared.ready,
            data,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        ))
    }

    /// Has the event loop report that no more.
    pub fn ignore(&self, ops: &mut EventOps) {
        if let Err(error) = ops.remove(Events::empty(&self.shared.ready)) {
            tracing::error!(%error, "cannot take a disk's gate off the event loop");
        }
    }
}

impl Copier {
    /// What to copy next, [`COPY_CHUNKS`] that follow each other or fewer: those a request waits for before all others,
    /// which come in order. Nothing when all were named.
    ///
    /// Each chunk is named once. It is nobody's but the caller's until it is [released](Self::release); copied, it is to
    /// be.
    pub fn next_chunks(&self) -> Option<Range<u64>> {
        match &mut *self.shared.state() {
            State::Held(held) => held.next(),
            State::Open => None,
        }
    }

    /// The chunks of `bytes` are ready: the guest may have them, as far as it could not before. Returns the bytes of those
    /// that were held, each counted as a whole one.
    pub fn release(&self, bytes: &Range<u64>) -> u64 {
        let State::Held(held) = &mut *self.shared.state() else {
            return 0;
        };
        let released = held.chunks.remove(bytes);
        held.unclaimed.remove(bytes);
        held.left -= released;
        self.shared.closed.store(held.left > 0, Ordering::Release);
        if held.has_what_is_wanted() {
            held.wanted = None;
            self.shared.tell();
        }
        released * CHUNK_SIZE
    }

    /// Bytes of the chunks that are still held, each counted as a whole one.
    pub fn bytes_left(&self) -> u64 {
        match &*self.shared.state() {
            State::Held(held) => held.left * CHUNK_SIZE,
            State::Open => 0,
        }
    }

    /// Whether a request waits.
    pub fn is_wanted(&self) -> bool {
        matches!(&*self.shared.state(), State::Held(held) if held.wanted.is_some())
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        let keeps = |held: &Held| held.holds == Holds::Everything && held.left > 0;
        if matches!(&*self.shared.state(), State::Held(held) if keeps(held)) {
            return;
        }
        self.release(&(0..u64::MAX));
        *self.shared.state() = State::Open;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        if let Err(error) = self.ready.write(1) {
            tracing::error!(%error, "cannot tell a disk that its chunks are ready");
        }
    }
}

impl Held {
    fn holds_back(&self, request: &Request) -> bool {
        (self.holds == Holds::Everything || request.changes_disk()) && self.chunks.first_of(&request.bytes()).is_some()
    }

    fn next(&mut self) -> Option<Range<u64>> {
        let wanted = self.wanted.as_ref().and_then(|bytes| self.unclaimed.first_of(bytes));
        let found = match wanted {
            Some(start) => self.unclaimed.run(start, COPY_CHUNKS)?,
            None => {
                let in_order = self.unclaimed.run(self.next, COPY_CHUNKS);
                let found = in_order.or_else(|| self.unclaimed.run(0, COPY_CHUNKS))?;
                self.next = found.end;
                found
            }
        };
        self.unclaimed.remove(&found);
        Some(found)
    }

    /// Whether a request waits, and need not any more.
    fn has_what_is_wanted(&self) -> bool {
        let wanted = self.wanted.as_ref();
        wanted.is_some_and(|bytes| self.chunks.first_of(bytes).is_none())
    }
}
