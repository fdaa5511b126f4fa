//! Version 1 of each section, put together by hand from the format's description: it is read, and written the same.
//!
//! When the version of a section goes up: what is here stays, and is read into the new type.

use cutover_devices::serial::SerialState;
use cutover_devices::virtio::mmio::TransportState;
use cutover_devices::virtio::net::AddressesState;
use cutover_snapshot::section::{Payload, Section};
use kvm_bindings::kvm_cpuid_entry2;
use proptest::prelude::*;

use super::msrs::Msr;
use super::tests::{decoded, encoded};
use super::{VcpuState, VmState, cpu_needs};
use crate::snapshot::ClockPolicy;

/// An encoding, from its start.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    /// Small numbers and booleans.
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// A number of more than 8 bits: 7 at a time, the lowest first, the highest bit set on all but the last.
    fn number(mut self, mut value: u64) -> Self {
        while value > 0x7f {
            self.0.push(0x80 | value.to_le_bytes()[0] & 0x7f);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
        self
    }

    /// A structure of the kernel, or a string of bytes: its length, and here the same byte all over.
    fn filled(self, length: usize, with: u8) -> Self {
        let mut bytes = self.number(length as u64);
        bytes.0.resize(bytes.0.len() + length, with);
        bytes
    }
}

fn vcpu_v1() -> Vec<u8> {
    Bytes::default()
        // CPUID: one entry.
        .number(1)
        .filled(40, 1)
        // TSC frequency.
        .number(2_600_000)
        // MP state, events, registers, system registers.
        .filled(4, 2)
        .filled(64, 3)
        .filled(144, 4)
        .filled(312, 5)
        // Page directory pointers: there are some.
        .raw(&[1])
        .number(0x10)
        .number(0x20)
        .number(0x30)
        .number(u64::MAX)
        // Debug registers, extended control registers, extended state, local APIC.
        .filled(128, 6)
        .filled(392, 7)
        .filled(4096, 8)
        .filled(1024, 9)
        // MSRs: two, each with its index and its value.
        .number(2)
        .number(0x10)
        .number(0x1234_5678)
        .number(0xc000_0102)
        .number(0)
        .0
}

#[test]
fn a_vcpu_of_version_1_is_read() {
    let bytes = vcpu_v1();
    let state: VcpuState = decoded(1, &bytes);
    assert_eq!(encoded(&state), bytes);
    state.check().unwrap();
    let one = 0x0101_0101;
    let entry = kvm_cpuid_entry2 {
        function: one,
        index: one,
        flags: one,
        eax: one,
        ebx: one,
        ecx: one,
        edx: one,
        padding: [one; 3],
    };
    assert_eq!(state.cpuid, [entry]);
    let msr = |index, value| Msr { index, value };
    assert_eq!(state.msrs, [msr(0x10, 0x1234_5678), msr(0xc000_0102, 0)]);
}

fn vm_v1() -> Vec<u8> {
    Bytes::default()
        // Both 8259s, IOAPIC.
        .filled(520, 1)
        .filled(520, 2)
        .filled(520, 3)
        // Interval timer.
        .filled(112, 4)
        // Clock, and when it was.
        .number(1_000_000_007)
        .number(1_700_000_000_000_000_000)
        .0
}

#[test]
fn a_vm_of_version_1_is_read() {
    let bytes = vm_v1();
    let state: VmState = decoded(1, &bytes);
    assert_eq!(encoded(&state), bytes);
    assert_eq!(
        (state.clock_ns, state.saved_at_ns),
        (1_000_000_007, 1_700_000_000_000_000_000)
    );
}

fn virtio_v1() -> Vec<u8> {
    Bytes::default()
        // Status, whether it needs a reset, interrupt status, features, the three selects.
        .number(15)
        .raw(&[0])
        .number(1)
        .number(0x1_3000_0000)
        .number(1)
        .number(2)
        .number(3)
        // Queues: one, with its size, whether it is ready, and its three addresses.
        .number(1)
        .number(256)
        .raw(&[1])
        .number(0x1000)
        .number(0x2000)
        .number(0x1_0000_0000)
        // Positions: one, in the available and in the used ring.
        .number(1)
        .number(65_535)
        .number(300)
        // Configuration space and its generation.
        .filled(8, 5)
        .number(2)
        .0
}

#[test]
fn a_virtio_device_of_version_1_is_read() {
    let bytes = virtio_v1();
    let state: TransportState = decoded(1, &bytes);
    assert_eq!(encoded(&state), bytes);
    let shown = format!("{state:?}");
    for part in [
        "status: 15",
        "accepted_features: 5100273664",
        "size: 256",
        "used_ring: 4294967296",
        "next_available: 65535",
        "next_used: 300",
        "config_generation: 2",
    ] {
        assert!(shown.contains(part), "{shown} lacks {part}");
    }
}

fn addresses_v1() -> Vec<u8> {
    Bytes::default()
        // IPv4: one, as the address of its interface and itself; IPv6: the same.
        .number(1)
        .raw(&[2, 0, 0, 0, 0, 0x2a])
        .raw(&[192, 0, 2, 7])
        .number(1)
        .raw(&[2, 0, 0, 0, 0, 0x2b])
        .raw(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
        // Whether it is a router.
        .raw(&[1])
        .0
}

#[test]
fn addresses_of_a_guest_of_version_1_are_read() {
    let bytes = addresses_v1();
    let state: AddressesState = decoded(1, &bytes);
    assert_eq!(encoded(&state), bytes);
    let shown = format!("{state:?}");
    for part in [
        "[2, 0, 0, 0, 0, 42], address: 192.0.2.7",
        "address: fe80::1",
        "router: true",
    ] {
        assert!(shown.contains(part), "{shown} lacks {part}");
    }
}

fn serial_v1() -> Vec<u8> {
    Bytes::default()
        // Registers, in the order of their declaration; then what was received.
        .raw(&[12, 0, 5, 0xc1, 3, 0x61, 0x0b, 0xb0, 7])
        .filled(3, b'x')
        .0
}

#[test]
fn a_serial_port_of_version_1_is_read() {
    let bytes = serial_v1();
    let state: SerialState = decoded(1, &bytes);
    assert_eq!(encoded(&state), bytes);
    let shown = format!("{state:?}");
    for part in [
        "divisor_low: 12",
        "line_status: 97",
        "scratch: 7",
        "received: [120, 120, 120]",
    ] {
        assert!(shown.contains(part), "{shown} lacks {part}");
    }
}

/// Reads `bytes` as a `T`: it is one, or an error.
fn try_to_read<T: Section>(version: u16, bytes: &[u8]) -> Option<T> {
    T::read(&Payload { version, bytes }).ok()
}

proptest! {
    #[test]
    fn whatever_was_done_to_a_section_reading_it_does_not_panic(
        version in 0..3_u16,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let damaged = |mut bytes: Vec<u8>| {
            for (index, byte) in &damage {
                let index = index.index(bytes.len());
                bytes[index] = *byte;
            }
            if is_cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        };
        if let Some(state) = try_to_read::<VcpuState>(version, &damaged(vcpu_v1())) {
            prop_assert_eq!(version, 1);
            drop(state.check());
            drop(cpu_needs::of(&state.cpuid));
            prop_assert!(state.msrs_after(u64::MAX).count() <= state.msrs.len());
        }
        if let Some(state) = try_to_read::<VmState>(version, &damaged(vm_v1())) {
            state.passed_ns(ClockPolicy::Corrected);
        }
        try_to_read::<TransportState>(version, &damaged(virtio_v1()));
        try_to_read::<SerialState>(version, &damaged(serial_v1()));
        try_to_read::<AddressesState>(version, &damaged(addresses_v1()));
    }
}

#[test]
fn a_vcpu_with_more_than_there_can_be_is_refused() {
    let state: VcpuState = decoded(1, &vcpu_v1());
    let refused = |change: fn(&mut VcpuState)| {
        let mut state = state.clone();
        change(&mut state);
        state.check().unwrap_err().to_string()
    };
    let cpuid = refused(|state| state.cpuid = vec![state.cpuid[0]; 257]);
    assert!(cpuid.contains("257 CPUID entries are too many"), "{cpuid}");
    let msrs = refused(|state| state.msrs = vec![state.msrs[0]; 1025]);
    assert!(msrs.contains("1025 MSRs are too many"), "{msrs}");
    for (length, refused) in [
        (0, refused(|state| state.xsave.clear())),
        (4095, refused(|state| state.xsave.truncate(4095))),
        (65537, refused(|state| state.xsave.resize(65537, 0))),
    ] {
        assert!(
            refused.contains(&format!("{length} bytes are no extended state")),
            "{refused}"
        );
    }
    let still = refused(|state| state.tsc_khz = 0);
    assert!(still.contains("does not stand still"), "{still}");
}
