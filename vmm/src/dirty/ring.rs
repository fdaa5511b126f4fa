//! The pages vCPUs write, and KVM for them, one after the other: the dirty ring of each vCPU (Documentation/virt/kvm/
//! api.rst, `KVM_CAP_DIRTY_LOG_RING`).
//!
//! ```text
//!  vCPU writes ─► KVM ─► [ page │ page │ page │ … ] ── drain ──► found ── collect ──► tracker
//!                          ▲        ring            │ by whoever collects, and by the vCPU when its ring is nearly full
//!                          └──────── reset ◄────────┘ (the pages are protected again)
//! ```
//! Harvesting costs as much as there was written, however large memory is; in exchange a vCPU that fills its ring leaves
//! guest mode to have it drained. KVM keeps some entries back, so that a ring that is reported as full has lost nothing:
//! [`probe`](super::probe) finds out whether that is so.
//!
//! Where the processor itself logs writes first (Intel's PML), a page that a running vCPU has just written may not be in
//! its ring yet. It is there when the vCPU stands still, so the last harvest of a stopped guest lacks nothing.

use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};

use super::back_end::{BackEnd, Unfit};
use super::page_set::{Layout, PAGE_SIZE, PageRange, PageSet};
use super::{DirtySource, Report, ioctl};
use crate::Error;
use crate::kvm::MemorySlots;

/// Entries of a ring: 32 KiB of them, for 8 MiB that a vCPU writes before it has to stop.
pub const RING_ENTRIES: usize = 2048;
const RING_BYTES: usize = RING_ENTRIES * size_of::<kvm_dirty_gfn>();

/// Flags of an entry: KVM has filled it in; it was harvested, and KVM may use it again.
const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

/// The rings of a VM's vCPUs. Clones are the same rings.
#[derive(Clone)]
pub struct Rings(Arc<Mutex<State>>);

struct State {
    slots: MemorySlots,
    layout: Arc<Layout>,
    rings: Vec<Ring>,
    /// Pages that were in a ring and are not reported yet.
    found: PageSet,
    /// Whether KVM has yet to take back entries that were harvested.
    reset_due: bool,
}

impl Rings {
    /// Rings for the vCPUs of `slots`' VM, which has none yet, switched off. `layout` is that of their memory.
    ///
    /// # Errors
    /// KVM has no rings.
    pub fn new(slots: &MemorySlots, layout: &Arc<Layout>) -> Result<Self, Error> {
        let bytes = RING_BYTES as u64;
        let capability = ioctl::ring_capability(&slots.vm, bytes).ok_or(Error::DirtyLog {
            log: BackEnd::Ring,
            reason: Unfit::NoRing,
        })?;
        ioctl::enable_rings(&slots.vm, capability, bytes).map_err(Error::kvm("keep dirty rings"))?;
        Ok(Self(Arc::new(Mutex::new(State {
            slots: slots.clone(),
            layout: layout.clone(),
            rings: Vec::new(),
            found: PageSet::empty(layout),
            reset_due: false,
        }))))
    }

    /// Adds the ring of `vcpu`, which has not run yet.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn add(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let ring = Ring::map(vcpu)?;
        self.state().rings.push(ring);
        Ok(())
    }

    /// Makes room in all rings, and tells how many pages were in them. What they had is reported by the next harvest.
    ///
    /// # Errors
    /// KVM refused. Nothing is lost.
    pub fn drain(&self) -> Result<usize, Error> {
        self.state().drain()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn drain(&mut self) -> Result<usize, Error> {
        let (slots, found) = (self.layout.slots(), &mut self.found);
        let mut harvested = 0;
        for ring in &mut self.rings {
            harvested += ring.harvest(|number, page| {
                // Slots that are KVM's own are no memory of the guest's.
                let slot = usize::try_from(number).ok().and_then(|number| slots.get(number));
                if let Some(slot) = slot.filter(|slot| page < slot.pages) {
                    found.insert_range(PageRange::page(slot.start + page * PAGE_SIZE));
                }
            });
        }
        self.reset_due |= harvested > 0;
        if self.reset_due {
            ioctl::reset_dirty_rings(&self.slots.vm).map_err(Error::kvm("reset its dirty rings"))?;
            self.reset_due = false;
        }
        Ok(harvested)
    }

    fn take_found(&mut self) -> PageSet {
        let nothing = PageSet::empty(&self.layout);
        std::mem::replace(&mut self.found, nothing)
    }
}

impl DirtySource for Rings {
    fn start(&mut self) -> Result<(), Error> {
        self.state().slots.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn stop(&mut self) -> Result<(), Error> {
        let mut state = self.state();
        state.slots.set_flags(0)?;
        // What was written up to now is nobody's.
        state.drain()?;
        state.take_found();
        Ok(())
    }

    fn collect(&mut self, report: Report<'_>) -> Result<(), Error> {
        let mut state = self.state();
        state.drain()?;
        for (word, bits) in state.take_found().words() {
            report(word, bits);
        }
        Ok(())
    }
}

/// The ring of one vCPU, mapped.
struct Ring {
    entries: *mut libc::c_void,
    /// Index of the entry to be harvested next.
    next: usize,
}

// SAFETY: the mapping is owned, and whoever has the ring may access it from any thread.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd) -> Result<Self, Error> {
        // SAFETY: `vcpu` keeps the descriptor open during this call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let entries = unsafe { rustix::mm::mmap(ptr::null_mut(), RING_BYTES, access, MapFlags::SHARED, fd, offset) }
            .map_err(Error::os("map a vCPU's dirty ring"))?;
        Ok(Self { entries, next: 0 })
    }

    /// Reports the slot and number within of each page in the ring, and tells how many there were.
    fn harvest(&mut self, mut report: impl FnMut(u32, u64)) -> usize {
        // KVM may go on to fill in entries meanwhile: a round through the ring is enough.
        for harvested in 0..RING_ENTRIES {
            let entry = self.entry();
            // SAFETY: the entry is mapped and aligned; of its flags, KVM and this process only make atomic accesses.
            let flags = unsafe { AtomicU32::from_ptr(entry.byte_add(offset_of!(kvm_dirty_gfn, flags)).cast()) };
            if flags.load(Ordering::Acquire) != DIRTY {
                return harvested;
            }
            // SAFETY: KVM has filled the entry in and leaves it alone until the flags say that it was harvested.
            let kvm_dirty_gfn { slot, offset, .. } = unsafe { entry.read_volatile() };
            report(slot, offset);
            flags.store(HARVESTED, Ordering::Release);
            self.next = (self.next + 1) % RING_ENTRIES;
        }
        RING_ENTRIES
    }

    fn entry(&self) -> *mut kvm_dirty_gfn {
        // SAFETY: `next` is less than the number of entries that are mapped.
        unsafe { self.entries.cast::<kvm_dirty_gfn>().add(self.next) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.entries, RING_BYTES) };
        debug_assert!(unmapped.is_ok(), "the mapping was made by mmap with the same size");
    }
}
