//! The guest's physical address space and interrupt lines: every fixed number in one place.
//!
//! ```text
//!  0x0000_0000  RAM: boot structures, see below
//!  0x0009_fc00  reserved to 1 MiB; ACPI tables from 0xe_0000, reset vector at 0xf_fff0
//!  0x0010_0000  RAM: kernel, initrd at the upper end
//!  0xc000_0000  MMIO gap: virtio-mmio devices, then KVM's own pages, IOAPIC and local APICs
//!  0x1_0000_0000  RAM beyond 3 GiB
//! ```

/// Global descriptor table for the boot vCPU.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info, its module list and its memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// `boot_params` ("zero page") of the Linux boot protocol.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Top of the stack the Linux 64-bit entry starts with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Identity-mapping page tables: one PML4, one PDPT, one page directory.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, at most `cutover_snapshot::spec::CMDLINE_MAX` bytes and a NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, RSDP first; the kernel is told the address and does not search.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = VM_GENERATION_ID;
/// The VM generation id, 16 bytes: on the page of the reset vector, so that it takes none of its own.
pub const VM_GENERATION_ID: u64 = 0xf_ff00;
/// Where a processor in real mode starts after a reset, or jumps to for one (F000:FFF0).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM for the kernel starts.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Start of the gap in RAM that MMIO takes.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// End of the gap; RAM goes on here.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;
/// First virtio-mmio device.
pub const VIRTIO_MMIO_START: u64 = MMIO_GAP_START;
/// Bytes of one virtio-mmio device's window.
pub const VIRTIO_WINDOW: u32 = 0x1000;
/// Bytes of room for virtio-mmio devices.
pub const VIRTIO_MMIO_SIZE: u64 = 0x100_0000;

/// The page KVM needs on Intel hosts for real mode page tables.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages KVM needs on Intel hosts for a task state segment.
pub const KVM_TSS: usize = 0xfffb_d000;
/// IOAPIC registers, as KVM's in-kernel irqchip places them.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Serial port COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of a 16550.
pub const COM1_PORTS: u8 = 8;
/// COM1's interrupt line.
pub const COM1_GSI: u32 = 4;
/// Keyboard controller, data port to command port.
pub const I8042_PORT: u16 = 0x60;
/// Ports from the keyboard controller's data port through its command port.
pub const I8042_PORTS: u8 = 5;
/// ACPI reset, sleep control and sleep status register.
pub const POWER_PORT: u16 = 0x600;
/// pvpanic, where QEMU has it.
pub const PVPANIC_PORT: u16 = 0x505;
/// Interrupt line by which the ACPI generic event device says that the VM has a new generation id.
pub const NEW_GENERATION_GSI: u32 = 3;
/// Interrupt line by which the ACPI generic event device says that the power button was pressed.
pub const POWER_BUTTON_GSI: u32 = 5;
/// First interrupt line of virtio devices.
pub const VIRTIO_GSI_FIRST: u32 = 6;
/// Last interrupt line of the IOAPIC's 24.
pub const VIRTIO_GSI_LAST: u32 = 23;
