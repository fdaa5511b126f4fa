//! Guest memory as the image that moves: its pages have the numbers they have in a snapshot.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use cutover_devices::GuestMemory;
use cutover_migration::pages::{PAGE_BYTES, PageBits};
use cutover_migration::vm::Image;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::dirty::{Layout, PAGE_SIZE, PageSet};

/// A page of zeros.
const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// See the module.
pub struct MemoryImage {
    memory: GuestMemory,
    layout: Layout,
}

impl MemoryImage {
    /// That of `memory`.
    pub fn of(memory: &GuestMemory) -> Self {
        Self {
            memory: memory.clone(),
            layout: Layout::of(memory),
        }
    }

    /// Calls `act` with the bytes of each slot that has some of `pages`: where they are in the guest's address space, and
    /// which those are of the bytes of `pages`.
    fn for_each_part(
        &self,
        pages: Range<u64>,
        mut act: impl FnMut(GuestAddress, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        if pages.end > self.pages() || pages.start > pages.end {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for slot in self.layout.slots() {
            let first = pages.start.max(slot.first_number);
            let end = pages.end.min(slot.first_number + slot.pages);
            if first < end {
                let address = slot.start + (first - slot.first_number) * PAGE_SIZE;
                let bytes = bytes(first - pages.start)?..bytes(end - pages.start)?;
                act(GuestAddress(address), bytes)?;
            }
        }
        Ok(())
    }

    /// Whether the monitor has written the page at `address` since the memory was mapped, or what it has written was last
    /// looked for.
    fn is_written(&self, address: GuestAddress) -> bool {
        self.memory
            .to_region_addr(address)
            .is_some_and(|(region, at)| usize::try_from(at.0).is_ok_and(|at| region.bitmap().dirty_at(at)))
    }
}

/// Bytes of so many pages.
fn bytes(pages: u64) -> io::Result<usize> {
    usize::try_from(pages * PAGE_SIZE).map_err(io::Error::other)
}

impl Image for MemoryImage {
    fn pages(&self) -> u64 {
        self.layout.pages()
    }

    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        self.for_each_part(pages, |address, part| {
            let into = into.get_mut(part).ok_or(io::ErrorKind::InvalidInput)?;
            self.memory.read_slice(into, address).map_err(io::Error::other)
        })
    }

    /// Marks the pages as written by the monitor.
    fn write(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        self.for_each_part(pages, |address, part| {
            let content = content.get(part).ok_or(io::ErrorKind::InvalidInput)?;
            self.memory.write_slice(content, address).map_err(io::Error::other)
        })
    }

    /// Of memory that nobody but [`write`](Self::write) has written, and of which nobody looks at what was written.
    fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.for_each_part(pages, |address, part| {
            for at in part.clone().step_by(ZEROS.len()) {
                let page = GuestAddress(address.0 + (at - part.start) as u64);
                if self.is_written(page) {
                    self.memory.write_slice(&ZEROS, page).map_err(io::Error::other)?;
                }
            }
            Ok(())
        })
    }

    fn starts_empty(&self) -> bool {
        true
    }

    /// Memory does not last.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The pages of `set` by their numbers.
pub fn numbered(set: &PageSet) -> PageBits {
    let layout: &Arc<Layout> = set.layout();
    let mut numbered = PageBits::empty(layout.pages());
    for slot in layout.slots() {
        numbered.insert_words(slot.first_number, set.words_of_slot(slot));
    }
    numbered
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIGH: u64 = 0x1000_0000;

    /// 130 pages from address 0 and 70 from another.
    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 130 << 12), (GuestAddress(HIGH), 70 << 12)]).expect("memory")
    }

    #[test]
    fn pages_are_read_and_written_by_their_numbers_across_the_gap() {
        let (source, destination) = (memory(), memory());
        for (page, address) in [(128_u64, 128 << 12), (129, 129 << 12), (130, HIGH), (131, HIGH + 4096)] {
            source.write_obj(page, GuestAddress(address)).expect("RAM");
        }
        let (from, to) = (MemoryImage::of(&source), MemoryImage::of(&destination));
        assert_eq!(from.pages(), 200);
        let mut content = vec![0; 4 << 12];
        from.read(128..132, &mut content).expect("RAM");
        to.write(128..132, &content).expect("RAM");
        let found: Vec<u64> = [128 << 12, 129 << 12, HIGH, HIGH + 4096]
            .map(|address| destination.read_obj(GuestAddress(address)).expect("RAM"))
            .to_vec();
        assert_eq!(found, [128, 129, 130, 131]);
    }

    #[test]
    fn pages_beyond_the_last_are_refused() {
        let image = MemoryImage::of(&memory());
        assert!(image.read(199..201, &mut [0; 2 << 12]).is_err());
        assert!(image.write(200..201, &[0; 1 << 12]).is_err());
        assert!(image.zero(0..u64::MAX).is_err());
        assert!(image.write(3..5, &[0; 1 << 12]).is_err(), "too little content");
    }

    #[test]
    fn a_page_that_became_zero_is_cleared_and_others_are_not_touched() {
        let spec = cutover_snapshot::spec::MemorySpec {
            size: cutover_snapshot::size::ByteSize::from_mib(32),
            shared: true,
            hugepages: false,
        };
        let memory = crate::memory::map(&spec).expect("memory");
        let image = MemoryImage::of(&memory);
        image.write(5..6, &[7; 1 << 12]).expect("RAM");
        image.zero(0..image.pages()).expect("RAM");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(5 << 12)).expect("RAM"), 0);
        let touched = image.pages() - crate::page_fault::untouched(&memory).expect("Linux tells").len();
        assert_eq!(touched, 1);
    }

    #[test]
    fn a_set_of_pages_has_their_numbers() {
        let layout = Arc::new(Layout::of(&memory()));
        let mut set = PageSet::empty(&layout);
        for address in [5 << 12, 129 << 12, HIGH, HIGH + (69 << 12)] {
            set.insert_range(crate::dirty::PageRange::page(address));
        }
        assert!(numbered(&set).iter().eq([5, 129, 130, 199]));
    }
}
