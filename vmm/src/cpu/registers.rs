//! The state the boot vCPU starts in, for each boot protocol.
//!
//! Linux 64-bit (Documentation/arch/x86/boot.rst): long mode, identity-mapped, `rsi` points to `boot_params`.
//! PVH (Xen docs/misc/pvh.pandoc): 32-bit protected mode, no paging, `ebx` points to the start info.
//! The other vCPUs wait for the guest to start them by INIT and SIPI, as KVM creates them.

use cutover_devices::GuestMemory;
use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::boot::Entry;
use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_PARAMS, BOOT_STACK, PVH_START_INFO};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Segment types of the descriptors below: accessed, and readable code or writable data.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const BUSY_TSS: u8 = 0xb;

/// MSRs with a value other than reset's: caching as firmware leaves it, fast string operations.
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Gives every vCPU the MSRs firmware would have set.
///
/// # Errors
/// KVM refused one.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::KvmCapability {
        capability: "room for two MSRs",
    })?;
    let written = vcpu.set_msrs(&msrs).map_err(Error::kvm("set a vCPU's MSRs"))?;
    if written < entries.len() {
        return Err(Error::Kvm {
            action: "set a vCPU's MSRs",
            source: kvm_ioctls::Error::new(libc::EINVAL),
        });
    }
    Ok(())
}

/// Puts the boot vCPU where `entry` says, with the tables it needs in `memory`.
///
/// # Errors
/// KVM refused, or the boot structures are outside of guest memory.
pub fn set_boot_state(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read a vCPU's system registers"))?;
    let mut regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry {
        Entry::Linux64 { address } => {
            regs.rip = address;
            regs.rsp = BOOT_STACK;
            regs.rbp = BOOT_STACK;
            regs.rsi = BOOT_PARAMS;
            long_mode(&mut sregs);
            write_page_tables(memory)?;
        }
        Entry::Pvh { address } => {
            regs.rip = address;
            regs.rbx = PVH_START_INFO;
            protected_mode(&mut sregs);
        }
    }
    write_gdt(memory, &mut sregs)?;
    vcpu.set_sregs(&sregs)
        .map_err(Error::kvm("set a vCPU's system registers"))?;
    vcpu.set_regs(&regs).map_err(Error::kvm("set a vCPU's registers"))?;
    // The x87 control word and MXCSR of a CPU after reset and FNINIT.
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .map_err(Error::kvm("set a vCPU's floating-point state"))
}

fn long_mode(sregs: &mut kvm_sregs) {
    set_segments(
        sregs,
        flat_segment(CODE, Width::Bits64),
        flat_segment(DATA, Width::Bits32),
    );
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = BOOT_PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
}

fn protected_mode(sregs: &mut kvm_sregs) {
    set_segments(
        sregs,
        flat_segment(CODE, Width::Bits32),
        flat_segment(DATA, Width::Bits32),
    );
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: kvm_segment) {
    // Selectors are those Linux expects: __BOOT_CS 0x10, __BOOT_DS 0x18.
    sregs.cs = kvm_segment { selector: 0x10, ..code };
    let data = kvm_segment { selector: 0x18, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: 0x20,
        limit: 0x67,
        type_: BUSY_TSS,
        present: 1,
        ..Default::default()
    };
}

enum Width {
    Bits32,
    Bits64,
}

fn flat_segment(type_: u8, width: Width) -> kvm_segment {
    let long = u8::from(matches!(width, Width::Bits64));
    kvm_segment {
        limit: u32::MAX,
        type_,
        present: 1,
        s: 1,
        l: long,
        db: 1 - long,
        g: 1,
        ..Default::default()
    }
}

/// The descriptor-table form of a segment (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let bits = |value: u8, at: u32| u64::from(value) << at;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | bits(segment.type_, 40)
        | bits(segment.s, 44)
        | bits(segment.dpl, 45)
        | bits(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bits(segment.l, 53)
        | bits(segment.db, 54)
        | bits(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

fn write_gdt(memory: &GuestMemory, sregs: &mut kvm_sregs) -> Result<(), Error> {
    let table = [
        0,
        0,
        descriptor(&sregs.cs),
        descriptor(&sregs.ds),
        descriptor(&sregs.tr),
        0,
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory
        .write_slice(&bytes, GuestAddress(BOOT_GDT))
        .map_err(Error::guest_write("the descriptor table"))?;
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = 47;
    sregs.idt.limit = 0;
    Ok(())
}

/// Maps the first GiB to itself with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let (pdpt, directory) = (BOOT_PAGE_TABLES + 0x1000, BOOT_PAGE_TABLES + 0x2000);
    let put = |address: u64, entry: u64| {
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(Error::guest_write("the boot page tables"))
    };
    put(BOOT_PAGE_TABLES, pdpt | PRESENT_WRITABLE)?;
    put(pdpt, directory | PRESENT_WRITABLE)?;
    for index in 0..512 {
        put(directory + index * 8, index << 21 | PRESENT_WRITABLE | LARGE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_form_the_boot_protocol_prints() {
        assert_eq!(descriptor(&flat_segment(CODE, Width::Bits64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat_segment(CODE, Width::Bits32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&flat_segment(DATA, Width::Bits32)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_page_tables_map_the_first_gib_to_itself() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(read(BOOT_PAGE_TABLES) & !0xfff, BOOT_PAGE_TABLES + 0x1000);
        assert_eq!(read(BOOT_PAGE_TABLES + 0x1000) & !0xfff, BOOT_PAGE_TABLES + 0x2000);
        assert_eq!(read(BOOT_PAGE_TABLES + 0x2000 + 511 * 8), 511 << 21 | 0x83);
    }
}
