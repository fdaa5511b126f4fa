//! The ACPI tables by which a stock kernel finds everything (ACPI 6.5; hardware-reduced, chapter 4.1).
//!
//! ```text
//!  RSDP ─► XSDT ─► FADT ─► DSDT: COM1, virtio-mmio devices, pvpanic, S5
//!              │                 power button and VM generation id behind a generic event device
//!              └─► MADT: local APICs, IOAPIC
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use cutover_devices::GuestMemory;
use cutover_devices::power::{RESET_VALUE, SLEEP_TYPE_S5};
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::layout::{
    ACPI_TABLES, ACPI_TABLES_END, COM1_GSI, COM1_PORT, COM1_PORTS, IOAPIC, LOCAL_APIC, NEW_GENERATION_GSI,
    POWER_BUTTON_GSI, POWER_PORT, PVPANIC_PORT, VIRTIO_WINDOW, VM_GENERATION_ID,
};

/// A virtio-mmio device as the guest is to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioNode {
    /// First address of its window.
    pub address: u32,
    /// Its interrupt line.
    pub gsi: u32,
}

const OEM: [u8; 6] = *b"CUTOVR";
const OEM_TABLE: [u8; 8] = *b"CUTOVER ";
const OEM_REVISION: u32 = 1;

/// FADT boot architecture flags: there is neither VGA, nor a CMOS clock, nor (bit 1 clear) a keyboard controller.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// Writes the tables for `cpus` vCPUs and `virtio` devices into `memory`, RSDP first.
///
/// # Errors
/// They do not fit: a fault of the limits on devices.
pub fn write_tables(memory: &GuestMemory, cpus: u8, virtio: &[VirtioNode]) -> Result<(), Error> {
    let mut room = Room {
        memory,
        next: ACPI_TABLES + table_size(Rsdp::len()),
    };
    let dsdt = room.put(&dsdt(virtio))?;
    let fadt = room.put(&fadt(dsdt))?;
    let madt = room.put(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = room.put(&xsdt)?;
    room.next = ACPI_TABLES;
    room.put(&Rsdp::new(OEM, xsdt))?;
    Ok(())
}

/// The guest memory tables go to, filled from its start.
struct Room<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Room<'_> {
    /// Writes `table` and returns its address.
    fn put(&mut self, table: &dyn Aml) -> Result<u64, Error> {
        let bytes = bytes_of(table);
        let address = self.next;
        let end = address + table_size(bytes.len());
        if end > ACPI_TABLES_END {
            return Err(Error::OutOfResources {
                resource: "room for ACPI tables",
                device: "the guest".to_owned(),
            });
        }
        self.memory
            .write_slice(&bytes, GuestAddress(address))
            .map_err(Error::guest_write("the ACPI tables"))?;
        self.next = end;
        Ok(address)
    }
}

/// Bytes a table takes, aligned for the next.
fn table_size(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(16)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, POWER_PORT.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::TmrValExt)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = register;
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register;
    fadt.sleep_status_reg = register;
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    madt
}

fn dsdt(virtio: &[VirtioNode]) -> Sdt {
    const HEADER: u32 = 36;
    const REVISION_64_BIT: u8 = 2;
    let com1 = IO::new(COM1_PORT, COM1_PORT, 1, COM1_PORTS);
    let panic_port = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    let mut devices = device(
        "COM1",
        &EISAName::new("PNP0501"),
        0,
        &[&com1, &edge_interrupt(COM1_GSI)],
    );
    devices.extend(device("PEVT", &"QEMU0001", 0, &[&panic_port]));
    devices.extend(power_button());
    devices.extend(generation_id());
    devices.extend(event_device());
    for (index, node) in (0..).zip(virtio) {
        let window = Memory32Fixed::new(true, node.address, VIRTIO_WINDOW);
        devices.extend(device(
            &format!("V{index:03}"),
            &"LNRO0005",
            index,
            &[&window, &edge_interrupt(node.gsi)],
        ));
    }
    let soft_off = Name::new(
        "_S5_".into(),
        &Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]),
    );
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, REVISION_64_BIT, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices));
    dsdt.append_slice(&bytes_of(&soft_off));
    dsdt
}

/// A device with an id, a number and resources.
fn device(name: &str, id: &dyn Aml, number: u8, resources: &[&dyn Aml]) -> Vec<u8> {
    let resources = ResourceTemplate::new(resources.to_vec());
    bytes_of(&Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), id),
            &Name::new("_UID".into(), &number),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

const POWER_BUTTON: &str = "PWRB";
const GENERATION_ID: &str = "VGEN";

fn power_button() -> Vec<u8> {
    bytes_of(&Device::new(
        POWER_BUTTON.into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))],
    ))
}

/// Where the VM generation id is (Microsoft, "Virtual Machine Generation ID"): the halves of its address.
fn generation_id() -> Vec<u8> {
    let [low, high] = [VM_GENERATION_ID & u64::from(u32::MAX), VM_GENERATION_ID >> 32];
    let name = "VM_Gen_Counter";
    bytes_of(&Device::new(
        GENERATION_ID.into(),
        vec![
            &Name::new("_HID".into(), &"CTVRVGID"),
            &Name::new("_CID".into(), &name),
            &Name::new("_DDN".into(), &name),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    ))
}

/// The generic event device (ACPI 6.5, 5.6.9): which of its interrupts notifies which device.
fn event_device() -> Vec<u8> {
    const STATUS_CHANGE: u8 = 0x80;
    let interrupts = [POWER_BUTTON_GSI, NEW_GENERATION_GSI].map(edge_interrupt);
    let resources = ResourceTemplate::new(interrupts.iter().map(|interrupt| interrupt as &dyn Aml).collect());
    let (button, generation) = (Path::new(POWER_BUTTON), Path::new(GENERATION_ID));
    let notify_button = Notify::new(&button, &STATUS_CHANGE);
    let notify_generation = Notify::new(&generation, &STATUS_CHANGE);
    let is_button = Equal::new(&Arg(0), &POWER_BUTTON_GSI);
    let is_generation = Equal::new(&Arg(0), &NEW_GENERATION_GSI);
    bytes_of(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_CRS".into(), &resources),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &If::new(&is_button, vec![&notify_button]),
                    &If::new(&is_generation, vec![&notify_generation]),
                ],
            ),
        ],
    ))
}

/// An interrupt that a device pulses; active high.
fn edge_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("in guest memory");
        bytes
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).expect("in guest memory");
        read(memory, address, length as usize)
    }

    fn address_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
    }

    #[test]
    fn the_kernel_finds_every_table_from_the_rsdp_with_good_checksums() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).expect("memory");
        let nodes = [
            VirtioNode {
                address: 0xc000_0000,
                gsi: 6,
            },
            VirtioNode {
                address: 0xc000_1000,
                gsi: 7,
            },
        ];
        write_tables(&memory, 2, &nodes).expect("the tables fit");

        let rsdp = read(&memory, ACPI_TABLES, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&memory, address_at(&rsdp, 24));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(&memory, address_at(&xsdt, 36));
        assert_eq!((&fadt[..4], sum(&fadt)), (&b"FACP"[..], 0));
        let madt = table(&memory, address_at(&xsdt, 44));
        assert_eq!((&madt[..4], sum(&madt)), (&b"APIC"[..], 0));
        let dsdt = table(&memory, address_at(&fadt, 140));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
        let nodes = dsdt.windows(8).filter(|window| window == b"LNRO0005").count();
        assert_eq!(nodes, 2);
        let generation = dsdt.windows(15).filter(|window| window == b"VM_Gen_Counter\0").count();
        assert_eq!(generation, 2, "as compatible id, and as name");
    }

    #[test]
    fn the_most_devices_and_vcpus_there_can_be_fit() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).expect("memory");
        let nodes = [VirtioNode {
            address: 0xc000_0000,
            gsi: 6,
        }; 24];
        write_tables(&memory, u8::MAX, &nodes).expect("the tables fit");
    }
}
