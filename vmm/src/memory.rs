//! Guest memory: how it is backed and where it lies.
//!
//! Private memory is anonymous: it gets transparent huge pages, and a page costs its own size once. (A private mapping
//! of a memfd would hold every touched page twice, in the file and in the copy.) Shared memory is one memfd, so that
//! another process can map the same pages. Either way untouched pages are never allocated, so a guest may have more
//! memory than the host.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;

use cutover_devices::GuestMemory;
use cutover_snapshot::spec::MemorySpec;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::Error;
use crate::layout::{MMIO_GAP_END, MMIO_GAP_START};

/// Unit of dirty tracking: the smallest page of x86.
const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(4 << 10).expect("not zero");

/// What a huge page of x86 maps at once.
const HUGE_PAGE: usize = 2 << 20;

/// Where one piece of RAM lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// RAM of `size` bytes around the MMIO gap.
pub fn ram_ranges(size: u64) -> Vec<RamRange> {
    let low = RamRange {
        start: 0,
        size: size.min(MMIO_GAP_START),
    };
    let high = RamRange {
        start: MMIO_GAP_END,
        size: size - low.size,
    };
    [low, high].into_iter().filter(|range| range.size > 0).collect()
}

/// Maps guest memory as `spec` describes.
///
/// # Errors
/// The host has no such memory (huge pages), or too little address space.
pub fn map(spec: &MemorySpec) -> Result<GuestMemory, Error> {
    let failed = |source: io::Error| Error::Memory {
        size: spec.size,
        hugepages: spec.hugepages,
        source,
    };
    let file = spec.shared.then(|| create_memfd(spec)).transpose().map_err(failed)?;
    let backing = match &file {
        Some(file) => Backing::Shared(file),
        None if spec.hugepages => Backing::HugePages,
        None => Backing::Anonymous,
    };
    map_ranges(spec, backing).map_err(failed)
}

/// Maps guest memory that has the content of `file`, all pages one after the other from its beginning: the flat image of
/// a snapshot. Every VM that maps it shares those pages with the others that it does not write. The file must stay as it
/// is. `spec` is of private memory in small pages.
///
/// # Errors
/// The file is too short, or cannot be mapped.
pub fn map_flat(spec: &MemorySpec, file: &File) -> Result<GuestMemory, Error> {
    let failed = |source: io::Error| Error::Memory {
        size: spec.size,
        hugepages: false,
        source,
    };
    // Accesses behind the end of a file would end the process.
    if file.metadata().map_err(failed)?.len() < spec.size.bytes() {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    map_ranges(spec, Backing::Copied(file)).map_err(failed)
}

/// Maps the memory of a VM that another process has, which is all of `file`. Both see each other's writes.
///
/// # Errors
/// The file is not such a memory: one of the size that `spec` says, and that nobody can shrink.
pub fn map_handed(spec: &MemorySpec, file: &File) -> Result<GuestMemory, Error> {
    let failed = |source: io::Error| Error::Memory {
        size: spec.size,
        hugepages: spec.hugepages,
        source,
    };
    let sealed = fcntl_get_seals(file).map_err(|error| failed(error.into()))?;
    let size = file.metadata().map_err(failed)?.len();
    if !spec.shared || !sealed.contains(SealFlags::SHRINK) || size != spec.size.bytes() {
        let reason = format!("the file that was handed over is not it: it has {size} bytes, and seals {sealed:?}");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, reason)));
    }
    map_ranges(spec, Backing::Shared(file)).map_err(failed)
}

/// The file that `memory` is, if it is one that another process can [map](map_handed).
///
/// # Errors
/// There are no descriptors left.
pub fn file_of(memory: &GuestMemory) -> io::Result<Option<File>> {
    let shared = memory
        .iter()
        .next()
        .filter(|region| region.flags() & libc::MAP_SHARED != 0);
    shared
        .and_then(|region| region.file_offset())
        .map(|offset| offset.file().try_clone())
        .transpose()
}

/// What is mapped.
#[derive(Clone, Copy)]
enum Backing<'a> {
    /// Nothing but memory.
    Anonymous,
    /// The same, in huge pages.
    HugePages,
    /// This file, in which every write is.
    Shared(&'a File),
    /// This file, of whose pages those that are written become the VM's own.
    Copied(&'a File),
}

fn map_ranges(spec: &MemorySpec, backing: Backing<'_>) -> io::Result<GuestMemory> {
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in ram_ranges(spec.size.bytes()) {
        regions.push(map_range(spec, range, backing, offset)?);
        offset += range.size;
    }
    GuestMemory::from_regions(regions).map_err(io::Error::other)
}

fn create_memfd(spec: &MemorySpec) -> io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if spec.hugepages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = memfd_create("cutover-guest-memory", flags)?;
    ftruncate(&file, spec.size.bytes())?;
    // A holder of the descriptor who shrank the file would turn guest accesses into SIGBUS.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// Maps one piece, which begins at `offset` of what is mapped if that is a file.
fn map_range(
    spec: &MemorySpec,
    range: RamRange,
    backing: Backing<'_>,
    offset: u64,
) -> io::Result<GuestRegionMmap<AtomicBitmap>> {
    let size = usize::try_from(range.size).map_err(io::Error::other)?;
    let (flags, file) = match backing {
        Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
        Backing::HugePages => {
            let huge = libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge, None)
        }
        Backing::Shared(file) => (libc::MAP_SHARED, Some(file)),
        Backing::Copied(file) => (libc::MAP_PRIVATE, Some(file)),
    };
    let file = match file {
        Some(file) => Some(FileOffset::new(file.try_clone()?, offset)),
        None => None,
    };
    let region = map_aligned(|| {
        let bitmap = AtomicBitmap::new(size, PAGE_SIZE);
        let builder = MmapRegionBuilder::new_with_bitmap(size, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags | libc::MAP_NORESERVE)
            .with_hugetlbfs(spec.hugepages);
        match &file {
            Some(file) => builder.with_file_offset(file.clone()),
            None => builder,
        }
    })?;
    GuestRegionMmap::new(region, GuestAddress(range.start)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Maps what `region` describes at an address that is a multiple of [`HUGE_PAGE`].
///
/// Only where host and guest addresses have the same offset within a huge page can KVM map huge pages into the guest,
/// which spares it a fault for each small one. Kernels before 6.7 do not align by themselves, but they map downwards
/// into the first hole with enough room: with a spacer at the top of the hole, the next attempt is aligned. Where that
/// does not work out, the guest is slower and nothing else.
fn map_aligned(region: impl Fn() -> MmapRegionBuilder<AtomicBitmap>) -> io::Result<MmapRegion<AtomicBitmap>> {
    let first = region().build().map_err(io_error)?;
    let excess = first.as_ptr().addr() % HUGE_PAGE;
    if excess == 0 {
        return Ok(first);
    }
    drop(first);
    let _spacer = MmapRegionBuilder::<()>::new(excess).build().map_err(io_error)?;
    region().build().map_err(io_error)
}

fn io_error(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use cutover_snapshot::size::ByteSize;
    use vm_memory::Bytes;

    use super::*;

    fn spec(mib: u64, shared: bool) -> MemorySpec {
        MemorySpec {
            size: ByteSize::from_mib(mib),
            shared,
            hugepages: false,
        }
    }

    #[test]
    fn ram_up_to_three_gib_is_one_piece() {
        assert_eq!(
            ram_ranges(3 << 30),
            [RamRange {
                start: 0,
                size: 3 << 30
            }]
        );
    }

    #[test]
    fn ram_beyond_three_gib_goes_on_above_the_mmio_gap() {
        assert_eq!(
            ram_ranges(5 << 30),
            [
                RamRange {
                    start: 0,
                    size: 3 << 30
                },
                RamRange {
                    start: 4 << 30,
                    size: 2 << 30
                }
            ]
        );
    }

    #[test]
    fn memory_on_both_sides_of_the_gap_can_be_written_and_nothing_in_between() {
        for shared in [false, true] {
            let memory = map(&spec(4096, shared)).expect("lazily allocated memory is always to be had");
            for address in [0, (3 << 30) - 8, 4 << 30, (5 << 30) - 8] {
                memory.write_obj(0x5a5a_u64, GuestAddress(address)).expect("RAM");
                assert_eq!(memory.read_obj::<u64>(GuestAddress(address)).expect("RAM"), 0x5a5a);
            }
            assert!(memory.write_obj(1_u64, GuestAddress(3 << 30)).is_err());
            assert!(memory.write_obj(1_u64, GuestAddress(5 << 30)).is_err());
        }
    }

    #[test]
    fn shared_memory_is_one_file_with_the_regions_one_after_the_other() {
        let memory = map(&spec(4096, true)).expect("memory");
        let offsets: Vec<u64> = memory
            .iter()
            .map(|region| region.file_offset().expect("memfd").start())
            .collect();
        assert_eq!(offsets, [0, 3 << 30]);
    }

    #[test]
    fn memory_that_was_handed_over_is_the_same_memory() {
        let spec = spec(4096, true);
        let memory = map(&spec).expect("memory");
        let file = file_of(&memory).expect("a descriptor").expect("it is a file");
        let handed = map_handed(&spec, &file).expect("the same memory");
        memory.write_obj(7_u8, GuestAddress(5 << 30)).expect_err("no RAM there");
        memory.write_obj(7_u8, GuestAddress(4 << 30)).expect("RAM");
        assert_eq!(handed.read_obj::<u8>(GuestAddress(4 << 30)).expect("RAM"), 7);
    }

    #[test]
    fn memory_that_could_shrink_or_is_of_another_size_is_not_taken_over() {
        let spec = spec(32, true);
        let file = tempfile::tempfile().expect("a file");
        file.set_len(32 << 20).expect("sparse");
        assert!(map_handed(&spec, &file).is_err(), "no seals");
        let memory = map(&self::spec(33, true)).expect("memory");
        let larger = file_of(&memory).expect("a descriptor").expect("it is a file");
        assert!(map_handed(&spec, &larger).is_err());
        let private = map(&self::spec(32, false)).expect("memory");
        assert!(file_of(&private).expect("nothing to fail").is_none());
    }

    #[test]
    fn memory_mapped_from_a_flat_image_has_its_content_and_leaves_it_as_it_is() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().expect("a file");
        file.set_len((32 << 20) + 100).expect("sparse");
        file.write_all_at(&[7], 0x5000).expect("written");
        let clones = [(); 2].map(|()| map_flat(&spec(32, false), &file).expect("memory"));
        clones[0].write_obj(9_u8, GuestAddress(0x5000)).expect("RAM");
        let bytes = clones
            .each_ref()
            .map(|clone| clone.read_obj::<u8>(GuestAddress(0x5000)).expect("RAM"));
        assert_eq!(bytes, [9, 7]);
        assert!(map_flat(&spec(33, false), &file).is_err(), "longer than the file");
    }

    #[test]
    fn a_write_by_the_monitor_marks_its_page_dirty() {
        use vm_memory::bitmap::Bitmap;
        let memory = map(&spec(32, false)).expect("memory");
        memory.write_obj(1_u8, GuestAddress(0x5123)).expect("RAM");
        let region = memory.iter().next().expect("one region");
        let dirty: Vec<usize> = (0..16).filter(|page| region.bitmap().dirty_at(page * 4096)).collect();
        assert_eq!(dirty, [5]);
    }
}
