//! Getting a kernel, its initial RAM disk and its command line into guest memory.
//!
//! The file's own contents decide the protocol: a bzImage is started by the Linux 64-bit boot protocol, an ELF image by
//! PVH where it has that entry (as distribution kernels have), else by the Linux protocol.

mod linux;
mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use cutover_devices::GuestMemory;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::BootSpec;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::Error;
use crate::layout::{ACPI_TABLES, CMDLINE, CMDLINE_SIZE_MAX, HIGH_RAM_START, LOW_RAM_END, MMIO_GAP_START};

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
    let initrd_highest = kernel.setup_header.map_or(u64::from(u32::MAX), |header| header.initrd_addr_max.into());
    let initrd = match &spec.initrd {
        Some(path) => Some(load_initrd(path, memory, kernel_end(&kernel), initrd_highest)?),
        None => None,
    };
    write_cmdline(&spec.cmdline, memory)?;
    let map = memory_map(memory);
    match (kernel.setup_header, kernel.pvh_boot_cap) {
        (None, PvhBootCapability::PvhEntryPresent(entry)) => {
            pvh::write_start_info(memory, initrd, &map)?;
            Ok(Entry::Pvh { address: entry.0 })
        }
        (header, _) => {
            let length = u32::try_from(spec.cmdline.len()).unwrap_or(u32::MAX);
            linux::write_boot_params(memory, header, initrd, length, &map)?;
            // A bzImage has its 64-bit entry 0x200 bytes behind its start (boot.rst, "64-bit BOOT PROTOCOL").
            let entry_offset = if header.is_some() { 0x200 } else { 0 };
            Ok(Entry::Linux64 { address: kernel.kernel_load.0 + entry_offset })
        }
    }
}

fn load_kernel(path: &Path, memory: &GuestMemory) -> Result<KernelLoaderResult, Error> {
    let mut file = open("kernel", path)?;
    let size = file.metadata().map_err(|source| boot_file("kernel", path, source))?.len();
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
            Error::NotAKernel { path: path.to_owned(), reason: error.to_string() }
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
        Some(setup_header { pref_address, init_size, .. }) => {
            kernel.kernel_end.max(pref_address.saturating_add(init_size.into()))
        }
        None => kernel.kernel_end,
    }
}

fn load_initrd(path: &Path, memory: &GuestMemory, lowest: u64, highest: u64) -> Result<Initrd, Error> {
    let mut file = open("initrd", path)?;
    let size = file.metadata().map_err(|source| boot_file("initrd", path, source))?.len();
    let top = low_ram_size(memory).min(highest.saturating_add(1));
    let available = top.saturating_sub(lowest);
    // Page-aligned, as high as it goes.
    let start = top.checked_sub(size).map(|start| start & !0xfff).filter(|&start| start >= lowest).ok_or(
        Error::DoesNotFit {
            what: "the initrd",
            needed: ByteSize::from_bytes(size),
            available: ByteSize::from_bytes(available),
        },
    )?;
    let length = usize::try_from(size).map_err(|_| boot_file("initrd", path, io::ErrorKind::FileTooLarge.into()))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, length)
        .map_err(|error| boot_file("initrd", path, io::Error::other(error)))?;
    Ok(Initrd { start, size })
}

fn write_cmdline(cmdline: &str, memory: &GuestMemory) -> Result<(), Error> {
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    if bytes.len() > CMDLINE_SIZE_MAX {
        return Err(Error::CommandLine { length: cmdline.len(), most: CMDLINE_SIZE_MAX - 1 });
    }
    memory.write_slice(&bytes, GuestAddress(CMDLINE)).map_err(Error::guest_write("the command line"))
}

fn memory_map(memory: &GuestMemory) -> Vec<MemoryMapEntry> {
    let mut map = vec![
        MemoryMapEntry { start: 0, size: LOW_RAM_END, kind: MemoryKind::Ram },
        MemoryMapEntry { start: ACPI_TABLES, size: HIGH_RAM_START - ACPI_TABLES, kind: MemoryKind::Reserved },
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_RAM_START);
        let size = region.start_addr().0 + region.len() - start;
        map.push(MemoryMapEntry { start, size, kind: MemoryKind::Ram });
    }
    map
}

/// RAM below the MMIO gap.
fn low_ram_size(memory: &GuestMemory) -> u64 {
    memory.iter().filter(|region| region.start_addr().0 < MMIO_GAP_START).map(GuestMemoryRegion::len).sum()
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
    Error::BootFile { what, path: path.to_owned(), source }
}
