//! What a guest tells of its memory (virtio 1.2 §5.5.6.4): pairs of a tag and a number, of which any may be missing.

use super::super::buffers::GuestBuffers;
use super::super::queue::QueueError;
use super::PAGE_SIZE;

/// Tags there are; Linux has the last six since 6.12.
const TAGS: usize = 16;
/// Bytes of a pair, `struct virtio_balloon_stat`: 16 bits and 64 bits.
const PAIR_LEN: usize = 10;
/// Most pairs that are read.
const PAIRS_MAX: usize = 64;

/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// The last that a driver told; see [`get`](Self::get).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatisticsBuffer([Option<u64>; TAGS]);

/// Number of a statistic (`VIRTIO_BALLOON_S_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are called what the specification and Linux call them")]
pub enum Tag {
    SwapIn = 0,
    SwapOut = 1,
    MajorFaults = 2,
    MinorFaults = 3,
    FreeMemory = 4,
    TotalMemory = 5,
    AvailableMemory = 6,
    DiskCaches = 7,
    HugetlbAllocations = 8,
    HugetlbFailures = 9,
    OomKill = 10,
    AllocStall = 11,
    AsyncScan = 12,
    DirectScan = 13,
    AsyncReclaim = 14,
    DirectReclaim = 15,
}

/// How a balloon does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Pages of 4 KiB that the host wants.
    pub target_pages: u32,
    /// Those that are in the balloon, as the driver says.
    pub actual_pages: u32,
    /// What the guest tells of its memory.
    pub guest: StatisticsBuffer,
}

impl Statistics {
    /// Whole MiB that the host wants.
    pub fn target_mib(&self) -> u32 {
        mib(self.target_pages)
    }

    /// Whole MiB that are in the balloon.
    pub fn actual_mib(&self) -> u32 {
        mib(self.actual_pages)
    }
}

fn mib(pages: u32) -> u32 {
    u32::try_from(u64::from(pages) * PAGE_SIZE / MIB).expect("fewer than there are pages")
}

impl StatisticsBuffer {
    /// What is in `buffer`; of several with one tag the last counts. Tags from a later specification are left out.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn read(buffer: &GuestBuffers) -> Result<Self, QueueError> {
        let mut bytes = [0; PAIRS_MAX * PAIR_LEN];
        let len = buffer.copy_to(&mut bytes)?;
        let mut found = Self::default();
        let (pairs, _) = bytes[..len].as_chunks::<PAIR_LEN>();
        for [tag_low, tag_high, value @ ..] in pairs {
            let tag = u16::from_le_bytes([*tag_low, *tag_high]);
            if let Some(place) = found.0.get_mut(usize::from(tag)) {
                *place = Some(u64::from_le_bytes(*value));
            }
        }
        Ok(found)
    }

    /// The number with this tag, in bytes if it is about memory, if the guest told it.
    pub fn get(&self, tag: Tag) -> Option<u64> {
        self.0[tag as usize]
    }
}
