//! What CPUID tells the guest: the host's supported set, with the topology of *this* VM, and without what would tie
//! the guest to this host.
//!
//! Hidden on purpose, each because a guest that relies on it could not be moved: nested virtualization (its state is
//! not saved), performance counters, SGX, processor trace, power and thermal control, the invariant TSC (the TSC
//! frequency changes with the host; kvmclock, which is corrected, is offered instead).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::Error;

/// What a vCPU's CPUID depends on besides the host.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Index of this vCPU, which is its APIC id.
    pub cpu: u8,
    /// vCPUs of the VM: cores of one socket, one thread each.
    pub cpus: u8,
    /// TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Whether the local APIC's timer has the TSC-deadline mode.
    pub tsc_deadline: bool,
}

/// Frequency of the local APIC's timer bus in KVM: one tick a nanosecond.
const APIC_BUS_KHZ: u32 = 1_000_000;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_PERFORMANCE_CAPABILITIES: u32 = 1 << 15;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
const LEAF7_EBX_SGX: u32 = 1 << 2;
const LEAF7_EBX_PROCESSOR_TRACE: u32 = 1 << 25;
const LEAF7_ECX_SGX_LAUNCH: u32 = 1 << 30;
const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT1_ECX_CORE_COUNTERS: u32 = 1 << 23;
const EXT7_EDX_INVARIANT_TSC: u32 = 1 << 8;

/// Leaf of the timing information every hypervisor may offer: TSC and APIC bus frequency in kHz.
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;

/// The CPUID of one vCPU, from what the host supports.
///
/// # Errors
/// More entries than KVM takes.
pub fn for_vcpu(supported: &CpuId, topology: Topology) -> Result<CpuId, Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| entry.function != LEAF_TIMING && !is_topology(entry))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, topology);
    }
    entries.extend(topology_leaves(supported, topology));
    entries.push(kvm_cpuid_entry2 {
        function: LEAF_TIMING,
        eax: topology.tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
    CpuId::from_entries(&entries).map_err(|error| Error::Vcpu {
        cpu: topology.cpu,
        reason: format!("its {} CPUID entries are too many: {error:?}", entries.len()),
    })
}

/// The CPUID of some vCPU of this host, for its feature bits: one of several, so that it has those of multiprocessors.
///
/// # Errors
/// As [`for_vcpu`].
pub fn shown_here(supported: &CpuId, tsc_deadline: bool) -> Result<CpuId, Error> {
    let topology = Topology {
        cpu: 0,
        cpus: 2,
        tsc_khz: 0,
        tsc_deadline,
    };
    for_vcpu(supported, topology)
}

/// Leaves made anew for this VM instead of being adjusted.
fn is_topology(entry: &kvm_cpuid_entry2) -> bool {
    matches!(entry.function, 0xb | 0x1f)
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let cpu = u32::from(topology.cpu);
    let cpus = u32::from(topology.cpus);
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ebx = entry.ebx & 0xffff | cpus << 16 | cpu << 24;
            entry.ecx &= !(LEAF1_ECX_VMX | LEAF1_ECX_PERFORMANCE_CAPABILITIES);
            entry.ecx |= LEAF1_ECX_HYPERVISOR;
            set(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, topology.tsc_deadline);
            set(&mut entry.edx, LEAF1_EDX_HTT, cpus > 1);
        }
        // Cache parameters: the last level is shared by the whole socket, the others belong to one core.
        (0x4, _) if entry.eax & 0x1f != 0 => {
            let last_level = (entry.eax >> 5) & 7 == 3;
            let sharing = if last_level { cpus } else { 1 };
            entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14 | (cpus - 1) << 26;
        }
        (0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let last_level = (entry.eax >> 5) & 7 == 3;
            let sharing = if last_level { cpus } else { 1 };
            entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14;
        }
        (0x6, _) => {
            entry.eax &= LEAF6_EAX_ARAT;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        (0x7, 0) => {
            entry.ebx &= !(LEAF7_EBX_SGX | LEAF7_EBX_PROCESSOR_TRACE);
            entry.ecx &= !LEAF7_ECX_SGX_LAUNCH;
        }
        // Performance counters, SGX, processor trace, AMD's nested virtualization and its counters.
        (0xa | 0x12 | 0x14 | 0x8000_000a | 0x8000_0022, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        (LEAF_HYPERVISOR, _) => entry.eax = LEAF_TIMING,
        (0x8000_0001, _) => {
            entry.ecx &= !(EXT1_ECX_SVM | EXT1_ECX_CORE_COUNTERS);
        }
        (0x8000_0007, _) => entry.edx &= !EXT7_EDX_INVARIANT_TSC,
        (0x8000_0008, _) => {
            let id_bits = id_bits(topology.cpus);
            entry.ecx = id_bits << 12 | (cpus - 1);
        }
        // AMD: extended APIC id, one thread per core, one node.
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (cpu, cpu, 0),
        _ => {}
    }
}

/// Extended topology (leaf 0xb, and 0x1f where the host has it): threads, then cores.
fn topology_leaves(supported: &CpuId, topology: Topology) -> Vec<kvm_cpuid_entry2> {
    const THREAD_LEVEL: u32 = 1;
    const CORE_LEVEL: u32 = 2;
    let levels = [
        (THREAD_LEVEL, 0, 1),
        (CORE_LEVEL, id_bits(topology.cpus), u32::from(topology.cpus)),
        (0, 0, 0),
    ];
    let mut leaves = Vec::new();
    for function in [0xb, 0x1f] {
        if !supported.as_slice().iter().any(|entry| entry.function == function) {
            continue;
        }
        for (index, (level, shift, processors)) in (0..).zip(levels) {
            leaves.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: processors,
                ecx: index | level << 8,
                edx: u32::from(topology.cpu),
                ..Default::default()
            });
        }
    }
    leaves
}

/// Bits of an APIC id that number the cores.
fn id_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn made(functions: &[u32], cpu: u8, cpus: u8) -> CpuId {
        let host =
            CpuId::from_entries(&functions.iter().map(|&function| entry(function, 0)).collect::<Vec<_>>()).unwrap();
        for_vcpu(
            &host,
            Topology {
                cpu,
                cpus,
                tsc_khz: 2_100_000,
                tsc_deadline: true,
            },
        )
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .expect("the leaf is there")
    }

    #[test]
    fn each_vcpu_is_a_core_with_its_index_as_apic_id() {
        let cpuid = made(&[0x1, 0xb], 3, 4);
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 16, 3 << 8 | 4);
        let (threads, cores) = (leaf(&cpuid, 0xb, 0), leaf(&cpuid, 0xb, 1));
        assert_eq!((threads.eax, threads.ebx, threads.edx), (0, 1, 3));
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 4, 3));
    }

    #[test]
    fn what_would_tie_the_guest_to_this_host_is_hidden() {
        let cpuid = made(
            &[0x1, 0x6, 0x7, 0xa, 0x12, 0x14, 0x8000_0001, 0x8000_0007, 0x8000_000a],
            0,
            1,
        );
        let hidden = LEAF1_ECX_VMX | LEAF1_ECX_PERFORMANCE_CAPABILITIES;
        assert_eq!(leaf(&cpuid, 0x1, 0).ecx & hidden, 0);
        assert_eq!(leaf(&cpuid, 0x6, 0).eax, LEAF6_EAX_ARAT);
        assert_eq!(
            leaf(&cpuid, 0x7, 0).ebx & (LEAF7_EBX_SGX | LEAF7_EBX_PROCESSOR_TRACE),
            0
        );
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & EXT1_ECX_SVM, 0);
        assert_eq!(leaf(&cpuid, 0x8000_0007, 0).edx & EXT7_EDX_INVARIANT_TSC, 0);
        for function in [0xa, 0x12, 0x14, 0x8000_000a] {
            let hidden = leaf(&cpuid, function, 0);
            assert_eq!(
                (hidden.eax, hidden.ebx, hidden.ecx, hidden.edx),
                (0, 0, 0, 0),
                "{function:#x}"
            );
        }
    }

    #[test]
    fn the_guest_is_told_its_tsc_and_apic_frequency() {
        let cpuid = made(&[LEAF_HYPERVISOR], 0, 1);
        assert_eq!(leaf(&cpuid, LEAF_HYPERVISOR, 0).eax, LEAF_TIMING);
        let timing = leaf(&cpuid, LEAF_TIMING, 0);
        assert_eq!((timing.eax, timing.ebx), (2_100_000, 1_000_000));
    }

    #[test]
    fn one_vcpu_alone_is_no_multiprocessor() {
        assert_eq!(leaf(&made(&[0x1], 0, 1), 0x1, 0).edx & LEAF1_EDX_HTT, 0);
        assert_eq!(leaf(&made(&[0x1], 0, 2), 0x1, 0).edx & LEAF1_EDX_HTT, LEAF1_EDX_HTT);
    }
}
