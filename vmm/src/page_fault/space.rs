//! Where a page of guest memory is: in the guest's address space, in the monitor's, and in the image of a snapshot.

use std::io;
use std::sync::Arc;

use cutover_devices::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Unavailable;
use super::uffd::{Mode, Uffd};
use crate::dirty::{Layout, PAGE_SIZE, PageRange};

/// Consecutive pages in the monitor's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Address of the first.
    pub start: u64,
    /// Bytes of all.
    pub bytes: u64,
}

impl Area {
    /// Calls `step` with what is left of the area until that is nothing; it tells how many bytes it has dealt with.
    pub fn in_steps(self, mut step: impl FnMut(Self) -> io::Result<u64>) -> io::Result<()> {
        let mut rest = self;
        while rest.bytes > 0 {
            let done = step(rest)?.min(rest.bytes);
            rest.start += done;
            rest.bytes -= done;
        }
        Ok(())
    }

    /// As [`bytes`](Self::bytes), for slices.
    pub fn len(self) -> usize {
        as_usize(self.bytes)
    }

    fn start_pointer(self) -> *mut libc::c_void {
        std::ptr::with_exposed_provenance_mut(as_usize(self.start))
    }
}

/// Has the pages of `area`, of memory that is mapped shared or private, be as if nobody had touched them.
///
/// # Errors
/// The kernel refused, as it does for private huge pages before 5.18.
pub fn discard(area: Area, shared: bool) -> io::Result<()> {
    let advice = match shared {
        false => libc::MADV_DONTNEED,
        // Those of the file, not only of this mapping.
        true => libc::MADV_REMOVE,
    };
    // SAFETY: the area is of guest memory, which Rust holds no reference to; nobody but the guest minds its content.
    let result = unsafe { libc::madvise(area.start_pointer(), area.len(), advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the kernel may give this process transparent huge pages where that is what it does anyway.
///
/// It may not while faults of missing pages are somebody else's: at the first write to each 2 MiB the kernel (6.1, and as
/// far as known all others) would take a huge page and clear it before it finds that nobody asked for it.
pub fn huge_pages(wanted: bool) {
    // SAFETY: sets a flag of the address space that changes no content.
    let result = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, libc::c_ulong::from(!wanted), 0, 0, 0) };
    if result != 0 {
        // Memory is filled all the same.
        tracing::debug!(error = %io::Error::last_os_error(), wanted, "cannot choose whether there are huge pages");
    }
}

/// Makes the pages of `area` present, with the content they have: zeros if they were never touched.
///
/// # Errors
/// The kernel refused, or is older than 5.14.
pub fn populate(area: Area) -> io::Result<()> {
    // SAFETY: the area is of guest memory; reading it changes no content.
    let result = unsafe { libc::madvise(area.start_pointer(), area.len(), libc::MADV_POPULATE_READ) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn as_usize(of_address_space: u64) -> usize {
    usize::try_from(of_address_space).expect("addresses have 64 bits")
}

/// How memory is backed, which decides what the kernel can do with faults in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private, without a file.
    Anonymous,
    /// A memfd that others may map too.
    Shared,
    /// In huge pages, which are filled and protected as a whole.
    HugePages,
}

/// Guest memory, and where it is. As long as this lives, so do the mappings.
pub struct Space {
    /// The memory.
    pub memory: GuestMemory,
    /// Where its pages are for the guest.
    pub layout: Arc<Layout>,
    /// Where its slots begin for the monitor.
    hosts: Vec<u64>,
    /// How it is backed.
    pub backing: Backing,
}

impl Space {
    /// That of `memory`.
    ///
    /// # Errors
    /// The kernel leaves no faults in this kind of memory to others.
    pub fn of(memory: &GuestMemory) -> Result<Self, Unavailable> {
        let mut backing = Backing::Anonymous;
        for region in memory.iter() {
            match region.file_offset() {
                _ if region.is_hugetlbfs() == Some(true) => backing = Backing::HugePages,
                None => {}
                Some(_) if region.flags() & libc::MAP_SHARED != 0 => backing = Backing::Shared,
                Some(_) => return Err(Unavailable::MappedFile),
            }
        }
        Ok(Self {
            memory: memory.clone(),
            layout: Arc::new(Layout::of(memory)),
            hosts: memory.iter().map(|region| region.as_ptr().addr() as u64).collect(),
            backing,
        })
    }

    /// That of `memory`, if each of its pages has faults of its own.
    ///
    /// # Errors
    /// It is in huge pages, or the kernel leaves no faults in this kind of memory to others.
    pub fn of_small_pages(memory: &GuestMemory) -> Result<Self, Unavailable> {
        let space = Self::of(memory)?;
        match space.backing {
            Backing::HugePages => Err(Unavailable::HugePages),
            Backing::Anonymous | Backing::Shared => Ok(space),
        }
    }

    /// Opens a descriptor for faults of this memory, and registers all of it. If pages are missing, those that come are
    /// small ones until [`huge_pages`] are wanted again.
    ///
    /// # Errors
    /// The kernel lacks this or does not permit it, or somebody else takes care of this memory's faults.
    pub fn register(&self, mode: Mode) -> Result<Uffd, Unavailable> {
        let uffd = Uffd::open(mode, self.backing)?;
        if mode == Mode::Missing {
            huge_pages(false);
        }
        for area in self.areas() {
            uffd.register(area, mode).map_err(|error| match error.kind() {
                io::ErrorKind::ResourceBusy => Unavailable::Busy,
                _ => Unavailable::Refused(error),
            })?;
        }
        Ok(uffd)
    }

    /// All of it, slot by slot.
    pub fn areas(&self) -> impl Iterator<Item = Area> {
        self.layout.slots().iter().map(|slot| self.area(slot.range()))
    }

    /// Where `range`, which is within a slot, is for the monitor.
    pub fn area(&self, range: PageRange) -> Area {
        let slots = self.layout.slots().iter().zip(&self.hosts);
        let (slot, host) = slots
            .rev()
            .find(|(slot, _)| slot.start <= range.start)
            .expect("a range of pages is of a slot");
        Area {
            start: host + (range.start - slot.start),
            bytes: range.pages * PAGE_SIZE,
        }
    }

    /// The page at address `host` of the monitor.
    pub fn page_at(&self, host: u64) -> Option<PageRange> {
        let mut slots = self.layout.slots().iter().zip(&self.hosts);
        slots.find_map(|(slot, start)| {
            let offset = host.checked_sub(*start)?;
            (offset < slot.pages * PAGE_SIZE).then(|| PageRange::page(slot.start + offset))
        })
    }
}
