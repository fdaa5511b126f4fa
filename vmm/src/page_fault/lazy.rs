//! Filling memory from an image while the guest already runs.
//!
//! ```text
//!  fault ──► thread "page-fault":  reads the page, later those around it too ──► puts it
//!            threads "prefetch":   read and put what a guest wants first, as was noted when the last was restored, or
//!                                  what this one was about to write when the snapshot was made, and where a kernel
//!                                  begins
//!                                  ·  a rest, in which the guest comes to life; what it waited for is noted
//!                                  ·  read and put the rest in order
//!                                  nothing left: faults are the kernel's again; pages nobody touched are zero
//! ```
//! Pages are put under a lock, each once, so that a page that is there already is one somebody used too early. Every
//! thread has a reader of its own, and reads without the lock: a fault does not wait for what is read ahead. A page that
//! cannot be had ends the process: no guest runs on memory that is not what it was.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::early::{EARLY_PAGES_MAX, EarlyPages};
use cutover_snapshot::error::Error as SnapshotError;
use cutover_snapshot::image::{Image, KEPT_CHUNKS, Progress, Reader};
use cutover_snapshot::size::ByteSize;
use vm_memory::{Bytes, GuestAddress};

use super::end::{EndOnPanic, end_process, with_sources};
use super::faults::{Faults, spawn};
use super::space::Space;
use super::uffd::Mode;
use crate::Error;
use crate::dirty::{Layout, PAGE_SIZE, PageRange, PageSet};
use crate::reclaim::Kept;

/// Pages that are put for one fault, those around it, once the guest has come to life: who touches one page mostly touches
/// another one there. Before, it gets the page alone, if that can be read alone: of those around it, it wants one in six,
/// and to wait once more takes as long as to put four.
const AROUND_PAGES: u64 = 16;

/// Pages that are read before the guest runs if nothing is noted of what it wants first: those that it was about to write
/// when the snapshot was made, which it mostly wants, and after them [`KERNEL`].
const GUESSED_PAGES: u64 = 1024;

/// Pages where Linux is, unless it is moved (`CONFIG_PHYSICAL_START`), and has what runs all the time: interrupts, scheduler,
/// timers. Of the first 384 a guest that comes to life was seen to want one in four, of the others one in fourteen. They
/// are read until the guest runs: in that time the processor would wait for KVM.
const KERNEL: Range<u64> = 4096..4992;

/// How many pages a guest has to wait for before that is noted.
const NOTED_FROM: usize = 16;

/// Pages that are read ahead at a time.
const PIECE_PAGES: u64 = 64;

/// Chunks that a thread for faults keeps, besides one for each snapshot of the chain: pages around a fault that follow
/// each other in memory need not do so in the image.
const KEPT_FOR_FAULTS: usize = 4;

/// Most threads of each kind.
pub const WORKERS_MAX: usize = 64;

/// How far reading ahead stands back for everything else on the host (`setpriority`).
const PREFETCH_NICE: i32 = 10;

/// How long reading ahead pauses when what is wanted first is there, and when a page is waited for, for the first time: a
/// guest that wakes up touches pages all over its memory, and should have the processor to itself until it has come to
/// life.
const HEAD_START: Duration = Duration::from_millis(25);

/// Memory that is filled while the guest already runs. To be dropped only when nobody uses the memory any more: what is
/// not there by then does not come.
pub struct LazyMemory {
    shared: Arc<Shared>,
    /// Until they are joined.
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    faults: Faults,
    image: Image,
    filling: Mutex<Filling>,
    /// Whether anybody has waited for a page yet.
    is_in_use: AtomicBool,
    /// Notified when all is there, or nothing more will come.
    ended: Condvar,
}

struct Filling {
    /// Pages that are not there.
    missing: PageSet,
    /// Those of them that nobody has begun to read ahead.
    ahead: PageSet,
    /// Those to begin with.
    first: std::vec::IntoIter<PageRange>,
    /// How many of these are read before the guest has come to life.
    early: u64,
    /// Whether these are guesses, which are read only as long as nobody waits for a page.
    guesses: bool,
    /// What the guest waits for until it has come to life.
    waking: Option<Waking>,
    /// Words before this one have no such page.
    cursor: usize,
    /// Threads that read ahead.
    prefetching: usize,
    /// Called when all is there.
    done: Option<Box<dyn FnOnce() + Send>>,
    /// Has nothing be discarded that is there, until then.
    kept: Option<Kept>,
    stage: Stage,
}

/// What is to be noted of a guest that comes to life.
struct Waking {
    /// Numbers of the pages that it has waited for, at most [`EARLY_PAGES_MAX`].
    wanted: Vec<u64>,
    noted: EarlyPages,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Filling,
    /// All is there.
    Complete,
    /// Nobody needs the rest.
    Abandoned,
}

/// Why a page cannot be had.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Image(#[from] SnapshotError),
    #[error("the kernel does not tell of page faults: {0}")]
    Faults(io::Error),
    #[error("cannot put pages of the guest (if they exist, somebody used them too early): {0}")]
    Put(io::Error),
}

impl LazyMemory {
    /// Begins to fill `memory`, which nobody has touched, from `image`: with as many threads for faults as `workers`, and
    /// as many that read ahead, beginning with what is `noted`; each calls `on_thread` first. Calls `done` when all is
    /// there.
    ///
    /// # Errors
    /// The image is not of such a memory, or memory cannot be filled like that here; nothing has changed.
    pub fn start(
        memory: &GuestMemory,
        image: Image,
        noted: EarlyPages,
        workers: usize,
        on_thread: OnThread,
        done: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Error> {
        let space = Space::of_small_pages(memory)?;
        check_size(&space.layout, &image)?;
        let missing = PageSet::full(&space.layout);
        let early = noted.pages().iter().map(|pages| pages.end - pages.start).sum();
        let guesses = early == 0;
        let guessed = guesses.then_some(&KERNEL);
        let first: Vec<_> = (noted.pages().iter().chain(image.out_of_order()).chain(guessed))
            .flat_map(|pages| space.layout.numbered(pages.clone()))
            .flat_map(|range| range.parts(PIECE_PAGES))
            .collect();
        let workers = workers.clamp(1, WORKERS_MAX);
        let shared = Arc::new(Shared {
            filling: Mutex::new(Filling {
                ahead: missing.clone(),
                missing,
                first: first.into_iter(),
                early: if guesses { GUESSED_PAGES } else { early },
                guesses,
                waking: Some(Waking {
                    wanted: Vec::new(),
                    noted,
                }),
                cursor: 0,
                prefetching: workers,
                done: Some(Box::new(done)),
                kept: None,
                stage: Stage::Filling,
            }),
            is_in_use: AtomicBool::new(false),
            ended: Condvar::new(),
            faults: Faults::of(space, Mode::Missing)?,
            image,
        });
        let mut lazy = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..workers {
            lazy.spawn("page-fault", KEPT_FOR_FAULTS, &on_thread, Shared::serve)?;
            lazy.spawn("prefetch", KEPT_CHUNKS, &on_thread, Shared::prefetch)?;
        }
        Ok(lazy)
    }

    fn spawn(
        &mut self,
        name: &str,
        kept: usize,
        on_thread: &OnThread,
        run: fn(&Shared, &mut Reader) -> Result<(), Failure>,
    ) -> Result<(), Error> {
        let (shared, mut reader) = (self.shared.clone(), self.shared.image.reader_keeping(kept)?);
        let on_thread = on_thread.clone();
        let thread = spawn(name, move || {
            let _guard = EndOnPanic;
            on_thread();
            if let Err(failure) = run(&shared, &mut reader) {
                end_process(&format!("the VM's memory cannot be filled: {}", with_sources(&failure)));
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Has memory be `kept` until all is there.
    pub fn keep(&self, kept: Kept) {
        let mut filling = self.shared.filling();
        filling.kept = Some(kept).filter(|_| filling.stage == Stage::Filling);
    }

    /// How much is there.
    pub fn progress(&self) -> Progress {
        let total = self.shared.faults.space.layout.pages();
        let filling = self.shared.filling();
        Progress {
            done: (total - filling.ahead.len()) * PAGE_SIZE,
            total: total * PAGE_SIZE,
        }
    }

    /// Waits until all is there, or is no longer `wanted`: after that changed, whoever waits has to be
    /// [woken](Self::wake).
    pub fn wait(&self, wanted: &dyn Fn() -> bool) {
        let wait = |filling: &mut Filling| filling.stage == Stage::Filling && wanted();
        drop(self.shared.ended.wait_while(self.shared.filling(), wait));
    }

    /// Has those who wait look again whether they want to.
    pub fn wake(&self) {
        // Whoever holds the lock has looked already, or not yet.
        drop(self.shared.filling());
        self.shared.ended.notify_all();
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        self.shared.end(Stage::Abandoned);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that filled memory panicked");
            }
        }
    }
}

impl Shared {
    fn filling(&self) -> MutexGuard<'_, Filling> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes care of page faults until there are no more.
    fn serve(&self, reader: &mut Reader) -> Result<(), Failure> {
        let layout = &self.faults.space.layout;
        while let Some(page) = self.faults.next().map_err(Failure::Faults)? {
            self.is_in_use.store(true, Ordering::Relaxed);
            let around = layout.block(page.start, AROUND_PAGES);
            let (before, after) = around.split_at(page.start);
            let number = layout.number(page.start).expect("a page of the memory");
            if self.is_waking(number) && reader.at_once(number) == 1 {
                self.put_run(reader, page, Zeros::Put)?;
                continue;
            }
            // First what somebody waits for.
            let put = self.put_run(reader, after, Zeros::Put)?;
            let (_, after) = after.split_at(put.end());
            for rest in [after, before] {
                self.put_kept(reader, rest)?;
            }
        }
        Ok(())
    }

    /// Whether the guest still comes to life; then it is remembered that it waits for page `number`.
    fn is_waking(&self, number: u64) -> bool {
        let mut filling = self.filling();
        let Some(waking) = &mut filling.waking else {
            return false;
        };
        if (waking.wanted.len() as u64) < EARLY_PAGES_MAX {
            waking.wanted.push(number);
        }
        true
    }

    /// The guest has come to life: notes what it has waited for.
    fn has_woken(&self) {
        let waking = self.filling().waking.take();
        if let Some(Waking { wanted, noted }) = waking.filter(|waking| waking.wanted.len() >= NOTED_FROM)
            && let Err(error) = noted.note(wanted)
        {
            tracing::debug!(%error, "cannot note which pages are wanted first");
        }
    }

    /// Fills of `range` what the reader has at hand.
    fn put_kept(&self, reader: &mut Reader, mut range: PageRange) -> Result<(), Failure> {
        let layout = &self.faults.space.layout;
        while range.pages > 0 {
            let number = layout.number(range.start).expect("a page of the memory");
            let (is_kept, count) = reader.keeps(number);
            let (run, rest) = range.split_at(range.start + count.min(range.pages) * PAGE_SIZE);
            if is_kept {
                self.put_run(reader, run, Zeros::Leave)?;
            }
            range = rest;
        }
        Ok(())
    }

    /// Fills what is wanted first, and later everything in order, as far as others do not.
    fn prefetch(&self, reader: &mut Reader) -> Result<(), Failure> {
        while let Some(ranges) = self.next_early() {
            for range in ranges {
                self.put_all(reader, range, Zeros::Put)?;
            }
        }
        if let Err(error) = rustix::process::setpriority_process(None, PREFETCH_NICE) {
            tracing::debug!(%error, "cannot lower the priority of reading ahead");
        }
        self.faults.rest(HEAD_START).map_err(Failure::Faults)?;
        let mut has_rested = false;
        while let Some(ranges) = self.next_piece() {
            if !has_rested && self.is_in_use.load(Ordering::Relaxed) {
                has_rested = true;
                self.faults.rest(HEAD_START).map_err(Failure::Faults)?;
                self.has_woken();
            }
            for range in ranges {
                self.put_all(reader, range, Zeros::Leave)?;
            }
        }
        let mut filling = self.filling();
        filling.prefetching -= 1;
        let last = filling.prefetching == 0;
        drop(filling);
        if last {
            self.end(Stage::Complete);
        }
        Ok(())
    }

    /// Fills all of `range`.
    fn put_all(&self, reader: &mut Reader, mut range: PageRange, zeros: Zeros) -> Result<(), Failure> {
        while range.pages > 0 {
            let put = self.put_run(reader, range, zeros)?;
            range.start = put.end();
            range.pages -= put.pages;
        }
        Ok(())
    }

    /// The next pages to be read before the guest has come to life.
    fn next_early(&self) -> Option<Vec<PageRange>> {
        let mut filling = self.filling();
        if filling.early == 0 || (filling.guesses && self.is_in_use.load(Ordering::Relaxed)) {
            return None;
        }
        let ranges = filling.next_of_first()?;
        let pages = ranges.iter().map(|range| range.pages).sum();
        filling.early = filling.early.saturating_sub(pages);
        Some(ranges)
    }

    /// The next pages to be read ahead; none if all are there, or nobody needs them.
    fn next_piece(&self) -> Option<Vec<PageRange>> {
        let mut filling = self.filling();
        if filling.stage != Stage::Filling {
            return None;
        }
        if let Some(ranges) = filling.next_of_first() {
            return Some(ranges);
        }
        let Filling { ahead, cursor, .. } = &mut *filling;
        let ranges = ahead.take_first(cursor, PIECE_PAGES);
        Some(ranges).filter(|ranges| !ranges.is_empty())
    }

    /// Fills what is missing of the first pages of `range` that come together from the image; returns which these are.
    fn put_run(&self, reader: &mut Reader, range: PageRange, zeros: Zeros) -> Result<PageRange, Failure> {
        let Faults { space, uffd, .. } = &self.faults;
        let (run, content) = read(reader, &space.layout, range)?;
        let mut filling = self.filling();
        if filling.stage != Stage::Filling || (content.is_none() && zeros == Zeros::Leave) {
            return Ok(run);
        }
        for part in filling.missing.ranges_in(run) {
            let area = space.area(part);
            let put = match content {
                Some(content) => uffd.copy(area, part_of(content, run, part)),
                None => uffd.zero(area),
            };
            put.map_err(Failure::Put)?;
        }
        filling.missing.remove_range(run);
        filling.ahead.remove_range(run);
        Ok(run)
    }

    /// Ends filling.
    fn end(&self, stage: Stage) {
        let mut filling = self.filling();
        if filling.stage != Stage::Filling {
            return;
        }
        filling.stage = stage;
        self.faults.stop();
        let done = filling.done.take();
        if stage == Stage::Complete {
            self.faults.hand_back();
            filling.kept = None;
            drop(filling);
            done.into_iter().for_each(|done| done());
        }
        self.ended.notify_all();
    }
}

impl Filling {
    /// The next pages of those to begin with.
    fn next_of_first(&mut self) -> Option<Vec<PageRange>> {
        let Self { ahead, first, .. } = self;
        first.find_map(|range| {
            let ranges: Vec<_> = ahead.ranges_in(range).collect();
            ahead.remove_range(range);
            Some(ranges).filter(|ranges| !ranges.is_empty())
        })
    }
}

/// The part of `content`, which is that of `run`, that is the content of `part`.
fn part_of(content: &[u8], run: PageRange, part: PageRange) -> &[u8] {
    let at = |address| usize::try_from(address - run.start).expect("within the content");
    &content[at(part.start)..at(part.end())]
}

/// What is done about pages that are zero in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeros {
    /// They are put, as somebody waits for one.
    Put,
    /// They are left as they are: untouched, which is zero.
    Leave,
}

/// Fills `memory` from `image` before anybody uses it, where [`LazyMemory`] cannot be had.
///
/// # Errors
/// The image is not of such a memory, cannot be read, or is damaged.
pub fn fill(memory: &GuestMemory, image: &Image) -> Result<(), Error> {
    let layout = Layout::of(memory);
    check_size(&layout, image)?;
    let mut reader = image.reader()?;
    for slot in layout.slots() {
        let mut rest = slot.range();
        while rest.pages > 0 {
            let (run, content) = read(&mut reader, &layout, rest)?;
            if let Some(content) = content {
                let written = memory.write_slice(content, GuestAddress(run.start));
                written.map_err(Error::guest_write("the memory of a snapshot"))?;
            }
            rest.start = run.end();
            rest.pages -= run.pages;
        }
    }
    Ok(())
}

/// Those of the first pages of `range` that come together from the image, with their content unless it is zero.
fn read<'a>(
    reader: &'a mut Reader,
    layout: &Layout,
    range: PageRange,
) -> Result<(PageRange, Option<&'a [u8]>), SnapshotError> {
    const IN_IMAGE: &str = "the image has the pages of the memory, see check_size";
    let number = layout.number(range.start).expect("a page of the memory");
    let found = reader.at_most(number, range.pages)?.expect(IN_IMAGE);
    let pages = range.pages.min(found.count);
    let run = PageRange { pages, ..range };
    let bytes = usize::try_from(pages * PAGE_SIZE).expect("a part of memory that is mapped");
    Ok((run, found.bytes.map(|content| &content[..bytes])))
}

/// Whether `image` is one of memory laid out as `layout`.
fn check_size(layout: &Layout, image: &Image) -> Result<(), Error> {
    let is_memory = u64::from(image.page_bytes()) == PAGE_SIZE && image.pages() == layout.pages();
    is_memory.then_some(()).ok_or(Error::MemoryImage {
        image: ByteSize::from_bytes(image.pages() * u64::from(image.page_bytes())),
        memory: ByteSize::from_bytes(layout.pages() * PAGE_SIZE),
    })
}
