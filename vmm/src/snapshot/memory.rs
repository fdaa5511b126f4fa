//! Guest memory as the source of an image: how its pages are numbered, and how they are read while nothing writes them.

use cutover_devices::GuestMemory;
use cutover_snapshot::error::Error as SnapshotError;
use cutover_snapshot::image::{PageSource, Pages};
use cutover_snapshot::manifest::MemoryRegion;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::dirty::{PAGE_SIZE, PageRange, PageSet};

/// Bytes that are handed over at once.
const PIECE: u64 = 256 << 10;

/// Where `memory` lies.
pub fn regions(memory: &GuestMemory) -> Vec<MemoryRegion> {
    let regions = memory.iter().map(|region| MemoryRegion {
        start: region.start_addr().raw_value(),
        bytes: region.len(),
    });
    regions.collect()
}

/// Bytes of `pages`.
pub fn bytes_of(pages: &PageSet) -> u64 {
    pages.len() * PAGE_SIZE
}

/// Pages of a guest that stands still.
pub struct StillMemory {
    memory: GuestMemory,
    /// What is left, last first.
    ranges: Vec<PageRange>,
    bytes_total: u64,
    piece: Vec<u8>,
}

impl StillMemory {
    /// `pages` of `memory`, which nobody writes until all are handed over.
    pub fn new(memory: &GuestMemory, pages: &PageSet) -> Self {
        let mut ranges: Vec<_> = pages.ranges().collect();
        ranges.reverse();
        Self {
            memory: memory.clone(),
            ranges,
            bytes_total: bytes_of(pages),
            piece: Vec::new(),
        }
    }

    /// Number of the page at `address` in the image: all pages there are, without the gap between regions.
    fn number(&self, address: u64) -> u64 {
        let below = self.memory.iter().map(|region| {
            let start = region.start_addr().raw_value();
            address.saturating_sub(start).min(region.len())
        });
        below.sum::<u64>() / PAGE_SIZE
    }
}

impl PageSource for StillMemory {
    fn bytes_total(&self) -> u64 {
        self.bytes_total
    }

    fn next_pages(&mut self) -> Result<Option<Pages<'_>>, SnapshotError> {
        let Some(range) = self.ranges.last_mut() else {
            return Ok(None);
        };
        let (start, pages) = (range.start, range.pages.min(PIECE / PAGE_SIZE));
        range.start += pages * PAGE_SIZE;
        range.pages -= pages;
        if range.pages == 0 {
            self.ranges.pop();
        }
        let bytes = usize::try_from(pages * PAGE_SIZE).expect("a piece is small");
        self.piece.resize(bytes, 0);
        self.memory
            .read_slice(&mut self.piece, GuestAddress(start))
            .map_err(|error| SnapshotError::Source(Box::new(error)))?;
        Ok(Some(Pages {
            first: self.number(start),
            bytes: &self.piece,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::dirty::page_set::Layout;

    #[test]
    fn pages_come_with_their_numbers_in_the_image_which_has_no_gap() {
        const HIGH: u64 = 0x1000_0000;
        let ranges = [(GuestAddress(0), 130 << 12), (GuestAddress(HIGH), 70 << 12)];
        let memory = GuestMemory::from_ranges(&ranges).expect("memory");
        for (number, address) in [
            (3_u64, 3 << 12),
            (129, 129 << 12),
            (130, HIGH),
            (199, HIGH + (69 << 12)),
        ] {
            memory.write_obj(number, GuestAddress(address)).expect("RAM");
        }
        let mut source = StillMemory::new(&memory, &PageSet::full(&Arc::new(Layout::of(&memory))));
        assert_eq!(source.bytes_total(), 200 << 12);
        let mut found = Vec::new();
        while let Some(pages) = source.next_pages().expect("RAM") {
            for (number, page) in (pages.first..).zip(pages.bytes.chunks_exact(4096)) {
                let value = u64::from_le_bytes(page[..8].try_into().expect("eight bytes"));
                found.push((number, value));
            }
        }
        let expected = (0..200).map(|number| {
            (
                number,
                if [3, 129, 130, 199].contains(&number) {
                    number
                } else {
                    0
                },
            )
        });
        assert!(found.into_iter().eq(expected));
    }
}
