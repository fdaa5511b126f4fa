//! Getting a kernel, its initial RAM disk and its command line into guest memory.
//!
//! Unless the spec says otherwise, the file's own contents decide the protocol: a bzImage is started by the Linux 64-bit
//! boot protocol, an ELF image by PVH where it has that entry (as distribution kernels have), else by the Linux protocol.

mod linux;
mod pvh;
mod reset_vector;

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use cutover_devices::GuestMemory;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{BootProtocol, BootSpec};
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::Error;
use crate::layout::{ACPI_TABLES, CMDLINE, HIGH_RAM_START, LOW_RAM_END, MMIO_GAP_START};

/// Where the boot vCPU starts, and by which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Linux 64-bit boot protocol.
    Linux64 {
        /// First instruction.
        address: u64,
    },
    /// PVH.
    Pvh {
        /// First instruction.
        address: u64,
    },
}

/// Where the initial RAM disk lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Initrd {
    start: u64,
    size: u64,
}

/// A stretch of the guest's physical address space, as the kernel is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemoryMapEntry {
    start: u64,
    size: u64,
    kind: MemoryKind,
}

/// What a stretch is; the values are those of e820 and of PVH alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemoryKind {
    Ram = 1,
    Reserved = 2,
}

/// Loads what `spec` names into `memory` and says where to start.
///
/// # Errors
/// A file is missing, is no kernel, or does not fit.
pub fn load(spec: &BootSpec, memory: &GuestMemory) -> Result<Entry, Error> {
    let kernel = load_kernel(&spec.kernel, memory)?;
    let initrd_highest = kernel
        .setup_header
        .map_or(u64::from(u32::MAX), |header| header.initrd_addr_max.into());
    let initrd = match &spec.initrd {
        Some(path) => Some(load_initrd(path, memory, kernel_end(&kernel), initrd_highest)?),
        None => None,
    };
    write_cmdline(&spec.cmdline, memory)?;
    reset_vector::write(memory)?;
    let map = memory_map(memory);
    match (kernel.pvh_boot_cap, spec.protocol) {
        (PvhBootCapability::PvhEntryPresent(entry), BootProtocol::Auto | BootProtocol::Pvh) => {
            pvh::write_start_info(memory, initrd, &map)?;
            Ok(Entry::Pvh { address: entry.0 })
        }
        (_, BootProtocol::Pvh) => Err(Error::NotAKernel {
            path: spec.kernel.clone(),
            reason: "it has no PVH entry, which only an ELF kernel with CONFIG_PVH has".to_owned(),
        }),
        (_, BootProtocol::Auto | BootProtocol::Linux) => {
            let header = kernel.setup_header;
            let length = u32::try_from(spec.cmdline.len()).unwrap_or(u32::MAX);
            linux::write_boot_params(memory, header, initrd, length, &map)?;
            // A bzImage has its 64-bit entry 0x200 bytes behind its start (boot.rst, "64-bit BOOT PROTOCOL").
            let entry_offset = if header.is_some() { 0x200 } else { 0 };
            Ok(Entry::Linux64 {
                address: kernel.kernel_load.0 + entry_offset,
            })
        }
    }
}

fn load_kernel(path: &Path, memory: &GuestMemory) -> Result<KernelLoaderResult, Error> {
    let mut file = open("kernel", path)?;
    let size = file
        .metadata()
        .map_err(|source| boot_file("kernel", path, source))?
        .len();
    let mut magic = [0; 4];
    let read = read_up_to(&mut file, &mut magic).map_err(|source| boot_file("kernel", path, source))?;
    let is_elf = magic[..read] == *b"\x7fELF";
    let start = Some(GuestAddress(HIGH_RAM_START));
    let loaded = if is_elf {
        Elf::load(memory, None, &mut file, start)
    } else {
        BzImage::load(memory, None, &mut file, start)
    };
    let loaded = loaded.map_err(|error| {
        let room = low_ram_size(memory).saturating_sub(HIGH_RAM_START);
        if size > room {
            Error::DoesNotFit {
                what: "the kernel",
                needed: ByteSize::from_bytes(size),
                available: ByteSize::from_bytes(room),
            }
        } else {
            Error::NotAKernel {
                path: path.to_owned(),
                reason: error.to_string(),
            }
        }
    })?;
    let end = kernel_end(&loaded);
    if end > low_ram_size(memory) {
        return Err(Error::DoesNotFit {
            what: "the kernel, unpacked,",
            needed: ByteSize::from_bytes(end),
            available: ByteSize::from_bytes(low_ram_size(memory)),
        });
    }
    Ok(loaded)
}

/// First address behind the memory the kernel needs until it manages memory itself.
fn kernel_end(kernel: &KernelLoaderResult) -> u64 {
    match kernel.setup_header {
        // Where it unpacks itself to, and how much that takes (boot.rst, `init_size`).
        Some(setup_header {
            pref_address,
            init_size,
            ..
        }) => kernel.kernel_end.max(pref_address.saturating_add(init_size.into())),
        None => kernel.kernel_end,
    }
}

fn load_initrd(path: &Path, memory: &GuestMemory, lowest: u64, highest: u64) -> Result<Initrd, Error> {
    let mut file = open("initrd", path)?;
    let size = file
        .metadata()
        .map_err(|source| boot_file("initrd", path, source))?
        .len();
    let top = low_ram_size(memory).min(highest.saturating_add(1));
    let available = top.saturating_sub(lowest);
    // Page-aligned, as high as it goes.
    let start = top
        .checked_sub(size)
        .map(|start| start & !0xfff)
        .filter(|&start| start >= lowest)
        .ok_or(Error::DoesNotFit {
            what: "the initrd",
            needed: ByteSize::from_bytes(size),
            available: ByteSize::from_bytes(available),
        })?;
    let length = usize::try_from(size).map_err(|_| boot_file("initrd", path, io::ErrorKind::FileTooLarge.into()))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, length)
        .map_err(|error| boot_file("initrd", path, io::Error::other(error)))?;
    Ok(Initrd { start, size })
}

fn write_cmdline(cmdline: &str, memory: &GuestMemory) -> Result<(), Error> {
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    memory
        .write_slice(&bytes, GuestAddress(CMDLINE))
        .map_err(Error::guest_write("the command line"))
}

fn memory_map(memory: &GuestMemory) -> Vec<MemoryMapEntry> {
    let mut map = vec![
        MemoryMapEntry {
            start: 0,
            size: LOW_RAM_END,
            kind: MemoryKind::Ram,
        },
        MemoryMapEntry {
            start: ACPI_TABLES,
            size: HIGH_RAM_START - ACPI_TABLES,
            kind: MemoryKind::Reserved,
        },
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_RAM_START);
        let size = region.start_addr().0 + region.len() - start;
        map.push(MemoryMapEntry {
            start,
            size,
            kind: MemoryKind::Ram,
        });
    }
    map
}

/// RAM below the MMIO gap.
fn low_ram_size(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .filter(|region| region.start_addr().0 < MMIO_GAP_START)
        .map(GuestMemoryRegion::len)
        .sum()
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let file = File::open(path).map_err(|source| boot_file(what, path, source))?;
    let metadata = file.metadata().map_err(|source| boot_file(what, path, source))?;
    if metadata.is_dir() {
        return Err(boot_file(what, path, io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let wanted = u64::try_from(buffer.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    file.take(wanted).read_to_end(&mut bytes)?;
    buffer[..bytes.len()].copy_from_slice(&bytes);
    file.rewind()?;
    Ok(bytes.len())
}

fn boot_file(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::BootFile {
        what,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::bitmap::Bitmap;

    use super::*;
    use crate::layout::{BOOT_PARAMS, PVH_START_INFO};

    const ENTRY: u64 = 0x100_0000;
    const PVH_ENTRY: u32 = 0x100_0100;

    fn memory(mib: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)]).expect("memory")
    }

    fn file(contents: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("temporary file");
        file.write_all(contents).expect("temporary file");
        file
    }

    fn boot(kernel: &[u8], initrd: Option<&[u8]>, memory: &GuestMemory) -> Result<Entry, Error> {
        boot_by(BootProtocol::Auto, kernel, initrd, memory)
    }

    fn boot_by(
        protocol: BootProtocol,
        kernel: &[u8],
        initrd: Option<&[u8]>,
        memory: &GuestMemory,
    ) -> Result<Entry, Error> {
        let (kernel, initrd) = (file(kernel), initrd.map(file));
        let spec = BootSpec {
            kernel: kernel.path().to_owned(),
            initrd: initrd.as_ref().map(|file| file.path().to_owned()),
            protocol,
            cmdline: "console=ttyS0".to_owned(),
        };
        load(&spec, memory)
    }

    /// The smallest ELF kernel: one loaded segment, and a PVH note where asked for.
    fn elf(with_pvh_note: bool) -> Vec<u8> {
        let segments: u16 = if with_pvh_note { 2 } else { 1 };
        let mut image = b"\x7fELF\x02\x01\x01".to_vec();
        image.resize(16, 0);
        image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        image.extend([ENTRY, 64, 0].map(u64::to_le_bytes).concat());
        image.extend([0, 0, 0, 0, 64, 0, 56, 0]);
        image.extend(segments.to_le_bytes());
        image.extend([0; 6]);
        let contents_at = 64 + 56 * u64::from(segments);
        let note = [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), PVH_ENTRY]
            .map(u32::to_le_bytes)
            .concat();
        let mut segment = |kind: u32, offset: u64, address: u64, size: u64| {
            image.extend([kind, 5].map(u32::to_le_bytes).concat());
            image.extend([offset, address, address, size, size, 4].map(u64::to_le_bytes).concat());
        };
        segment(1, contents_at, ENTRY, 8);
        if with_pvh_note {
            segment(4, contents_at + 8, 0, note.len() as u64);
        }
        image.extend(*b"program!");
        image.extend(note);
        image
    }

    /// The smallest bzImage: two setup sectors and 512 bytes of kernel.
    fn bz_image() -> Vec<u8> {
        let mut image = vec![0; 3 * 512];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image
    }

    #[test]
    fn an_elf_kernel_starts_by_pvh_where_it_has_that_entry_and_at_its_own_else() {
        assert_eq!(
            boot(&elf(true), None, &memory(64)).expect("boots"),
            Entry::Pvh {
                address: PVH_ENTRY.into()
            }
        );
        assert_eq!(
            boot(&elf(false), None, &memory(64)).expect("boots"),
            Entry::Linux64 { address: ENTRY }
        );
    }

    #[test]
    fn the_protocol_can_be_chosen_where_the_kernel_has_both() {
        let by = |protocol, kernel: &[u8]| boot_by(protocol, kernel, None, &memory(64));
        assert_eq!(
            by(BootProtocol::Linux, &elf(true)).expect("boots"),
            Entry::Linux64 { address: ENTRY }
        );
        for kernel in [elf(false), bz_image()] {
            let error = by(BootProtocol::Pvh, &kernel).expect_err("no PVH entry").to_string();
            assert!(error.contains("no PVH entry"), "{error}");
        }
    }

    #[test]
    fn a_bzimage_starts_at_its_64_bit_entry_and_is_told_where_everything_is() {
        let memory = memory(64);
        let entry = boot(&bz_image(), Some(b"initrd contents"), &memory).expect("boots");
        assert_eq!(entry, Entry::Linux64 { address: 0x10_0200 });
        let at = |offset: u64| {
            memory
                .read_obj::<u32>(GuestAddress(BOOT_PARAMS + offset))
                .expect("in memory")
        };
        let (image, size, cmdline) = (at(0x218), at(0x21c), at(0x228));
        assert_eq!((image, size), ((64 << 20) - 4096, 15));
        assert_eq!(u64::from(cmdline), CMDLINE);
        let mut initrd = [0; 15];
        memory
            .read_slice(&mut initrd, GuestAddress(image.into()))
            .expect("in memory");
        assert_eq!(&initrd, b"initrd contents");
    }

    #[test]
    fn pvh_start_info_names_the_initrd_and_every_piece_of_ram() {
        let memory = memory(64);
        boot(&elf(true), Some(b"initrd contents"), &memory).expect("boots");
        let at = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).expect("in memory");
        assert_eq!(at(PVH_START_INFO) & 0xffff_ffff, 0x336e_c578);
        let modules = at(PVH_START_INFO + 16);
        assert_eq!((at(modules), at(modules + 8)), ((64 << 20) - 4096, 15));
        let map = at(PVH_START_INFO + 40);
        assert_eq!((at(map), at(map + 8)), (0, LOW_RAM_END));
        assert_eq!(
            (at(map + 48), at(map + 56)),
            (HIGH_RAM_START, (64 << 20) - HIGH_RAM_START)
        );
    }

    #[test]
    fn every_page_that_is_loaded_is_marked_dirty() {
        for kernel in [elf(true), elf(false), bz_image()] {
            let memory = memory(64);
            boot(&kernel, Some(&[1; 3 << 12]), &memory).expect("boots");
            let region = memory.iter().next().expect("one region");
            let mut page = [0; 4096];
            let loaded = (0..region.len()).step_by(page.len()).filter(|&address| {
                memory.read_slice(&mut page, GuestAddress(address)).expect("in memory");
                page != [0; 4096]
            });
            let loaded: Vec<u64> = loaded.collect();
            assert!(
                loaded.contains(&CMDLINE) && loaded.contains(&((64 << 20) - 4096)),
                "{loaded:x?}"
            );
            let unmarked = |address: &&u64| !region.bitmap().dirty_at(usize::try_from(**address).expect("small"));
            assert_eq!(loaded.iter().find(unmarked), None);
        }
    }

    #[test]
    fn a_kernel_that_unpacks_beyond_the_memory_is_refused_with_both_sizes() {
        let mut image = bz_image();
        image[0x260..0x264].copy_from_slice(&0x400_0000_u32.to_le_bytes());
        let error = boot(&image, None, &memory(64))
            .expect_err("80 MiB are needed")
            .to_string();
        assert!(error.contains("80M") && error.contains("64M"), "{error}");
    }

    #[test]
    fn an_initrd_that_does_not_fit_above_the_kernel_is_refused() {
        let error = boot(&bz_image(), Some(&vec![1; 48 << 20]), &memory(64)).expect_err("17 MiB are the kernel's");
        assert!(matches!(error, Error::DoesNotFit { what: "the initrd", .. }), "{error}");
    }

    #[test]
    fn what_is_not_a_kernel_is_refused_naming_the_file() {
        for contents in [&b""[..], b"#!/bin/sh\n", b"\x7fELF", &[0; 4096]] {
            let error = boot(contents, None, &memory(64)).expect_err("not a kernel");
            assert!(matches!(error, Error::NotAKernel { .. }), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_damaged_kernel_is_loaded_or_refused_but_never_a_panic(
            is_elf: bool,
            damage in prop::collection::vec((0..300_usize, any::<u8>()), 1..24),
        ) {
            let mut image = if is_elf { elf(true) } else { bz_image() };
            let length = image.len();
            for (at, byte) in damage {
                image[if is_elf { at % length } else { 0x1f0 + at % 0x80 }] = byte;
            }
            let _ = boot(&image, None, &memory(64));
        }
    }
}
