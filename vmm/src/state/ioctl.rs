//! The calls about a vCPU's state that kvm-ioctls lacks, or leaves to the caller to make safe (Documentation/virt/kvm/
//! api.rst: `KVM_GET_SREGS2`, `KVM_GET_XSAVE2`, `KVM_SET_XSAVE`).

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

/// Bytes of `struct kvm_xsave`, without what extended features add.
pub const XSAVE_BYTES: usize = size_of::<kvm_xsave>();

ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);

fn outcome(result: i32) -> errno::Result<()> {
    if result < 0 { errno::errno_result() } else { Ok(()) }
}

/// Reads the system registers with the page directory pointers of PAE paging.
pub fn get_sregs2(vcpu: &VcpuFd) -> errno::Result<kvm_sregs2> {
    let mut registers = kvm_sregs2::default();
    // SAFETY: KVM writes one kvm_sregs2.
    outcome(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut registers) })?;
    Ok(registers)
}

/// Sets them.
pub fn set_sregs2(vcpu: &VcpuFd, registers: &kvm_sregs2) -> errno::Result<()> {
    // SAFETY: KVM reads one kvm_sregs2.
    outcome(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), registers) })
}

/// Reads the extended state into `area`.
///
/// # Safety
/// `area` has as many bytes as `KVM_CAP_XSAVE2` says, and not less than [`XSAVE_BYTES`].
pub unsafe fn get_xsave(vcpu: &VcpuFd, area: &mut [u8]) -> errno::Result<()> {
    // The older call is for all there is if it fits.
    let request = if area.len() > XSAVE_BYTES {
        KVM_GET_XSAVE2()
    } else {
        KVM_GET_XSAVE()
    };
    // SAFETY: KVM writes as many bytes as there are: the caller's promise.
    outcome(unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) })
}

/// Sets the extended state to `area`.
///
/// # Safety
/// As [`get_xsave`].
pub unsafe fn set_xsave(vcpu: &VcpuFd, area: &[u8]) -> errno::Result<()> {
    // SAFETY: KVM reads as many bytes as there are: the caller's promise.
    outcome(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) })
}
