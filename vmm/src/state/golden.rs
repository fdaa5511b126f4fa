//! Version 1 of each section, put together by hand from the format's description: it is read, and written the same.
//!
//! When the version of a section goes up: what is here stays, and is read into the new type.

use cutover_devices::serial::SerialState;
use cutover_devices::virtio::mmio::TransportState;
use kvm_bindings::kvm_cpuid_entry2;

use super::msrs::Msr;
use super::tests::{decoded, encoded};
use super::{VcpuState, VmState};

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

#[test]
fn a_vcpu_of_version_1_is_read() {
    let bytes = Bytes::default()
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
        .0;
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

#[test]
fn a_vm_of_version_1_is_read() {
    let bytes = Bytes::default()
        // Both 8259s, IOAPIC.
        .filled(520, 1)
        .filled(520, 2)
        .filled(520, 3)
        // Interval timer.
        .filled(112, 4)
        // Clock, and when it was.
        .number(1_000_000_007)
        .number(1_700_000_000_000_000_000)
        .0;
    let state: VmState = decoded(1, &bytes);
    assert_eq!(encoded(&state), bytes);
    assert_eq!(
        (state.clock_ns, state.saved_at_ns),
        (1_000_000_007, 1_700_000_000_000_000_000)
    );
}

#[test]
fn a_virtio_device_of_version_1_is_read() {
    let bytes = Bytes::default()
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
        .0;
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

#[test]
fn a_serial_port_of_version_1_is_read() {
    let bytes = Bytes::default()
        // Registers, in the order of their declaration; then what was received.
        .raw(&[12, 0, 5, 0xc1, 3, 0x61, 0x0b, 0xb0, 7])
        .filled(3, b'x')
        .0;
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
