//! The pages that anyone of this process writes, as its page tables tell: `UFFD_FEATURE_WP_ASYNC` and `PAGEMAP_SCAN`
//! (Linux admin-guide/mm/userfaultfd and admin-guide/mm/pagemap; since 6.7).
//!
//! ```text
//!  register   the kernel ends the protection of a page that is written, and tells nobody
//!  collect    PAGEMAP_SCAN: pages without protection are reported and protected, in one step
//! ```
//! No thread takes care of faults, and KVM logs nothing: its own tables follow those of the process. That goes for private
//! memory alone. Of a file that is mapped shared the kernel may take a page table away, and what was written with it.
//!
//! Memory can have one userfaultfd at a time. While it has that of a restore or of a migration that is not complete, writes
//! are noticed by KVM's bitmap instead, until tracking ends. While it has this one, snapshots copy memory in the pause.

use std::fs::File;
use std::io;
use std::sync::Arc;

use linux_raw_sys::general::{PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, page_region, pm_scan_arg};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::back_end::{BackEnd, Unfit};
use super::kvm_log::KvmLog;
use super::page_set::{Layout, PAGE_SIZE, PageRange, PageSet, Slot};
use super::{DirtySource, Report};
use crate::Error;
use crate::kvm::MemorySlots;
use crate::page_fault::Unavailable;
use crate::page_fault::space::{Area, Backing, Space};
use crate::page_fault::uffd::{Mode, Uffd};

ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, pm_scan_arg);

/// What the kernel tells of each page of a process, and is asked which were written.
const PAGEMAP: &str = "/proc/self/pagemap";

/// Ranges of pages that are reported by one call.
const RANGES: usize = 512;

/// See the module.
pub struct Scan {
    space: Space,
    layout: Arc<Layout>,
    // Both are opened when the VM is built: later threads may not.
    uffd: Uffd,
    pagemap: File,
    /// What is registered with `uffd`.
    registered: Vec<Area>,
    /// What notices writes while memory has another userfaultfd.
    bitmap: KvmLog,
    on: On,
    /// A scan failed, and what it protected was not reported.
    missed: bool,
}

/// Who notices writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Nobody,
    Scan,
    Bitmap,
}

impl Scan {
    /// For the memory of `slots`, whose layout is `layout`, switched off.
    ///
    /// # Errors
    /// The kernel lacks it or does not permit it, or memory is not private.
    pub fn new(slots: &MemorySlots, layout: &Arc<Layout>) -> Result<Self, Error> {
        let unfit = |reason| Error::DirtyLog {
            log: BackEnd::Scan,
            reason,
        };
        let unavailable = |why: Unavailable| unfit(Unfit::Unavailable(why));
        let space = Space::of_small_pages(&slots.memory).map_err(unavailable)?;
        if space.backing != Backing::Anonymous {
            return Err(unfit(Unfit::SharedMemory));
        }
        Ok(Self {
            uffd: Uffd::open(Mode::Asynchronous, space.backing).map_err(unavailable)?,
            pagemap: File::open(PAGEMAP).map_err(|error| unfit(Unfit::NoScan(error)))?,
            space,
            layout: layout.clone(),
            registered: Vec::new(),
            bitmap: KvmLog::new(slots, layout)?,
            on: On::Nobody,
            missed: false,
        })
    }

    fn register(&mut self) -> io::Result<()> {
        for area in self.space.areas() {
            self.uffd.register(area, Mode::Asynchronous)?;
            self.registered.push(area);
        }
        Ok(())
    }

    fn unregister(&mut self) -> io::Result<()> {
        let mut areas = std::mem::take(&mut self.registered).into_iter();
        areas.try_for_each(|area| self.uffd.unregister(area))
    }

    fn scan_slot(&self, slot: &Slot, report: Report<'_>) -> io::Result<()> {
        const NONE: page_region = page_region {
            start: 0,
            end: 0,
            categories: 0,
        };
        let mut found = [NONE; RANGES];
        let all = self.space.area(slot.range());
        all.in_steps(|rest| {
            let (count, walked) = self.scan(rest, &mut found)?;
            for region in &found[..count] {
                let range = PageRange {
                    start: slot.start + (region.start - all.start),
                    pages: (region.end - region.start) / PAGE_SIZE,
                };
                self.layout.words_of(range).for_each(|(word, bits)| report(word, bits));
            }
            Ok(walked)
        })
    }

    /// Puts the pages of `area` that were written into `found`, and protects them. Tells how many ranges these are, and how
    /// many bytes of the area it came through until there was no room for more.
    fn scan(&self, area: Area, found: &mut [page_region; RANGES]) -> io::Result<(usize, u64)> {
        let mut scan = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: u64::from(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC),
            start: area.start,
            end: area.start + area.bytes,
            walk_end: 0,
            vec: found.as_mut_ptr().addr() as u64,
            vec_len: RANGES as u64,
            max_pages: 0,
            category_inverted: 0,
            // With just these the kernel also takes a page whose table entry was cleared for one that was written.
            category_mask: u64::from(PAGE_IS_WRITTEN),
            category_anyof_mask: 0,
            return_mask: u64::from(PAGE_IS_WRITTEN),
        };
        // SAFETY: the kernel reads the structure, writes to it and at most RANGES elements of `found`; of guest memory it
        // changes no content.
        let count = unsafe { ioctl_with_mut_ref(&self.pagemap, PAGEMAP_SCAN(), &mut scan) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        match scan.walk_end.checked_sub(area.start) {
            Some(walked) if walked > 0 && count <= RANGES => Ok((count, walked)),
            _ => Err(io::Error::other("PAGEMAP_SCAN comes to no end")),
        }
    }
}

impl DirtySource for Scan {
    fn start(&mut self) -> Result<(), Error> {
        match self.register() {
            Ok(()) => self.on = On::Scan,
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                self.unregister().map_err(Error::os("leave guest memory alone"))?;
                tracing::info!("memory is still being filled: KVM's bitmap notices what the guest writes");
                self.on = On::Bitmap;
                self.bitmap.start()?;
            }
            Err(error) => return Err(Error::os("have the kernel notice what the guest writes")(error)),
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.missed = false;
        match std::mem::replace(&mut self.on, On::Nobody) {
            On::Bitmap => self.bitmap.stop(),
            On::Scan | On::Nobody => self
                .unregister()
                .map_err(Error::os("have the kernel notice no more what the guest writes")),
        }
    }

    fn collect(&mut self, report: Report<'_>) -> Result<(), Error> {
        if self.on == On::Bitmap {
            return self.bitmap.collect(report);
        }
        let missed = std::mem::replace(&mut self.missed, true);
        for slot in self.layout.slots() {
            self.scan_slot(slot, report).map_err(|error| Error::DirtyLog {
                log: BackEnd::Scan,
                reason: Unfit::NoScan(error),
            })?;
        }
        self.missed = false;
        if missed {
            PageSet::full(&self.layout)
                .words()
                .for_each(|(word, bits)| report(word, bits));
        }
        Ok(())
    }
}
