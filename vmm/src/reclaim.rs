//! Guest memory that its guest gives back: discarded, so that the host has it, or left as it is for now.
//!
//! ```text
//!  balloon ── pages that the guest does not need ──► Reclaim ── madvise, then a mark in the dirty bitmap
//!                                                      ▲
//!      snapshot, restore, post-copy ── Kept ───────────┘  while one of these lives, memory is left as it is
//! ```
//! A page that is discarded is zero when it is touched next; of a mapped file, it is what the file has. Both is a change of
//! what the page contains, and right where changes are:
//!
//! - **Dirty log** (incremental snapshots, rounds of a migration, cuts and the way back of a protected VM). The page is
//!   discarded first and marked then, as one that the monitor writes: whoever takes the mark reads what it is now, and
//!   whoever took it before finds it again in the next take. The devices are stopped when the last take is made. A way back
//!   to a cut writes what the shadow has to all that is marked since. Whatever notices the writes of vCPUs is not involved:
//!   a discarded page that is written again is a write as any other to KVM's bitmap and rings, and to a scan of page tables.
//! - **Pages nobody has touched** ([`untouched`](crate::page_fault::untouched)) are left out of a full snapshot, of a
//!   migration and of a standby: they are zero there. A discarded page is such a page, and is zero.
//! - **Guest memory that is a file** (`snapshot restore --trusted`): the page has what it had in the snapshot. A guest may
//!   not rely on what such pages contain: the balloon offers no `VIRTIO_BALLOON_F_PAGE_POISON`, see
//!   [`balloon`](cutover_devices::virtio::balloon). Nobody else sees it: it is this guest's own past.
//!
//! It is not right where somebody else decides what a page contains, and there it does not happen: the hint is ignored, and
//! the guest has given its memory back to nobody.
//!
//! - **A snapshot that copies memory behind the guest** ([`CopyOnWrite`](crate::page_fault::CopyOnWrite)). Its page would be
//!   lost before it is saved; and of one that it has protected already, the protection.
//! - **A restore, or a migration, whose memory is yet to come** ([`LazyMemory`](crate::page_fault::LazyMemory),
//!   [`Arriving`](crate::page_fault::Arriving)). A page that is discarded is missing again, and nobody would bring it twice:
//!   who touches it would wait for ever.
//! - **Memory that another process fills** ([`ExternalMemory`](crate::page_fault::ExternalMemory)), for good: it is not told
//!   of what is discarded, and would bring what was there before.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cutover_devices::GuestMemory;
use cutover_devices::virtio::balloon::Reclaim as ReclaimPages;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::dirty::PAGE_SIZE;
use crate::page_fault::space::{Area, discard};

/// Bytes of the pages of hugetlb memory.
const HUGE_PAGE: u64 = 2 << 20;
/// Most bytes that are discarded in one step: for so long somebody who wants memory to be kept may wait.
const STEP: u64 = 16 << 20;

/// The memory of a VM whose guest gives some back. Clones are of the same.
#[derive(Clone)]
pub struct Reclaim(Arc<Shared>);

struct Shared {
    memory: GuestMemory,
    /// Of which everybody has one who wants memory to be left as it is.
    keepers: Mutex<Kept>,
}

/// As long as this or a clone of it lives, nothing of a VM's memory is discarded.
#[derive(Clone)]
pub struct Kept(Arc<()>);

impl Reclaim {
    /// That of `memory`.
    pub fn of(memory: &GuestMemory) -> Self {
        Self(Arc::new(Shared {
            memory: memory.clone(),
            keepers: Mutex::new(Kept(Arc::default())),
        }))
    }

    /// From its return on, nothing is discarded.
    pub fn keep(&self) -> Kept {
        self.keepers().clone()
    }

    fn keepers(&self) -> MutexGuard<'_, Kept> {
        self.0.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Discards the `bytes` bytes of `region` from `offset` on; returns how many it did.
    fn discard(&self, region: &GuestRegionMmap<vm_memory::bitmap::AtomicBitmap>, offset: u64, bytes: u64) -> u64 {
        // Nobody begins to want it kept while this is under way.
        let keepers = self.keepers();
        if Arc::strong_count(&keepers.0) > 1 {
            return 0;
        }
        let area = Area {
            start: region.as_ptr().addr() as u64 + offset,
            bytes,
        };
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let discarded = discard(area, shared);
        // Also if it failed: a part may be gone.
        if let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(bytes)) {
            (**region).bitmap().mark_dirty(offset, len);
        }
        match discarded {
            Ok(()) => bytes,
            Err(error) => {
                tracing::debug!(%error, "the kernel does not take memory back that the guest does not need");
                0
            }
        }
    }
}

impl ReclaimPages for Reclaim {
    fn reclaim(&self, start: u64, bytes: u64) -> u64 {
        let mut taken = 0;
        let end = start.saturating_add(bytes);
        for region in self.0.memory.iter() {
            let page = if region.is_hugetlbfs() == Some(true) {
                HUGE_PAGE
            } else {
                PAGE_SIZE
            };
            let base = region.start_addr().raw_value();
            // As far as it is whole pages of the host's.
            let mut next = start.saturating_sub(base).min(region.len()).next_multiple_of(page);
            let stop = end.saturating_sub(base).min(region.len()) & !(page - 1);
            while next < stop {
                let step = (stop - next).min(STEP);
                taken += self.discard(region, next, step);
                next += step;
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests;
