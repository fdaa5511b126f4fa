//! Model-specific registers: which belong to a guest's state, and in which order they are set.
//!
//! KVM lists those it knows (`KVM_GET_MSR_INDEX_LIST`), but for the MTRRs. Not all of them are for every guest: what
//! cannot be read is left out. What cannot be set has to be as it is wanted already.
//!
//! Two have an order. The TSC comes first: KVM's clock is reckoned from it. The TSC deadline, which is in units of it,
//! comes last, after the local APIC, without whose timer mode it would be ignored.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::Error;

/// The time stamp counter.
pub const TSC: u32 = 0x10;
/// When the local APIC's timer rings, in units of the TSC; 0 when it does not.
pub const TSC_DEADLINE: u32 = 0x6e0;

const MTRR_VARIABLE: std::ops::RangeInclusive<u32> = 0x200..=0x20f;
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;

const KVM_WALL_CLOCK: u32 = 0x11;
const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;

/// Where KVM writes the time for the guest, old and new; where it tells of pages that are not there, of time that others
/// had, and of interrupts that need no answer (Documentation/virt/kvm/x86/msr.rst).
const KVM_PAGES: [u32; 5] = [0x12, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];
/// The bit that says that there is such a page.
const KVM_PAGE_ENABLED: u64 = 1;
/// The bits of its address that tell pages apart.
const PAGE_ADDRESS: u64 = !0xfff;

/// Guest addresses of pages that KVM reads and writes by itself for a vCPU with these `msrs`.
pub fn pages_of_kvm(msrs: &[Msr]) -> impl Iterator<Item = u64> {
    let enabled = msrs
        .iter()
        .filter(|msr| KVM_PAGES.contains(&msr.index) && msr.value & KVM_PAGE_ENABLED != 0);
    enabled.map(|msr| msr.value & PAGE_ADDRESS)
}

/// A register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Which.
    pub index: u32,
    /// What is in it.
    pub value: u64,
}

/// The registers to save, of those that KVM `lists`.
pub fn to_save(lists: &[u32]) -> Vec<u32> {
    let mtrrs = MTRR_VARIABLE.chain(MTRR_FIXED).chain([MTRR_DEFAULT_TYPE]);
    let listed = lists.iter().copied().filter(|&index| is_state(index));
    let mut indices: Vec<u32> = [TSC].into_iter().chain(listed).chain(mtrrs).collect();
    let mut seen = std::collections::HashSet::new();
    indices.retain(|&index| seen.insert(index));
    indices
}

/// Whether a register is part of the state of our guests.
fn is_state(index: u32) -> bool {
    match index {
        // Setting them has KVM write the wall clock into guest memory, which the guest may use for something else by
        // now: it is read once, right after the guest itself set the register.
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW => false,
        // What guests are not shown: Hyper-V's interface, nested virtualization, performance counters of Intel and AMD.
        0x4000_0000..=0x4000_01ff | 0x480..=0x493 => false,
        0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x345 | 0x38d..=0x390 | 0x3f1 | 0x4c1..=0x4c8 => false,
        0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b | 0xc000_0300..=0xc000_0303 => false,
        _ => true,
    }
}

/// Reads the registers of `indices` that this guest has.
///
/// # Errors
/// KVM refused to read any.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let mut batch = entries(left.iter().map(|&index| Msr { index, value: 0 }))?;
        let read = vcpu.get_msrs(&mut batch).map_err(Error::kvm("read a vCPU's MSRs"))?;
        found.extend(batch.as_slice().iter().take(read).map(|entry| Msr {
            index: entry.index,
            value: entry.data,
        }));
        // KVM stops at the first it refuses.
        let refused = usize::from(read < batch.as_slice().len());
        left = &left[read + refused..];
    }
    Ok(found)
}

/// Sets registers, in order.
///
/// # Errors
/// KVM refused a register that is not as it should be already.
pub fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), Error> {
    let mut left = msrs;
    while !left.is_empty() {
        let batch = entries(left.iter().copied())?;
        let written = vcpu.set_msrs(&batch).map_err(Error::kvm("set a vCPU's MSRs"))?;
        left = &left[written..];
        if written < batch.as_slice().len() {
            let refused = left[0];
            if !is_already(vcpu, refused)? {
                return Err(Error::Msr {
                    index: refused.index,
                    value: refused.value,
                });
            }
            left = &left[1..];
        }
    }
    Ok(())
}

/// Whether a register has its value without being set; one that there is not counts as zero.
fn is_already(vcpu: &VcpuFd, msr: Msr) -> Result<bool, Error> {
    let present = read(vcpu, &[msr.index])?;
    Ok(present.first().map_or(0, |present| present.value) == msr.value)
}

/// As many of `msrs` as KVM takes at once.
fn entries(msrs: impl Iterator<Item = Msr>) -> Result<Msrs, Error> {
    let entries: Vec<_> = msrs
        .take(KVM_MAX_MSR_ENTRIES)
        .map(|msr| kvm_msr_entry {
            index: msr.index,
            data: msr.value,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| Error::KvmCapability {
        capability: "room for a list of MSRs",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_is_first_and_nothing_is_twice() {
        let indices = to_save(&[0x174, TSC, 0x277, 0x174, MTRR_DEFAULT_TYPE]);
        assert_eq!(indices[..3], [TSC, 0x174, 0x277]);
        assert_eq!(indices.iter().filter(|&&index| index == MTRR_DEFAULT_TYPE).count(), 1);
        assert_eq!(indices.len(), 3 + 16 + 11 + 1);
    }

    #[test]
    fn pages_of_kvm_are_those_that_the_guest_has_enabled() {
        let msr = |index, value| Msr { index, value };
        let msrs = [
            msr(0x4b56_4d01, 0x7_f041),
            msr(0x4b56_4d03, 0x9_0000),
            msr(0x4b56_4d04, 0xa_1235),
            msr(TSC, 0x1_0001),
        ];
        assert!(pages_of_kvm(&msrs).eq([0x7_f000, 0xa_1000]));
    }

    #[test]
    fn what_would_write_guest_memory_or_is_not_shown_is_left_out() {
        let left_out = [KVM_WALL_CLOCK, KVM_WALL_CLOCK_NEW, 0x4000_0020, 0x480, 0x345];
        let indices = to_save(&left_out);
        assert!(left_out.iter().all(|index| !indices.contains(index)));
    }
}
