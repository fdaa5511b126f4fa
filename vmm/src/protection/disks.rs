//! The disks of a protected VM: copied while the guest runs as those of a VM that moves, then cut with memory.
//!
//! ```text
//!             first cut              it is valid
//!  Watched ───────────────► Begun ───────────────► Cut, with each further one
//!     ▲                       │ it is not
//!     └───────────────────────┘
//! ```
//! While a disk is watched, what is written is what the standby still lacks of it. From the first cut on the disk itself
//! knows what was written in each epoch, and what it had before.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use cutover_devices::virtio::block::DiskCut;
use cutover_devices::virtio::block::chunks::ChunkSet;
use cutover_devices::{CheckpointSoon, OnThread};
use cutover_migration::epoch::PageSource;
use cutover_migration::pages::PageBits;

use crate::Error;
use crate::device_manager::DiskCuts;
use crate::dirty::PAGE_SIZE;
use crate::machine::Machine;
use crate::migration::MovingDisks;

/// How far the protection of a VM's disks is.
pub enum Disks {
    /// Their first cut is to come.
    Watched {
        /// Tells what is written.
        moving: MovingDisks,
        /// What of each was written before, and the standby does not have either; nothing of any if it is empty.
        left: Vec<PageBits>,
    },
    /// It is not decided yet whether their first cut counts.
    Begun {
        /// The cut.
        cut: u64,
        /// As in [`Watched`](Self::Watched).
        moving: MovingDisks,
        /// What of each is in the cut.
        left: Vec<PageBits>,
    },
    /// They know their epochs.
    Cut,
}

/// What a first cut of disks takes.
pub struct Begin<'a> {
    /// Called when a cut is wanted early.
    pub soon: &'a CheckpointSoon,
    /// What the threads of the disks call first.
    pub on_thread: &'a OnThread,
}

impl Disks {
    /// Takes cut `cut` of those of `machine`, which stands still.
    ///
    /// # Errors
    /// One of them cannot be protected. Nothing has changed.
    pub fn cut(&mut self, machine: &Machine, cut: u64, begin: &Begin<'_>) -> Result<Vec<Arc<DiskAtCut>>, Error> {
        let cuts = match self {
            Self::Cut => machine.devices.cut_disks(cut)?,
            Self::Begun { .. } => return Err(Error::NoSuchCut { cut }),
            Self::Watched { moving, left } => {
                let mut written = taken(moving, false)?;
                written
                    .iter_mut()
                    .zip(&*left)
                    .for_each(|(now, before)| now.union(before));
                // From here on, whatever happens, it is not told again.
                *left = written;
                let mut pages = left.iter();
                let chunks = |_: &str, size| {
                    pages
                        .next()
                        .map_or_else(|| ChunkSet::all(size), |set| chunks_of(set, size))
                };
                let cuts = machine
                    .devices
                    .begin_disk_epochs(cut, chunks, begin.soon, begin.on_thread)?;
                let (moving, left) = (std::mem::take(moving), std::mem::take(left));
                *self = Self::Begun { cut, moving, left };
                cuts
            }
        };
        Ok(at_cut(cuts))
    }

    /// Cut `number` counts.
    pub fn validate(&mut self, number: u64) {
        if matches!(self, Self::Begun { cut, .. } if *cut == number) {
            *self = Self::Cut;
        }
    }

    /// Cut `number` of those of `machine` does not count: the next one covers it.
    pub fn invalidate(&mut self, machine: &Machine, number: u64) {
        match self {
            Self::Watched { .. } => {}
            Self::Begun { moving, left, .. } => {
                machine.devices.end_disk_epochs();
                let (moving, left) = (std::mem::take(moving), std::mem::take(left));
                *self = Self::Watched { moving, left };
            }
            Self::Cut => machine.devices.invalidate_disk_cut(number),
        }
    }

    /// The disks of `machine`, which is new, are at `cut`, which is where the standby has them too.
    ///
    /// # Errors
    /// They cannot be protected.
    pub fn begin_again(&mut self, machine: &Machine, cut: u64, begin: &Begin<'_>) -> Result<(), Error> {
        let nothing = |_: &str, size| ChunkSet::none(size);
        machine
            .devices
            .begin_disk_epochs(cut, nothing, begin.soon, begin.on_thread)?;
        *self = Self::Cut;
        Ok(())
    }
}

/// What was written to each of `moving` since this was last asked; the `first` time all that may not be zero.
///
/// # Errors
/// One was replaced by another.
pub fn taken(moving: &MovingDisks, first: bool) -> Result<Vec<PageBits>, Error> {
    let taken = moving.take(first);
    taken.map_err(|source| {
        let action = "tell what was written to a disk";
        cutover_migration::Error::Vm { action, source }.into()
    })
}

fn at_cut(cuts: DiskCuts) -> Vec<Arc<DiskAtCut>> {
    cuts.into_iter().map(|(_, cut)| Arc::new(DiskAtCut(cut))).collect()
}

/// A disk as it was at a cut, page by page. The last page may be only partly on the disk.
pub struct DiskAtCut(DiskCut);

impl DiskAtCut {
    /// Pages that were written in the epoch.
    pub fn written(&self) -> PageBits {
        let chunks = self.0.written();
        let mut pages = PageBits::empty(chunks.disk_size().div_ceil(PAGE_SIZE));
        for bytes in chunks.ranges() {
            pages.insert_range(bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE));
        }
        pages
    }
}

impl PageSource for DiskAtCut {
    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        let size = self.0.written().disk_size();
        let bytes = pages.start * PAGE_SIZE..(pages.end * PAGE_SIZE).min(size);
        let len = bytes.end.checked_sub(bytes.start).ok_or(io::ErrorKind::InvalidInput)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let (on_disk, beyond) = into.split_at_mut_checked(len).ok_or(io::ErrorKind::InvalidInput)?;
        beyond.fill(0);
        self.0.read(bytes.start, on_disk).map_err(io::Error::other)
    }
}

/// The chunks of a disk of `size` bytes that have some of `pages`.
fn chunks_of(pages: &PageBits, size: u64) -> ChunkSet {
    let mut chunks = ChunkSet::none(size);
    for range in pages.ranges() {
        chunks.insert(range.start * PAGE_SIZE..(range.end * PAGE_SIZE).min(size));
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_in_the_chunks_that_have_them_up_to_the_end_of_the_disk() {
        let size: u64 = (192 << 10) + 512;
        let mut pages = PageBits::empty(size.div_ceil(PAGE_SIZE));
        pages.insert_range(15..17);
        pages.insert(48);
        let chunks = chunks_of(&pages, size);
        assert!(
            chunks.ranges().eq([0..128 << 10, 192 << 10..size]),
            "{:?}",
            chunks.ranges().collect::<Vec<_>>()
        );
    }
}
