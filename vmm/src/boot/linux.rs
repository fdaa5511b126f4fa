//! `boot_params`, the "zero page" of the Linux boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst).

use cutover_devices::GuestMemory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{Initrd, MemoryMapEntry};
use crate::Error;
use crate::layout::{ACPI_TABLES, BOOT_PARAMS, CMDLINE};

/// Boot loader id "undefined", for loaders without an assigned one.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Alignment a kernel without a setup header is told.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes `boot_params`; `header` is the bzImage's own, absent for an ELF image.
pub fn write_boot_params(
    memory: &GuestMemory,
    header: Option<setup_header>,
    initrd: Option<Initrd>,
    cmdline_length: u32,
    map: &[MemoryMapEntry],
) -> Result<(), Error> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: ACPI_TABLES,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low_address(CMDLINE);
    params.hdr.cmdline_size = cmdline_length;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low_address(initrd.start);
        params.hdr.ramdisk_size = low_address(initrd.size);
    }
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            r#type: entry.kind as u32,
        };
        params.e820_entries += 1;
    }
    memory
        .write_obj(params, GuestAddress(BOOT_PARAMS))
        .map_err(Error::guest_write("the boot parameters"))
}

/// An address or size below 4 GiB, as everything is that the boot protocol places.
fn low_address(value: u64) -> u32 {
    u32::try_from(value).expect("boot data is placed below the MMIO gap, which ends at 4 GiB")
}
