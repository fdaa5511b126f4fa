//! Copying memory as it is at one moment while the guest goes on writing it.
//!
//! ```text
//!           protect                 freeze                       all copied, dropped, or failed
//!  Arming ──────────► Arming ─────────────────► Frozen ───────────────────────► Over
//!    write: the page is let go    write: the page is saved first      write: goes on
//!                                 copier: the next pages, in order
//! ```
//! One lock decides between a write and the copier which of them saves a page. Until one of them has, the page is
//! protected, so that what is copied is what was there when it was frozen.
//!
//! Pages that were never touched cannot be protected on kernels before 6.4, so they are made present first, which for
//! private memory takes no memory.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::error::Error as SnapshotError;
use cutover_snapshot::image::{PageSource, Pages};

use super::Unavailable;
use super::batch::Batch;
use super::faults::{Faults, spawn};
use super::space::{Space, populate};
use super::uffd::Mode;
use crate::Error;
use crate::dirty::{PAGE_SIZE, PageRange, PageSet};
use crate::reclaim::Kept;

/// Pages that are saved early, for writes, before a writer waits for the copier: 8 MiB. As many may be on their way into
/// the image at the same time.
pub const EARLY_PAGES_MAX: u64 = 2048;

/// Pages the copier copies at a time: a chunk of the image. A write waits at most that long for the lock.
const PIECE_PAGES: u64 = 64;

/// Pages that are protected at a time while the guest runs: 4 MiB.
const PROTECT_PAGES: u64 = 1024;

/// Pages that may lie between others whose protection is begun or ended by one call. A call costs about as much as so
/// many pages.
const GAP_PAGES: u64 = 16;

/// What fails if it fails.
const PROTECT: &str = "protect guest memory from writes";

/// Pages of guest memory that are copied while the guest goes on writing. Dropping it ends all protection.
pub struct CopyOnWrite {
    shared: Arc<Shared>,
    /// Until it is joined.
    thread: Option<JoinHandle<()>>,
    /// Has nothing be discarded before it is copied, and no protection be lost with it.
    kept: Option<Kept>,
}

struct Shared {
    faults: Faults,
    phase: Mutex<Phase>,
    /// Notified when a writer that waits for the copier should look again.
    progress: Condvar,
}

/// See the module.
enum Phase {
    Arming(Arming),
    Frozen(Frozen),
    Over(
        /// Why, if that was before all pages were copied.
        Option<io::Error>,
    ),
}

/// Pages that are about to be kept.
struct Arming {
    /// Those that are protected.
    protected: PageSet,
    /// Those that are known to be present, as they were protected once.
    present: PageSet,
}

/// Pages that are kept as they are.
struct Frozen {
    /// Bytes of all.
    bytes_total: u64,
    /// Those still to be saved, which are protected.
    pages: PageSet,
    /// Where the copier is: words before this one have no such page.
    cursor: usize,
    /// Those saved because they were written.
    early: Batch,
}

impl CopyOnWrite {
    /// Prepares for `memory`. The thread for its page faults calls `on_thread` first.
    ///
    /// # Errors
    /// Why memory cannot be copied like that here; nothing has changed.
    pub fn arm(memory: &GuestMemory, on_thread: OnThread) -> Result<Self, Unavailable> {
        let space = Space::of_small_pages(memory)?;
        let nothing = PageSet::empty(&space.layout);
        let faults = Faults::of(space, Mode::WriteProtect)?;
        // Kernels before 5.14 cannot: this is to be known now.
        populate(faults.space.area(PageRange::page(0))).map_err(Unavailable::Refused)?;
        let shared = Arc::new(Shared {
            faults,
            phase: Mutex::new(Phase::Arming(Arming {
                protected: nothing.clone(),
                present: nothing,
            })),
            progress: Condvar::new(),
        });
        let serving = shared.clone();
        let thread = spawn("page-fault", move || serving.serve(&on_thread))?;
        Ok(Self {
            shared,
            thread: Some(thread),
            kept: None,
        })
    }

    /// The same, that has memory be `kept` as long as it lives.
    pub fn keeping(mut self, kept: Kept) -> Self {
        self.kept = Some(kept);
        self
    }

    /// Protects `pages` ahead of [`freeze`](Self::freeze), which has less to do then. The guest may run: a page that is
    /// written is let go (it is in the dirty log then).
    ///
    /// # Errors
    /// The kernel refused.
    pub fn protect(&self, pages: &PageSet) -> Result<(), Error> {
        // The lock is let go after each part, so that writes that are noticed meanwhile do not wait for all of it.
        let mut parts = pages.ranges().flat_map(|range| range.parts(PROTECT_PAGES));
        parts
            .try_for_each(|part| match &mut *self.shared.phase() {
                Phase::Arming(arming) => arming.protect(&self.shared.faults, part),
                Phase::Frozen(_) | Phase::Over(_) => Ok(()),
            })
            .map_err(Error::os(PROTECT))
    }

    /// From here on `pages` are kept as they are now: a write to one saves it first. Nobody writes memory meanwhile.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn freeze(&self, pages: PageSet) -> Result<(), Error> {
        let mut phase = self.shared.phase();
        if let Phase::Arming(arming) = &mut *phase {
            // Under one lock: a fault that was noticed before the guest stopped may still be taken care of.
            let mut rest = pages.clone();
            rest.subtract(&arming.protected);
            let is_protected = |gap| arming.protected.gaps_in(gap).next().is_none();
            let ranges = joined(rest.ranges(), is_protected);
            let mut ranges = ranges.into_iter();
            ranges
                .try_for_each(|range| arming.protect(&self.shared.faults, range))
                .map_err(Error::os(PROTECT))?;
            *phase = Phase::Frozen(Frozen {
                bytes_total: pages.len() * PAGE_SIZE,
                pages,
                cursor: 0,
                early: Batch::with_room_for(EARLY_PAGES_MAX),
            });
        }
        Ok(())
    }

    /// The frozen pages. What is protected besides is let go when written, or when all is copied.
    pub fn into_source(self) -> FrozenPages {
        let bytes_total = match &*self.shared.phase() {
            Phase::Frozen(frozen) => frozen.bytes_total,
            Phase::Arming(_) | Phase::Over(_) => 0,
        };
        FrozenPages {
            memory: self,
            bytes_total,
            piece: Batch::with_room_for(PIECE_PAGES),
            early: Batch::with_room_for(EARLY_PAGES_MAX),
        }
    }
}

impl Drop for CopyOnWrite {
    fn drop(&mut self) {
        self.shared.end(None);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("page-fault thread panicked");
        }
    }
}

impl Shared {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn space(&self) -> &Space {
        &self.faults.space
    }

    /// Takes care of page faults until the end.
    fn serve(&self, on_thread: &OnThread) {
        // A panic too must not leave writers waiting.
        let _end = EndOnDrop(self);
        on_thread();
        let failure = loop {
            match self.faults.next() {
                Ok(Some(page)) => {
                    if let Err(error) = self.allow_write(page) {
                        break error;
                    }
                }
                Ok(None) => return,
                Err(error) => break error,
            }
        };
        self.end(Some(failure));
    }

    /// Lets the writer of `page` go on, who waits.
    fn allow_write(&self, page: PageRange) -> io::Result<()> {
        let must_wait = |phase: &mut Phase| match phase {
            Phase::Frozen(frozen) => frozen.early.is_full() && frozen.pages.contains(page.start),
            Phase::Arming(_) | Phase::Over(_) => false,
        };
        let waited = self.progress.wait_while(self.phase(), must_wait);
        match &mut *waited.unwrap_or_else(PoisonError::into_inner) {
            Phase::Arming(arming) => arming.protected.remove_range(page),
            Phase::Frozen(frozen) => frozen.save_early(self.space(), page)?,
            Phase::Over(_) => return Ok(()),
        }
        self.faults.uffd.unprotect(self.space().area(page))
    }

    /// Ends all protection; everybody goes on.
    fn end(&self, failure: Option<io::Error>) {
        let mut phase = self.phase();
        if matches!(*phase, Phase::Over(_)) {
            return;
        }
        *phase = Phase::Over(failure);
        self.faults.stop();
        self.faults.hand_back();
        self.progress.notify_all();
    }

    /// Fills one of the two empty batches with the next pages: `early` if many were saved early, or nothing else is
    /// left.
    fn next_batch(&self, piece: &mut Batch, early: &mut Batch) -> Result<(), Error> {
        let mut phase = self.phase();
        let frozen = match &mut *phase {
            Phase::Frozen(frozen) => frozen,
            Phase::Arming(_) => return Ok(()),
            Phase::Over(failure) => {
                return failure.take().map_or(Ok(()), |error| {
                    Err(Error::os("save pages before the guest writes them")(error))
                });
            }
        };
        if !frozen.early.is_half_full() {
            let ranges = frozen.pages.take_first(&mut frozen.cursor, PIECE_PAGES);
            for &range in &ranges {
                let copied = copy(self.space(), range, piece);
                copied.map_err(Error::os("copy guest memory"))?;
            }
            // No page of a gap is to be kept: those before the last one are copied by now.
            for range in joined(ranges, |_| true) {
                let unprotected = self.faults.uffd.unprotect(self.space().area(range));
                unprotected.map_err(Error::os("end the protection of guest memory"))?;
            }
        }
        if piece.is_empty() {
            std::mem::swap(early, &mut frozen.early);
        }
        drop(phase);
        self.progress.notify_all();
        piece.sort();
        early.sort();
        Ok(())
    }
}

impl Arming {
    /// Protects the pages of `range`.
    fn protect(&mut self, faults: &Faults, range: PageRange) -> io::Result<()> {
        for absent in self.present.gaps_in(range) {
            populate(faults.space.area(absent))?;
        }
        self.present.insert_range(range);
        faults.uffd.protect(faults.space.area(range))?;
        self.protected.insert_range(range);
        Ok(())
    }
}

impl Frozen {
    /// Saves `page`, which is about to be written, unless it is saved already.
    fn save_early(&mut self, space: &Space, page: PageRange) -> io::Result<()> {
        if self.pages.contains(page.start) {
            copy(space, page, &mut self.early)?;
            self.pages.remove_range(page);
        }
        Ok(())
    }
}

/// Ends protection if the page-fault thread ends in whatever way.
struct EndOnDrop<'a>(&'a Shared);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end(Some(io::Error::other("the page-fault thread has ended")));
    }
}

/// Copies the pages of `range` to `batch`.
fn copy(space: &Space, range: PageRange, batch: &mut Batch) -> io::Result<()> {
    let number = space.layout.number(range.start).ok_or(io::ErrorKind::NotFound)?;
    batch.add(&space.memory, range, number).map_err(io::Error::other)
}

/// `ranges`, which are in order, with those small gaps between them filled that `may_fill` allows.
fn joined(ranges: impl IntoIterator<Item = PageRange>, may_fill: impl Fn(PageRange) -> bool) -> Vec<PageRange> {
    let mut joined = Vec::<PageRange>::new();
    for range in ranges {
        let gap = joined.last().map(|last| PageRange {
            start: last.end(),
            pages: (range.start - last.end()) / PAGE_SIZE,
        });
        match joined.last_mut() {
            Some(last) if gap.is_some_and(|gap| gap.pages <= GAP_PAGES && may_fill(gap)) => {
                last.pages = (range.end() - last.start) / PAGE_SIZE;
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// The frozen pages of a guest that goes on. All protection ends with the last of them, or when this is dropped.
pub struct FrozenPages {
    memory: CopyOnWrite,
    bytes_total: u64,
    /// Pages on their way into the image, of those copied in order.
    piece: Batch,
    /// Pages on their way into the image, of those saved early.
    early: Batch,
}

impl PageSource for FrozenPages {
    fn bytes_total(&self) -> u64 {
        self.bytes_total
    }

    fn next_pages(&mut self) -> Result<Option<Pages<'_>>, SnapshotError> {
        let shared = &self.memory.shared;
        if self.piece.is_empty() && self.early.is_empty() {
            shared
                .next_batch(&mut self.piece, &mut self.early)
                .map_err(|error| SnapshotError::Source(Box::new(error)))?;
        }
        let batch = if self.piece.is_empty() {
            &mut self.early
        } else {
            &mut self.piece
        };
        if batch.is_empty() {
            shared.end(None);
        }
        Ok(batch.next())
    }
}
