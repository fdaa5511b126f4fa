//! Memory of a guest that runs though not all of it is there: the rest comes from the host that it moved away from
//! (post-copy).
//!
//! ```text
//!  guest ──── fault ────► wanted ──── numbers of pages, those waited for first ────► source
//!    ▲                                                                                  │
//!    └── goes on ◄── arrive, arrive_zero ◄──────── streams: what is wanted, and the rest ┘
//! ```
//! All memory has its faults handed over, but only some of it is missing. A page that is neither missing nor there was
//! never touched: it is zero, here as at the source, and nobody is asked for it. A page that is missing may be there all
//! the same, with content from before the guest last wrote it: so what is missing is dropped first.
//!
//! Pages are claimed under a lock and put without it, each once: several streams bring them, and bring some twice.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cutover_devices::GuestMemory;
use cutover_migration::pages::{PageBits, set_words};
use cutover_migration::vm::ArrivingMemory;
use cutover_snapshot::image::Progress;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::MemorySpec;
use vm_memory::GuestMemoryBackend;

use super::Unavailable;
use super::end::end_process;
use super::faults::Faults;
use super::space::{Area, Backing, Space, discard};
use super::uffd::{Mode, Uffd};
use crate::Error;
use crate::dirty::{Layout, PAGE_SIZE, PageRange, PageSet};
use crate::reclaim::Kept;

/// Pages of a block: with one that somebody waits for, the rest of its block is seen to too.
const BLOCK_PAGES: u64 = 16;

/// Most faults that are taken up at a time.
const FAULTS_MAX: usize = 64;

/// See the module. To be dropped when all is there, or nobody uses the memory any more: who touches what is missing then
/// finds zeros.
pub struct Arriving {
    faults: Faults,
    requests: Mutex<Requests>,
    /// Notified when all is there.
    ended: Condvar,
    /// Pages that are not there yet.
    left: AtomicU64,
}

struct Requests {
    /// Pages that nobody has brought.
    missing: PageSet,
    /// Those of them, and others, that the source was asked for.
    asked: PageSet,
    /// Pages that nobody has touched.
    untouched: PageSet,
    /// Whether all is there.
    complete: bool,
    /// Has nothing be discarded that is there, until then.
    kept: Option<Kept>,
}

/// Whether memory as `spec` has it could be that of a guest that runs before all of it is there.
///
/// # Errors
/// It is in huge pages, or the kernel lacks what it takes or does not permit it.
pub fn check_arriving(spec: &MemorySpec) -> Result<(), Unavailable> {
    let backing = match spec {
        MemorySpec { hugepages: true, .. } => return Err(Unavailable::HugePages),
        MemorySpec { shared: true, .. } => Backing::Shared,
        MemorySpec { .. } => Backing::Anonymous,
    };
    Uffd::open(Mode::Missing, backing).map(drop)
}

impl Arriving {
    /// From now on the `missing` pages of `memory` are to come; what they contain is dropped. The rest is there as far as
    /// the monitor has written it, or zero. Nobody uses `memory` just now.
    ///
    /// # Errors
    /// The kernel lacks what it takes or does not permit it, the memory is in huge pages, `missing` is of another VM, or
    /// somebody else takes care of the memory's faults.
    pub fn start(memory: &GuestMemory, missing: &PageBits) -> Result<Self, Error> {
        let space = Space::of_small_pages(memory)?;
        if missing.pages() != space.layout.pages() {
            return Err(Error::MemoryImage {
                image: ByteSize::from_bytes(missing.pages() * PAGE_SIZE),
                memory: ByteSize::from_bytes(space.layout.pages() * PAGE_SIZE),
            });
        }
        let mut expected = PageSet::empty(&space.layout);
        for pages in missing.ranges().flat_map(|numbers| space.layout.numbered(numbers)) {
            expected.insert_range(pages);
        }
        // Registered before anything is dropped: the kernel makes no huge pages of what is there meanwhile.
        let faults = Faults::of(space, Mode::Missing)?;
        let mut untouched =
            drop_stale(&faults.space, &expected).map_err(Error::os("drop what guest memory contained before"))?;
        untouched.subtract(&expected);
        Ok(Self {
            left: AtomicU64::new(expected.len()),
            requests: Mutex::new(Requests {
                missing: expected,
                untouched,
                asked: PageSet::empty(&faults.space.layout),
                complete: false,
                kept: None,
            }),
            ended: Condvar::new(),
            faults,
        })
    }

    /// Has memory be `kept` until all is there.
    pub fn keep(&self, kept: Kept) {
        let mut requests = self.requests();
        requests.kept = Some(kept).filter(|_| !requests.complete);
    }

    /// How much is there, of all memory.
    pub fn progress(&self) -> Progress {
        let total = self.layout().pages();
        Progress {
            done: (total - self.left.load(Ordering::Acquire)) * PAGE_SIZE,
            total: total * PAGE_SIZE,
        }
    }

    /// Waits until all is there, or is no longer `wanted`: after that changed, whoever waits has to be
    /// [woken](Self::wake).
    pub fn wait(&self, wanted: &dyn Fn() -> bool) {
        let wait = |requests: &mut Requests| !requests.complete && wanted();
        drop(self.ended.wait_while(self.requests(), wait));
    }

    /// Has those who wait look again whether they want to.
    pub fn wake(&self) {
        // Whoever holds the lock has looked already, or not yet.
        drop(self.requests());
        self.ended.notify_all();
    }

    /// Ends the process, as the guest cannot go on.
    fn end(&self, reason: &str) -> ! {
        let missing = ByteSize::from_bytes(self.left.load(Ordering::Acquire) * PAGE_SIZE);
        end_process(&format!(
            "the VM is lost: {missing} of its memory did not come from the host that it moved away from, and will not \
             come any more: {reason}"
        ))
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn layout(&self) -> &Layout {
        &self.faults.space.layout
    }

    /// Has `put` put what is missing of `pages`; it is told where, and how many bytes of them come before.
    fn bring(&self, pages: Range<u64>, put: impl Fn(Area, usize) -> io::Result<()>) -> io::Result<()> {
        if pages.start > pages.end || pages.end > self.layout().pages() {
            let message = format!("guest memory has no pages {} to {}", pages.start, pages.end);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        for range in self.layout().numbered(pages.clone()) {
            // In a statement of its own, so that the lock is not held while pages are put.
            let claimed = self.requests().claim(range);
            for part in claimed {
                let number = self.layout().number(part.start).expect("a page of the memory");
                let before = usize::try_from((number - pages.start) * PAGE_SIZE).map_err(io::Error::other)?;
                put(self.faults.space.area(part), before)?;
                self.left.fetch_sub(part.pages, Ordering::AcqRel);
            }
        }
        Ok(())
    }

    /// The numbers of pages that are wanted now, of which some wait, for up to `patience` for the first.
    fn next_wanted(&self, patience: Duration) -> io::Result<Vec<u64>> {
        let faults = self.faults.next_within(patience, FAULTS_MAX)?;
        let mut requests = self.requests();
        let untouched = requests.claim_untouched(&faults, self.layout());
        let wanted = requests.want(&faults, self.layout());
        drop(requests);
        for range in untouched {
            self.faults.uffd.zero(self.faults.space.area(range))?;
        }
        Ok(wanted)
    }
}

impl Requests {
    /// What is missing of `range`; it is up to the caller to put it.
    fn claim(&mut self, range: PageRange) -> Vec<PageRange> {
        let claimed = self.missing.ranges_in(range).collect();
        self.missing.remove_range(range);
        claimed
    }

    /// What nobody has touched around `pages`, which somebody waits for; it is up to the caller to have that be zero.
    fn claim_untouched(&mut self, pages: &[PageRange], layout: &Layout) -> Vec<PageRange> {
        let mut claimed = Vec::new();
        for page in pages {
            if self.untouched.contains(page.start) {
                let block = layout.block(page.start, BLOCK_PAGES);
                claimed.extend(self.untouched.ranges_in(block));
                self.untouched.remove_range(block);
            }
        }
        claimed
    }

    /// What the source is to be asked for as somebody waits for `pages`: these first, then what is around them.
    fn want(&mut self, pages: &[PageRange], layout: &Layout) -> Vec<u64> {
        let mut wanted = Vec::new();
        for page in pages {
            self.want_missing(*page, layout, &mut wanted);
        }
        for page in pages {
            self.want_missing(layout.block(page.start, BLOCK_PAGES), layout, &mut wanted);
        }
        wanted
    }

    fn want_missing(&mut self, range: PageRange, layout: &Layout, wanted: &mut Vec<u64>) {
        let missing = self.missing.ranges_in(range);
        for page in missing.flat_map(|range| range.parts(1)) {
            if !self.asked.contains(page.start) {
                self.asked.insert_range(page);
                wanted.extend(layout.number(page.start));
            }
        }
    }
}

impl ArrivingMemory for Arriving {
    fn wanted(&self, patience: Duration) -> Vec<u64> {
        self.next_wanted(patience).unwrap_or_else(|error| {
            self.end(&format!(
                "the kernel does not let page faults be taken care of: {error}"
            ))
        })
    }

    fn arrive(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        self.bring(pages, |area, before| {
            let part = content.get(before..).and_then(|rest| rest.get(..area.len()));
            self.faults.uffd.copy(area, part.ok_or(io::ErrorKind::InvalidInput)?)
        })
    }

    fn arrive_zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.bring(pages, |area, _| self.faults.uffd.zero(area))
    }

    fn complete(&self) {
        if self.left.load(Ordering::Acquire) > 0 {
            self.end("that host says that it has sent all");
        }
        self.faults.hand_back();
        let mut requests = self.requests();
        (requests.complete, requests.kept) = (true, None);
        drop(requests);
        self.ended.notify_all();
    }

    fn lost(&self, reason: &str) {
        self.end(reason);
    }
}

/// Drops what memory contains, but for what the monitor has written and is not `expected`; returns what is not there now.
fn drop_stale(space: &Space, expected: &PageSet) -> io::Result<PageSet> {
    let mut kept = PageSet::empty(&space.layout);
    for (slot, region) in space.layout.slots().iter().zip(space.memory.iter()) {
        for (word, bits) in set_words(&(**region).bitmap().get_and_reset()) {
            kept.insert(slot.first_word + word, bits);
        }
    }
    kept.subtract(expected);
    // What is neither kept nor expected is zero: so there are few ranges, however scattered what is expected.
    let mut dropped = PageSet::full(&space.layout);
    dropped.subtract(&kept);
    for range in dropped.ranges() {
        discard(space.area(range), space.backing == Backing::Shared)?;
    }
    Ok(dropped)
}
