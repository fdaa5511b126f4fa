//! Which pages a driver gives back: lists of page numbers, and buffers that are free pages.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::super::buffers::GuestBuffers;
use super::super::queue::QueueError;
use crate::GuestMemory;

/// Bytes of a page, whatever the guest's own pages are (`VIRTIO_BALLOON_PFN_SHIFT`).
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
const PAGE_SHIFT: u32 = 12;

/// Bytes of the number of a page.
const NUMBER_LEN: usize = 4;
/// Most numbers that are read of a list; Linux sends 256. The pages of the rest stay where they are.
const NUMBERS_MAX: usize = 1024;
/// Most bytes of free pages that are looked at of a report; Linux sends 32 blocks of 4 MiB. So stays the rest.
const REPORT_MAX: u64 = 1 << 30;

/// Consecutive pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Guest address of the first.
    pub start: u64,
    /// Bytes of all.
    pub bytes: u64,
}

/// The pages whose numbers are in `list`, each once, as far as they are of `memory`.
///
/// # Errors
/// The list cannot be read.
pub fn listed(list: &GuestBuffers, memory: &GuestMemory) -> Result<Vec<Pages>, QueueError> {
    let mut bytes = vec![0; list.len().min(NUMBERS_MAX * NUMBER_LEN)];
    let len = list.copy_to(&mut bytes)?;
    let (numbers, _) = bytes[..len].as_chunks();
    let mut starts: Vec<u64> = numbers
        .iter()
        .map(|number| u64::from(u32::from_le_bytes(*number)) << PAGE_SHIFT)
        .filter(|start| memory.address_in_range(GuestAddress(*start)))
        .collect();
    starts.sort_unstable();
    starts.dedup();
    let mut pages = Vec::<Pages>::new();
    for start in starts {
        match pages.last_mut() {
            Some(last) if last.start + last.bytes == start => last.bytes += PAGE_SIZE,
            _ => pages.push(Pages {
                start,
                bytes: PAGE_SIZE,
            }),
        }
    }
    Ok(pages)
}

/// The whole pages of `report`, whose buffers are guest memory.
pub fn reported(report: &GuestBuffers) -> Vec<Pages> {
    let mut left = REPORT_MAX;
    let pages = report.guest_ranges().filter_map(|(address, len)| {
        let start = address.0.next_multiple_of(PAGE_SIZE);
        let end = (address.0 + len as u64) & !(PAGE_SIZE - 1);
        let bytes = end.saturating_sub(start).min(left);
        left -= bytes;
        (bytes > 0).then_some(Pages { start, bytes })
    });
    pages.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::Bytes;

    use super::*;

    const HIGH: u64 = 0x1000_0000;

    fn memory() -> Arc<GuestMemory> {
        let ranges = [(GuestAddress(0), 0x10_0000), (GuestAddress(HIGH), 0x4000)];
        Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
    }

    fn buffers(memory: &Arc<GuestMemory>, ranges: &[(u64, usize)]) -> GuestBuffers {
        let mut buffers = GuestBuffers::new(memory.clone());
        for &(address, len) in ranges {
            buffers.push(GuestAddress(address), len).unwrap();
        }
        buffers
    }

    fn pages(pages: &[Pages]) -> Vec<(u64, u64)> {
        pages.iter().map(|pages| (pages.start, pages.bytes)).collect()
    }

    #[test]
    fn numbers_in_any_order_are_ranges_of_guest_memory() {
        let memory = memory();
        let numbers: [u32; 9] = [0x1_0003, 7, 5, 0x100, 6, u32::MAX, 7, 0x1_0000, 0x1_0004];
        memory
            .write_slice(&numbers.map(u32::to_le_bytes).concat(), GuestAddress(0x8000))
            .unwrap();
        // What is less than a number at the end is none; the list is in two pieces.
        let list = buffers(&memory, &[(0x8000, 10), (0x800a, 29)]);
        let found = listed(&list, &memory).unwrap();
        assert_eq!(
            pages(&found),
            [(0x5000, 0x3000), (HIGH, 0x1000), (HIGH + 0x3000, 0x1000)]
        );
    }

    #[test]
    fn of_a_list_without_end_the_beginning_is_read() {
        let memory = memory();
        let numbers: Vec<u8> = (0..256_u32).rev().flat_map(u32::to_le_bytes).collect();
        memory.write_slice(&numbers, GuestAddress(0x8000)).unwrap();
        let list = buffers(&memory, &[(0x8000, 1024), (0x8000, 0xf_0000)]);
        assert_eq!(pages(&listed(&list, &memory).unwrap()), [(0, 0x10_0000)]);
    }

    #[test]
    fn of_a_report_whole_pages_count() {
        let memory = memory();
        let report = buffers(
            &memory,
            &[(0x1000, 0x2000), (0x3001, 0x2000), (0x5001, 0xffe), (HIGH, 0x4000)],
        );
        let found = reported(&report);
        assert_eq!(pages(&found), [(0x1000, 0x2000), (0x4000, 0x1000), (HIGH, 0x4000)]);
    }

    #[test]
    fn of_a_report_without_end_the_beginning_counts() {
        let memory = memory();
        let all = (0, 0x10_0000);
        let report = buffers(&memory, &[all; 1024]);
        let bytes: u64 = reported(&report).iter().map(|pages| pages.bytes).sum();
        assert_eq!(bytes, REPORT_MAX);
        assert_eq!(reported(&buffers(&memory, &[])), []);
    }
}
