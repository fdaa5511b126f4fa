//! The calls of KVM's dirty log that kvm-ioctls lacks, or makes with a new buffer each time (Documentation/virt/kvm/
//! api.rst: `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG`, `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, `KVM_CAP_DIRTY_LOG_RING`).

use std::os::raw::{c_int, c_ulong};

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::page_set::WORD_PAGES;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// What of manual protection `vm` offers: bits `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE` and `KVM_DIRTY_LOG_INITIALLY_SET`.
pub fn manual_protection(vm: &VmFd) -> u64 {
    let known = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let offered = vm.check_extension_raw(c_ulong::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    // A negative number would be an error, which is no offer either.
    u64::from(u32::try_from(offered).unwrap_or(0) & known)
}

/// Has reading the log no longer clear it.
pub fn enable_manual_protection(vm: &VmFd, bits: u64) -> errno::Result<()> {
    enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, bits)
}

/// The capability by which `vm` offers dirty rings of `bytes` bytes. Newer kernels have it by a name that promises the
/// order of memory accesses which x86 has anyway.
pub fn ring_capability(vm: &VmFd, bytes: u64) -> Option<u32> {
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .find(|&capability| {
            // The answer is the most bytes a ring may have.
            let most = vm.check_extension_raw(c_ulong::from(capability));
            u64::try_from(most).is_ok_and(|most| most >= bytes)
        })
}

/// Gives each vCPU that is made from now on a ring of `bytes` bytes, which takes the place of the bitmaps.
pub fn enable_rings(vm: &VmFd, capability: u32, bytes: u64) -> errno::Result<()> {
    enable(vm, capability, bytes)
}

/// Takes back the entries of all rings that were harvested, and protects their pages against unnoticed writes.
pub fn reset_dirty_rings(vm: &VmFd) -> errno::Result<()> {
    loop {
        // SAFETY: the call has no argument, and changes no memory but the rings'.
        match checked(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) }) {
            // Part of it is done.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

fn enable(vm: &VmFd, capability: u32, argument: u64) -> errno::Result<()> {
    let mut capability = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    capability.args[0] = argument;
    vm.enable_cap(&capability)
}

/// Reads the log of memory slot `slot` into `log`.
///
/// # Safety
/// `log` has a bit for each page of the slot.
pub unsafe fn get_dirty_log(vm: &VmFd, slot: u32, log: &mut [u64]) -> errno::Result<()> {
    let arguments = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: log.as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM writes whole words for the pages of the slot, for which the caller has made room.
    checked(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &arguments) })
}

/// Clears the pages set in `log`, which begins with page `first_page` of memory slot `slot` and has `pages` pages, and
/// protects them against unnoticed writes. A multiple of 64 both, but for what ends with the slot.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, log: &[u64]) -> errno::Result<()> {
    assert_eq!(u64::from(pages).div_ceil(WORD_PAGES), log.len() as u64);
    let arguments = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: log.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM reads a bit for each page from `log`, and writes nothing there.
    checked(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &arguments) })
}

fn checked(result: c_int) -> errno::Result<()> {
    if result >= 0 { Ok(()) } else { errno::errno_result() }
}
