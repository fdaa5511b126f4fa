//! A protected disk: what each epoch wrote, what it had at each cut, and the way back there.
//!
//! ```text
//!   guest ── write ──► kept? ── yes ─────────────────────────► image        DiskCut::read ──► log, or else image
//!                        │ no: it stays in the queue             │
//!                        └─► disk-undo ◄── what it had before ───┘          roll_back:  logs ══► image
//!                               └────────► log of this epoch ─► ready
//! ```
//! Before a chunk is changed for the first time in an epoch, what it had is kept (`log`). One copy serves both ends: the
//! guest may go on while the cut is being sent, and the disk can go back to it. As with the [`gate`](super::gate), which
//! a snapshot may use at the same time, nothing is taken from the queue and kept here: a request waits in the queue until
//! the thread `disk-undo` has seen to its chunks.
//!
//! Logs are in memory, at most [`LOG_BYTES_MAX`]: when that is used up, requests wait until a cut is permanent, and when
//! half of it is, an early checkpoint is asked for. So that one request never needs more than there can be, one that
//! changes more than [`REQUEST_BYTES_MAX`] at once is refused as not supported: drivers then write zeroes piece by piece.

mod copier;
mod cut;
mod log;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::cut::DiskCut;
use self::log::{Before, Logs};
use super::chunks::{CHUNK_SIZE, ChunkSet};
use super::disk::Disk;
use super::request::{Request, Status};
use super::written::WriteTracker;
use crate::virtio::DeviceError;
use crate::{CheckpointSoon, OnThread};

/// Most bytes of one disk that are kept at a time.
pub const LOG_BYTES_MAX: usize = 256 << 20;
/// Most bytes that a request may change while its disk is protected.
pub const REQUEST_BYTES_MAX: u64 = 64 << 20;

/// The disk's side.
pub struct Epochs {
    shared: Arc<Shared>,
    copier: Option<JoinHandle<()>>,
}

struct Shared {
    /// Whether the disk is protected, for requests to look at before they take the lock.
    active: AtomicBool,
    state: Mutex<State>,
    /// Tells the copier that there is something to do, or space to do it.
    work: Condvar,
    /// Tells the disk that what it waits for is kept.
    ready: EventFd,
    limit: usize,
}

#[derive(Default)]
struct State {
    /// How many times protection began or the disk went back; cuts from before are none any more.
    stretch: u64,
    protected: Option<Protected>,
}

struct Protected {
    logs: Logs,
    image: Arc<File>,
    size: u64,
    /// Chunks for which the first request in the queue waits.
    wanted: Range<u64>,
    soon: CheckpointSoon,
    /// Whether half of the limit was used up when that was last looked at.
    asked: bool,
}

impl Epochs {
    /// Those of a disk that is not protected.
    ///
    /// # Errors
    /// No event can be had.
    pub fn new() -> io::Result<Self> {
        Self::with_limit(LOG_BYTES_MAX)
    }

    fn with_limit(limit: usize) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                active: AtomicBool::new(false),
                state: Mutex::default(),
                work: Condvar::new(),
                ready: EventFd::new(EFD_NONBLOCK)?,
                limit,
            }),
            copier: None,
        })
    }

    /// Whether the disk is protected.
    pub fn are_active(&self) -> bool {
        self.shared.active.load(Ordering::Acquire)
    }

    /// Protects `disk`, which stands still, from `cut` on; what was written before that is `written`.
    pub fn begin(
        &mut self,
        disk: &Disk,
        cut: u64,
        written: ChunkSet,
        soon: CheckpointSoon,
        on_thread: &OnThread,
    ) -> Result<DiskCut, DeviceError> {
        self.end();
        let image = disk.file().clone();
        let mut state = self.shared.state();
        state.stretch += 1;
        state.protected = Some(Protected {
            logs: Logs::new(cut),
            image: image.clone(),
            size: disk.size(),
            wanted: 0..0,
            soon,
            asked: false,
        });
        let stretch = state.stretch;
        drop(state);
        match copier::spawn(self.shared.clone(), on_thread) {
            Ok(copier) => self.copier = Some(copier),
            Err(source) => {
                self.end();
                return Err(DeviceError::System {
                    action: "create a thread that keeps what a disk has",
                    source,
                });
            }
        }
        self.shared.active.store(true, Ordering::Release);
        Ok(DiskCut::new(self.shared.clone(), image, stretch, cut, written))
    }

    /// Protects it no more. Requests that wait go on.
    pub fn end(&mut self) {
        self.shared.active.store(false, Ordering::Release);
        self.shared.state().protected = None;
        self.shared.work.notify_all();
        if let Some(copier) = self.copier.take() {
            // A panic of the thread was reported by the panic hook when it happened.
            drop(copier.join());
            self.shared.tell();
        }
    }

    /// The disk stands still, and its epoch ends with `cut`. Returns what it was, if the disk is protected.
    pub fn cut(&self, cut: u64) -> Option<DiskCut> {
        let mut state = self.shared.state();
        let stretch = state.stretch;
        let protected = state.protected.as_mut()?;
        let chunks = protected.logs.cut(cut, &protected.wanted);
        let mut written = ChunkSet::none(protected.size);
        for chunk in chunks {
            written.insert(chunk * CHUNK_SIZE..(chunk + 1) * CHUNK_SIZE);
        }
        let image = protected.image.clone();
        Some(DiskCut::new(self.shared.clone(), image, stretch, cut, written))
    }

    /// `cut` is as if it had never been: what its epoch wrote belongs to the next one.
    pub fn invalidate(&self, cut: u64) {
        self.shared.change(|logs| logs.invalidate(cut));
    }

    /// `cut` is permanent: the disk need not go back to one before it.
    pub fn make_permanent(&self, cut: u64) {
        self.shared.change(|logs| logs.make_permanent(cut));
    }

    /// Writes back to the disk, which stands still, what it had at `cut`, and tells `writes`.
    pub fn roll_back(&self, cut: u64, writes: &WriteTracker) -> Result<(), DeviceError> {
        let mut state = self.shared.state();
        let Some(protected) = state.protected.as_mut().filter(|protected| protected.logs.knows(cut)) else {
            return Err(DeviceError::DiskCutGone { cut });
        };
        for (chunk, before) in protected.logs.changes_since(cut) {
            let bytes = protected.bytes_of(chunk);
            let written = protected.write_back(&bytes, before);
            // Also what failed may be there in part.
            writes.record(bytes);
            written.map_err(|source| DeviceError::DiskRollBack { cut, source })?;
        }
        protected.logs.went_back_to(cut);
        protected.wanted = 0..0;
        protected.asked = false;
        state.stretch += 1;
        Ok(())
    }

    /// `request`, unless it changes more than can be kept.
    pub fn check(&self, request: Request) -> Result<Request, Status> {
        let bytes = request.bytes();
        if self.are_active() && request.changes_disk() && bytes.end - bytes.start > REQUEST_BYTES_MAX {
            return Err(Status::Unsupported);
        }
        Ok(request)
    }

    /// Whether `request` may begin. If not, the event comes when it is worth asking again.
    pub fn admit(&self, request: &Request) -> bool {
        if !self.are_active() || !request.changes_disk() {
            return true;
        }
        let mut state = self.shared.state();
        let Some(protected) = &mut state.protected else {
            return true;
        };
        let chunks = chunks_of(&request.bytes());
        let admitted = protected.logs.admit(&chunks);
        if admitted {
            protected.wanted = 0..0;
        } else {
            protected.wanted = chunks;
            self.shared.work.notify_all();
        }
        admitted
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
            tracing::error!(%error, "cannot take a protected disk's event off the event loop");
        }
    }
}

impl Drop for Epochs {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the logs, after which there may be more space.
    fn change(&self, change: impl FnOnce(&mut Logs)) {
        if let Some(protected) = &mut self.state().protected {
            change(&mut protected.logs);
            protected.asked &= protected.logs.bytes() >= self.limit / 2;
        }
        self.work.notify_all();
    }

    /// Has `look` see what a chunk had at a cut, if the disk may have something else now.
    fn look_at<T>(
        &self,
        stretch: u64,
        cut: u64,
        chunk: u64,
        look: impl FnOnce(&Before) -> T,
    ) -> Result<Option<T>, DeviceError> {
        let state = self.state();
        match &state.protected {
            Some(protected) if state.stretch == stretch && protected.logs.knows(cut) => {
                Ok(protected.logs.at(cut, chunk).map(look))
            }
            _ => Err(DeviceError::DiskCutGone { cut }),
        }
    }

    /// Tells the disk that it is worth asking again.
    fn tell(&self) {
        if let Err(error) = self.ready.write(1) {
            tracing::error!(%error, "cannot tell a disk that its chunks are kept");
        }
    }
}

impl Protected {
    fn bytes_of(&self, chunk: u64) -> Range<u64> {
        chunk * CHUNK_SIZE..((chunk + 1) * CHUNK_SIZE).min(self.size)
    }

    fn write_back(&self, bytes: &Range<u64>, before: &Before) -> io::Result<()> {
        match before {
            Before::Zeroes => {
                let len = usize::try_from(bytes.end - bytes.start).expect("at most a chunk");
                self.image.write_all_at(&vec![0; len], bytes.start)
            }
            Before::Bytes(content) => self.image.write_all_at(content, bytes.start),
            Before::Unreadable(reason) => Err(io::Error::other(reason.clone())),
        }
    }
}

/// The numbers of the chunks that have some of `bytes`.
fn chunks_of(bytes: &Range<u64>) -> Range<u64> {
    if bytes.is_empty() {
        return 0..0;
    }
    bytes.start / CHUNK_SIZE..bytes.end.div_ceil(CHUNK_SIZE)
}
