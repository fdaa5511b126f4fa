//! Pages of a cut: copied while the guest stands still, then kept until nobody can go back to before that cut.
//!
//! ```text
//!  PageBuffer   room that was touched before the pause ─► pages in the order they were copied, some of them twice
//!  CutPages     the same, with an index: the last copy of each
//! ```
//! Nothing is allocated in the pause unless the guest has changed far more than it did before.

use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_storeu_si128};

use cutover_devices::GuestMemory;
use cutover_migration::pages::{PAGE_BYTES, PageBits};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::Error;
use crate::dirty::{PAGE_SIZE, PageRange, PageSet};

/// Room that a buffer has at least: 16 MiB.
const ROOM_MIN: usize = 4096;

/// Pages by half of which a buffer grows at least that has no room.
const GROWTH_MIN: usize = 64;

/// A page's content.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Page(pub [u8; PAGE_BYTES]);

/// See the module.
#[derive(Default)]
pub struct PageBuffer {
    /// Numbers of the pages that were copied.
    numbers: Vec<u64>,
    /// Their content, and behind it what there is of room, which is touched.
    pages: Vec<Page>,
}

impl PageBuffer {
    /// Makes sure that there is room for `pages` more. Takes time, of which the pause then takes less.
    pub fn reserve(&mut self, pages: usize) {
        let needed = self.numbers.len() + pages.max(ROOM_MIN);
        if self.pages.len() < needed {
            self.pages.resize(needed, Page([0; PAGE_BYTES]));
        }
        self.numbers.reserve(needed - self.numbers.len());
    }

    /// Copies `pages` of `memory`. If the guest runs, some may be copied half before and half after a write: these are in
    /// the tracker's next set.
    ///
    /// # Errors
    /// They are not of this memory.
    pub fn copy(&mut self, memory: &GuestMemory, pages: &PageSet) -> Result<(), Error> {
        for range in pages.ranges() {
            self.copy_range(memory, pages, range)?;
        }
        Ok(())
    }

    fn copy_range(&mut self, memory: &GuestMemory, of: &PageSet, range: PageRange) -> Result<(), Error> {
        let bytes = usize::try_from(range.pages * PAGE_SIZE).expect("memory is mapped, so its size fits");
        let slice = memory
            .get_slice(GuestAddress(range.start), bytes)
            .map_err(Error::guest_read("pages of a cut"))?;
        let first = of
            .layout()
            .number(range.start)
            .expect("a page of the set is one of its layout");
        let source = slice.ptr_guard();
        for (number, offset) in (first..first + range.pages).zip((0..).step_by(PAGE_BYTES)) {
            let used = self.numbers.len();
            if used == self.pages.len() {
                self.pages.resize(2 * used.max(GROWTH_MIN), Page([0; PAGE_BYTES]));
            }
            // SAFETY: the slice has `range.pages` pages, of which this is one, and keeps them mapped.
            unsafe { copy_page(source.as_ptr().add(offset), &mut self.pages[used]) };
            self.numbers.push(number);
        }
        Ok(())
    }

    /// What was copied, of memory of `total` pages.
    pub fn seal(self, total: u64) -> CutPages {
        let mut numbers = PageBits::empty(total);
        let mut index: Vec<(u64, usize)> = self.numbers.iter().copied().zip(0..).collect();
        // The last copy of a page first, which is the one that is kept.
        index.sort_unstable_by_key(|&(number, slot)| (number, usize::MAX - slot));
        index.dedup_by_key(|&mut (number, _)| number);
        index.iter().for_each(|&(number, _)| numbers.insert(number));
        CutPages {
            numbers,
            index,
            buffer: self,
        }
    }

    /// Makes it empty, with room for twice as much as it had.
    fn clear(&mut self) {
        let room = 2 * self.numbers.len().max(ROOM_MIN);
        if self.pages.len() > 2 * room {
            self.pages.truncate(room);
            self.pages.shrink_to_fit();
        }
        self.numbers.clear();
    }
}

/// Copies a page that a guest may write meanwhile, sixteen bytes at a time: as fast as memory is, in every emulator too.
///
/// # Safety
/// `from` is the first of [`PAGE_BYTES`] bytes that are mapped.
unsafe fn copy_page(from: *const u8, to: &mut Page) {
    const STEP: usize = size_of::<__m128i>();
    let (from, to) = (from.cast::<__m128i>(), to.0.as_mut_ptr().cast::<__m128i>());
    for at in (0..PAGE_BYTES / STEP).step_by(8) {
        // SAFETY: both have PAGE_BYTES bytes, of which these are some; unaligned accesses are allowed, and every x86-64 CPU
        // has these instructions. What is read is but bytes, whatever the guest makes of them.
        unsafe {
            let piece: [__m128i; 8] = std::array::from_fn(|index| _mm_loadu_si128(from.add(at + index)));
            for (index, bytes) in piece.into_iter().enumerate() {
                _mm_storeu_si128(to.add(at + index), bytes);
            }
        }
    }
}

/// See the module.
pub struct CutPages {
    numbers: PageBits,
    /// Pages in ascending order, and where their content is.
    index: Vec<(u64, usize)>,
    buffer: PageBuffer,
}

impl CutPages {
    /// Which they are.
    pub fn numbers(&self) -> &PageBits {
        &self.numbers
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// What was in `page` at the cut, if it is one of them.
    pub fn get(&self, page: u64) -> Option<&[u8; PAGE_BYTES]> {
        let found = self.index.binary_search_by_key(&page, |&(number, _)| number).ok()?;
        Some(&self.buffer.pages[self.index[found].1].0)
    }

    /// All of them with their content.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8; PAGE_BYTES])> {
        self.index
            .iter()
            .map(|&(number, slot)| (number, &self.buffer.pages[slot].0))
    }

    /// Its room, for another cut.
    pub fn into_buffer(self) -> PageBuffer {
        let mut buffer = self.buffer;
        buffer.clear();
        buffer
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::Bytes;

    use super::*;
    use crate::dirty::Layout;

    const HIGH: u64 = 0x1000_0000;

    #[test]
    fn of_a_page_that_was_copied_twice_the_last_copy_counts() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 130 << 12), (GuestAddress(HIGH), 70 << 12)]);
        let memory = memory.expect("memory");
        let mut set = PageSet::empty(&Arc::new(Layout::of(&memory)));
        for address in [3 << 12, 4 << 12, HIGH + (2 << 12)] {
            set.insert_range(PageRange::page(address));
            memory.write_obj(address, GuestAddress(address + 4088)).expect("RAM");
        }
        let mut buffer = PageBuffer::default();
        buffer.reserve(3);
        buffer.copy(&memory, &set).expect("RAM");
        memory.write_obj(7_u64, GuestAddress((4 << 12) + 4088)).expect("RAM");
        let mut again = PageSet::empty(set.layout());
        again.insert_range(PageRange::page(4 << 12));
        buffer.copy(&memory, &again).expect("RAM");
        let cut = buffer.seal(200);
        assert!(cut.numbers().iter().eq([3, 4, 132]));
        let ends: Vec<_> = cut
            .iter()
            .map(|(page, content)| {
                (
                    page,
                    u64::from_le_bytes(content[4088..].try_into().expect("eight bytes")),
                )
            })
            .collect();
        assert_eq!(ends, [(3, 3 << 12), (4, 7), (132, HIGH + (2 << 12))]);
        assert!(cut.get(5).is_none());
    }

    #[test]
    fn a_buffer_that_is_too_small_grows() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), ROOM_MIN << 13)]).expect("memory");
        let all = PageSet::full(&Arc::new(Layout::of(&memory)));
        let mut buffer = PageBuffer::default();
        buffer.reserve(1);
        buffer.copy(&memory, &all).expect("RAM");
        assert_eq!(buffer.seal(2 * ROOM_MIN as u64).len(), 2 * ROOM_MIN);
    }
}
