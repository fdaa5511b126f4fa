//! State that is saved in one VM and set in another, on this machine's KVM; and what else a file may have in its place.

use std::collections::BTreeMap;

use cutover_devices::GuestMemory;
use cutover_snapshot::section::{Payload, Section};
use kvm_bindings::*;
use vm_memory::{Bytes, GuestAddress};

use super::msrs::{self, Msr, TSC, TSC_DEADLINE};
use super::*;
use crate::cpu::shown_here;
use crate::kvm::KvmVm;
use crate::snapshot::ClockPolicy;
use crate::testing::TinyGuest;

const HOUR_NS: u64 = 3_600_000_000_000;
/// What a guest may take to be saved and restored on a busy machine.
const MOMENT_NS: u64 = HOUR_NS / 2;

const PROGRAM: u64 = 0x1000;
/// Counts in a register, keeps the count in memory, and stops.
const COUNTING: &[u8] = &[
    0x40, // again: inc ax
    0xa3, 0x00, 0x30, // mov [0x3000], ax
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xf8, // jmp again
];
const COUNT: GuestAddress = GuestAddress(0x3000);

/// Sections by name.
#[derive(Default)]
struct Collected(BTreeMap<String, (u16, Vec<u8>)>);

impl SectionWriter for Collected {
    fn payload(&mut self, name: &str, payload: &Payload<'_>) {
        self.0
            .insert(name.to_owned(), (payload.version, payload.bytes.to_vec()));
    }
}

pub fn encoded<T: Section>(value: &T) -> Vec<u8> {
    let mut to = Collected::default();
    to.section("it", value).unwrap();
    to.0.remove("it").unwrap().1
}

pub fn decoded<T: Section>(version: u16, bytes: &[u8]) -> T {
    T::read(&Payload { version, bytes }).unwrap()
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

/// A guest whose vCPU was shown what this host has.
fn guest() -> Option<(TinyGuest, GuestMemory)> {
    let memory = memory();
    let guest = TinyGuest::boot(&memory, PROGRAM, COUNTING)?;
    guest.vcpu.set_cpuid2(&shown(&guest.vm)).unwrap();
    Some((guest, memory))
}

fn shown(vm: &KvmVm) -> CpuId {
    shown_here(&vm.supported_cpuid, vm.tsc_deadline).unwrap()
}

fn save(guest: &TinyGuest) -> (VcpuState, VmState) {
    let vcpu = VcpuState::save(&guest.vcpu, &guest.vm.inventory, &shown(&guest.vm)).unwrap();
    (vcpu, VmState::save(&guest.vm.fd).unwrap())
}

/// Another VM in this state, with a copy of `memory`.
fn restore(vcpu: &VcpuState, vm: &VmState, memory: &GuestMemory, clock: ClockPolicy) -> (TinyGuest, GuestMemory) {
    let mut content = vec![0; 0x10_0000];
    memory.read_slice(&mut content, GuestAddress(0)).unwrap();
    let memory = self::memory();
    memory.write_slice(&content, GuestAddress(0)).unwrap();
    let kvm = KvmVm::create(&memory).unwrap();
    let fd = kvm.fd.create_vcpu(0).unwrap();
    fd.set_cpuid2(&vcpu.cpuid().unwrap()).unwrap();
    let passed = vm.passed_ns(clock);
    vcpu.restore(&fd, &kvm.inventory, passed).unwrap();
    vm.restore(&kvm.fd, passed).unwrap();
    (
        TinyGuest {
            vm: kvm,
            vcpu: fd,
            rings: None,
        },
        memory,
    )
}

/// The same state with its clock and the time of its saving at other values, and the timer's date of start.
fn at(vm: &VmState, clock_ns: u64, saved_at_ns: u64) -> VmState {
    let mut vm = vm.clone();
    (vm.clock_ns, vm.saved_at_ns) = (clock_ns, saved_at_ns);
    for channel in &mut vm.pit.channels {
        channel.count_load_time = 0;
    }
    vm
}

fn tsc_of(mut msrs: impl Iterator<Item = Msr>) -> u64 {
    msrs.find(|msr| msr.index == TSC).unwrap().value
}

fn without_tsc(mut vcpu: VcpuState) -> VcpuState {
    vcpu.msrs.retain(|msr| msr.index != TSC);
    vcpu
}

fn count(memory: &GuestMemory) -> u16 {
    memory.read_obj(COUNT).unwrap()
}

fn msr(guest: &TinyGuest, index: u32) -> u64 {
    msrs::read(&guest.vcpu, &[index]).unwrap()[0].value
}

#[test]
fn a_guest_goes_on_in_another_vm_where_it_was_saved() {
    let Some((mut guest, memory)) = guest() else { return };
    for _ in 0..3 {
        guest.run_to_stop();
    }
    guest.settle();
    let (vcpu, vm) = save(&guest);
    let (vcpu, vm) = (decoded(1, &encoded::<VcpuState>(&vcpu)), decoded(1, &encoded(&vm)));
    let (mut other, other_memory) = restore(&vcpu, &vm, &memory, ClockPolicy::Corrected);
    other.run_to_stop();
    other.run_to_stop();
    assert_eq!((count(&memory), count(&other_memory)), (3, 5));
    guest.run_to_stop();
    assert_eq!((count(&memory), count(&other_memory)), (4, 5));
}

#[test]
fn every_part_of_a_vcpu_is_as_it_was() {
    let Some((mut guest, memory)) = guest() else { return };
    guest.run_to_stop();
    guest.settle();
    let vcpu = &guest.vcpu;
    let mut xsave = vcpu.get_xsave().unwrap();
    // XMM registers 0 to 15, and the bits that say that x87 and SSE state are not those after a reset.
    xsave.region[40..104].copy_from_slice(&[0x0102_0304; 64]);
    xsave.region[128] = 0b11;
    // SAFETY: the guest was shown no features beyond what the structure holds.
    unsafe { vcpu.set_xsave(&xsave) }.unwrap();
    let mut debug = vcpu.get_debug_regs().unwrap();
    debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
    vcpu.set_debug_regs(&debug).unwrap();
    let written = [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0102, 0x277, 0x2ff].map(|index| Msr {
        index,
        value: if index == 0x277 { 0x0007_0406_0007_0106 } else { 0x806 },
    });
    msrs::write(vcpu, &written).unwrap();
    let mut events = vcpu.get_vcpu_events().unwrap();
    events.nmi.masked = 1;
    vcpu.set_vcpu_events(&events).unwrap();
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_HALTED,
    })
    .unwrap();
    let (saved, vm) = save(&guest);
    assert!(written.iter().all(|msr| saved.msrs.contains(msr)));
    let (other, _) = restore(&saved, &vm, &memory, ClockPolicy::Stopped);
    let (again, vm_again) = save(&other);
    assert_eq!(encoded(&without_tsc(again)), encoded(&without_tsc(saved)));
    assert_eq!(encoded(&at(&vm_again, 0, 0)), encoded(&at(&vm, 0, 0)));
    assert_eq!(other.vcpu.get_xsave().unwrap().region[40..104], xsave.region[40..104]);
    assert_eq!(other.vcpu.get_debug_regs().unwrap().db, debug.db);
}

#[test]
fn an_interrupt_that_waits_is_not_lost() {
    let Some((guest, memory)) = guest() else { return };
    guest.vm.fd.set_irq_line(5, true).unwrap();
    let (vcpu, vm) = save(&guest);
    let (other, _) = restore(&vcpu, &vm, &memory, ClockPolicy::Stopped);
    let mut pic = kvm_irqchip {
        chip_id: KVM_IRQCHIP_PIC_MASTER,
        ..Default::default()
    };
    other.vm.fd.get_irqchip(&mut pic).unwrap();
    // SAFETY: KVM filled this member of the union for the chip it was asked for.
    assert_eq!(unsafe { pic.chip.pic.irr } & 1 << 5, 1 << 5);
}

#[test]
fn time_that_passed_has_passed_for_the_guest_unless_its_clocks_were_stopped() {
    let Some((guest, memory)) = guest() else { return };
    let (vcpu, vm) = save(&guest);
    let clock = vm.clock_ns;
    let an_hour_ago = at(&vm, clock, vm.saved_at_ns - HOUR_NS);
    for (policy, passed) in [(ClockPolicy::Corrected, HOUR_NS), (ClockPolicy::Stopped, 0)] {
        let (other, _) = restore(&vcpu, &an_hour_ago, &memory, policy);
        let ahead = other.vm.fd.get_clock().unwrap().clock - clock;
        assert!((passed..passed + MOMENT_NS).contains(&ahead), "{policy:?}: {ahead} ns");
    }
    // What comes of the TSC's value is for KVM to say: not every one lets it be set.
    let khz = u64::from(guest.vcpu.get_tsc_khz().unwrap());
    let ahead = tsc_of(vcpu.msrs_after(HOUR_NS)).wrapping_sub(tsc_of(vcpu.msrs_after(0)));
    assert_eq!(ahead, khz * (HOUR_NS / 1_000_000));
    let others = |msrs: Vec<Msr>| msrs.into_iter().filter(|msr| msr.index != TSC).collect::<Vec<_>>();
    assert_eq!(others(vcpu.msrs_after(u64::MAX).collect()), others(vcpu.msrs.clone()));
}

#[test]
fn a_clock_never_goes_back_where_the_hosts_clock_is_behind() {
    let Some((guest, memory)) = guest() else { return };
    let (vcpu, vm) = save(&guest);
    let clock = vm.clock_ns;
    let in_an_hour = at(&vm, clock, vm.saved_at_ns + HOUR_NS);
    assert_eq!(in_an_hour.passed_ns(ClockPolicy::Corrected), 0);
    let (other, _) = restore(&vcpu, &in_an_hour, &memory, ClockPolicy::Corrected);
    assert!((clock..clock + MOMENT_NS).contains(&other.vm.fd.get_clock().unwrap().clock));
}

#[test]
fn an_armed_timer_is_armed_again_after_the_local_apic_has_its_mode() {
    let Some((guest, memory)) = guest() else { return };
    let mut lapic = guest.vcpu.get_lapic().unwrap();
    // Enabled by software, timer in TSC-deadline mode with vector 0x40.
    for (register, value) in [(0xf0_usize, 0x1ff_u32), (0x320, 0x4_0040)] {
        for (slot, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *slot = byte.cast_signed();
        }
    }
    guest.vcpu.set_lapic(&lapic).unwrap();
    let deadline = msr(&guest, TSC) + (1 << 50);
    let armed = Msr {
        index: TSC_DEADLINE,
        value: deadline,
    };
    msrs::write(&guest.vcpu, &[armed]).unwrap();
    let (vcpu, vm) = save(&guest);
    let (other, _) = restore(&vcpu, &vm, &memory, ClockPolicy::Stopped);
    assert_eq!(msr(&other, TSC_DEADLINE), deadline);

    let disarmed = Msr {
        index: TSC_DEADLINE,
        value: 0,
    };
    msrs::write(&guest.vcpu, &[disarmed]).unwrap();
    let (vcpu, _) = save(&guest);
    let saved = vcpu.msrs;
    let value = |index| saved.iter().find(|msr| msr.index == index).unwrap().value;
    assert_eq!(value(TSC_DEADLINE), value(TSC), "one that may have rung rings again");
}

#[test]
fn a_register_that_cannot_be_set_must_be_as_wanted() {
    let Some((guest, _)) = guest() else { return };
    let absent = |value| Msr {
        index: 0xdead_beef,
        value,
    };
    let present = Msr {
        index: 0x174,
        value: 0x10,
    };
    msrs::write(&guest.vcpu, &[absent(0), present]).unwrap();
    assert_eq!(msr(&guest, 0x174), 0x10);
    let refused = msrs::write(&guest.vcpu, &[present, absent(1)]);
    assert!(matches!(
        refused,
        Err(Error::Msr {
            index: 0xdead_beef,
            value: 1
        })
    ));
}

#[test]
fn a_tsc_counts_as_the_guest_was_told_or_the_guest_is_refused() {
    let Some((guest, memory)) = guest() else { return };
    let (vcpu, vm) = save(&guest);
    let with_khz = |tsc_khz| {
        let mut vcpu = vcpu.clone();
        vcpu.tsc_khz = tsc_khz;
        vcpu
    };
    let near = vcpu.tsc_khz + vcpu.tsc_khz / 10_000;
    drop(restore(&with_khz(near), &vm, &memory, ClockPolicy::Stopped));

    let far = vcpu.tsc_khz / 100 * 99;
    let kvm = KvmVm::create(&memory).unwrap();
    let fd = kvm.fd.create_vcpu(0).unwrap();
    fd.set_cpuid2(&vcpu.cpuid().unwrap()).unwrap();
    match with_khz(far).restore(&fd, &kvm.inventory, 0) {
        Ok(()) => assert_eq!(fd.get_tsc_khz().unwrap(), far, "this host's KVM scales it"),
        Err(Error::TscFrequency { guest_khz, host_khz }) => assert_eq!((guest_khz, host_khz), (far, vcpu.tsc_khz)),
        Err(other) => panic!("{other}"),
    }
}
