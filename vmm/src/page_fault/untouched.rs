//! Which pages of guest memory nobody has touched: they take no memory, and are zero.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use cutover_devices::GuestMemory;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion};

use crate::Error;
use crate::dirty::page_set::Slot;
use crate::dirty::{Layout, PAGE_SIZE, PageRange, PageSet};

/// What the kernel tells of each page of a process (Linux admin-guide/mm/pagemap).
const PAGEMAP: &str = "/proc/self/pagemap";
/// Bytes it takes for that, and what tells that the page is in memory, or in swap.
const ENTRY: usize = 8;
const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;

/// What fails if it fails.
const TELL: &str = "tell which guest memory is in use";

/// Entries that are read at a time.
const ENTRIES: usize = 4096;

/// Pages of `memory` that nobody has touched. They are zero until somebody writes them, which is in the dirty log. Of a
/// mapped file nothing is known, and what somebody has yet to fill is untouched too.
///
/// # Errors
/// The kernel does not tell.
pub fn untouched(memory: &GuestMemory) -> Result<PageSet, Error> {
    PageMap::open().and_then(|map| map.untouched(memory))
}

/// What the kernel tells of the pages of this process, for threads that may open no files.
pub struct PageMap(File);

impl PageMap {
    /// Opens it.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn open() -> Result<Self, Error> {
        File::open(PAGEMAP).map(Self).map_err(Error::os(TELL))
    }

    /// As [`untouched`].
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn untouched(&self, memory: &GuestMemory) -> Result<PageSet, Error> {
        let layout = Arc::new(Layout::of(memory));
        let mut pages = PageSet::empty(&layout);
        for (slot, region) in layout.slots().iter().zip(memory.iter()) {
            let shared = region.flags() & libc::MAP_SHARED != 0;
            match region.file_offset() {
                None => private(&self.0, slot, region.as_ptr().addr() as u64, &mut pages),
                Some(file) if shared => holes(slot, file, &mut pages),
                Some(_) => Ok(()),
            }
            .map_err(Error::os(TELL))?;
        }
        Ok(pages)
    }
}

/// Adds those pages of the anonymous memory of `slot`, mapped at `host`, that are nowhere.
fn private(pagemap: &File, slot: &Slot, host: u64, pages: &mut PageSet) -> io::Result<()> {
    let mut buffer = [0; ENTRIES * ENTRY];
    for part in slot.range().parts(ENTRIES as u64) {
        let first = (host + (part.start - slot.start)) / PAGE_SIZE;
        let entries = &mut buffer[..usize::try_from(part.pages).expect("a part is small") * ENTRY];
        pagemap.read_exact_at(entries, first * ENTRY as u64)?;
        let (entries, _) = entries.as_chunks();
        for (page, entry) in (0..).zip(entries) {
            if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED == 0 {
                pages.insert_range(PageRange::page(part.start + page * PAGE_SIZE));
            }
        }
    }
    Ok(())
}

/// Adds those pages of `slot`, which maps `file`, that the file has nothing for.
fn holes(slot: &Slot, file: &FileOffset, pages: &mut PageSet) -> io::Result<()> {
    let end = file.start() + slot.pages * PAGE_SIZE;
    let mut at = file.start();
    while at < end {
        // Past the last data there is only a hole.
        let data = match seek(file.file(), SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            Err(error) => return Err(error.into()),
        };
        pages.insert_range(PageRange {
            start: slot.start + (at - file.start()),
            pages: (data - at) / PAGE_SIZE,
        });
        if data == end {
            break;
        }
        at = seek(file.file(), SeekFrom::Hole(data))?;
    }
    Ok(())
}
