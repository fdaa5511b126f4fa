//! The start info of the PVH boot protocol (Xen docs/misc/pvh.pandoc, xen/include/public/arch-x86/hvm/start_info.h).

use cutover_devices::GuestMemory;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Initrd, MemoryMapEntry};
use crate::Error;
use crate::layout::{ACPI_TABLES, CMDLINE, PVH_START_INFO};

/// Marks a start info (`XEN_HVM_START_MAGIC_VALUE`).
const MAGIC: u32 = 0x336e_c578;
const VERSION_WITH_MEMORY_MAP: u32 = 1;
/// Where the module list and the memory map lie behind the start info.
const MODULE_LIST: u64 = PVH_START_INFO + 0x100;
const MEMORY_MAP: u64 = PVH_START_INFO + 0x200;

/// Writes the start info, its module list (the initrd) and its memory map.
pub fn write_start_info(memory: &GuestMemory, initrd: Option<Initrd>, map: &[MemoryMapEntry]) -> Result<(), Error> {
    for (address, entry) in (MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        };
        put(memory, address, entry)?;
    }
    if let Some(initrd) = initrd {
        put(
            memory,
            MODULE_LIST,
            hvm_modlist_entry {
                paddr: initrd.start,
                size: initrd.size,
                ..Default::default()
            },
        )?;
    }
    let entries = u32::try_from(map.len()).expect("a map has a handful of entries");
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION_WITH_MEMORY_MAP,
        cmdline_paddr: CMDLINE,
        nr_modules: initrd.map_or(0, |_| 1),
        modlist_paddr: initrd.map_or(0, |_| MODULE_LIST),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: entries,
        rsdp_paddr: ACPI_TABLES,
        ..Default::default()
    };
    put(memory, PVH_START_INFO, info)
}

fn put<T: ByteValued>(memory: &GuestMemory, address: u64, value: T) -> Result<(), Error> {
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(Error::guest_write("the PVH start info"))
}
