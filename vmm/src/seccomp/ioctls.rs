//! The `ioctl` requests that each kind of thread makes; it may make no others. Numbers as in the kernel's headers
//! (`linux/kvm.h`, `linux/if_tun.h`, `linux/sockios.h`, `asm-generic/ioctls.h`).

use kvm_bindings::*;
use linux_raw_sys::general::pm_scan_arg;
use linux_raw_sys::ioctl::{FICLONE, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// Running a vCPU, making room in its dirty ring, telling its guest of a pause, telling where it failed, and saving its
/// state.
pub const VCPU: &[u64] = &[
    kvm(_IOC_NONE, 0x80, 0),                                  // KVM_RUN
    kvm(_IOC_NONE, 0xc7, 0),                                  // KVM_RESET_DIRTY_RINGS
    kvm(_IOC_READ, 0x81, size_of::<kvm_regs>()),              // KVM_GET_REGS
    kvm(_IOC_NONE, 0xad, 0),                                  // KVM_KVMCLOCK_CTRL
    kvm(_IOC_READ, 0x83, size_of::<kvm_sregs>()),             // KVM_GET_SREGS
    kvm(_IOC_READ | _IOC_WRITE, 0x88, size_of::<kvm_msrs>()), // KVM_GET_MSRS
    kvm(_IOC_READ, 0x8e, size_of::<kvm_lapic_state>()),       // KVM_GET_LAPIC
    kvm(_IOC_READ, 0x98, size_of::<kvm_mp_state>()),          // KVM_GET_MP_STATE
    kvm(_IOC_READ, 0x9f, size_of::<kvm_vcpu_events>()),       // KVM_GET_VCPU_EVENTS
    kvm(_IOC_READ, 0xa1, size_of::<kvm_debugregs>()),         // KVM_GET_DEBUGREGS
    kvm(_IOC_NONE, 0xa3, 0),                                  // KVM_GET_TSC_KHZ
    kvm(_IOC_READ, 0xa4, size_of::<kvm_xsave>()),             // KVM_GET_XSAVE
    kvm(_IOC_READ, 0xa6, size_of::<kvm_xcrs>()),              // KVM_GET_XCRS
    kvm(_IOC_READ, 0xcc, size_of::<kvm_sregs2>()),            // KVM_GET_SREGS2
    kvm(_IOC_READ, 0xcf, size_of::<kvm_xsave>()),             // KVM_GET_XSAVE2
];

/// Tracking which pages of guest memory change, and saving the state of what no vCPU owns.
pub const VM: &[u64] = &[
    kvm(_IOC_READ | _IOC_WRITE, 0x62, size_of::<kvm_irqchip>()), // KVM_GET_IRQCHIP
    kvm(_IOC_READ, 0x7c, size_of::<kvm_clock_data>()),           // KVM_GET_CLOCK
    kvm(_IOC_READ, 0x9f, size_of::<kvm_pit_state2>()),           // KVM_GET_PIT2
    kvm(_IOC_WRITE, 0x42, size_of::<kvm_dirty_log>()),           // KVM_GET_DIRTY_LOG
    kvm(_IOC_WRITE, 0x46, size_of::<kvm_userspace_memory_region>()), // KVM_SET_USER_MEMORY_REGION
    kvm(_IOC_READ | _IOC_WRITE, 0xc0, size_of::<kvm_clear_dirty_log>()), // KVM_CLEAR_DIRTY_LOG
    kvm(_IOC_NONE, 0xc7, 0),                                     // KVM_RESET_DIRTY_RINGS
    PAGEMAP_SCAN,
    UFFDIO_REGISTER as u64,
    UFFDIO_UNREGISTER as u64,
    UFFDIO_WAKE as u64,
];

/// Agreeing with a driver on the offloads of a tap.
pub const DEVICES: &[u64] = &[libc::TUNSETOFFLOAD];

/// Copying a disk by sharing its blocks.
pub const FILES: &[u64] = &[FICLONE as u64];

/// Telling how much has been received, as the C library does when it looks up a name, and whether to wait.
pub const SOCKETS: &[u64] = &[libc::FIONREAD, libc::FIONBIO];

/// Saving and setting a terminal's mode.
pub const TERMINAL: &[u64] = &[libc::TCGETS, libc::TCGETS2, libc::TCSETS, libc::TCSETS2];

/// Building a VM, new or in a saved state: what KVM is asked, taps and their host's end, a console's terminal.
pub const BUILD: &[u64] = &[
    kvm(_IOC_NONE, 0x00, 0),                                         // KVM_GET_API_VERSION
    kvm(_IOC_NONE, 0x01, 0),                                         // KVM_CREATE_VM
    kvm(_IOC_READ | _IOC_WRITE, 0x02, size_of::<kvm_msr_list>()),    // KVM_GET_MSR_INDEX_LIST
    kvm(_IOC_NONE, 0x03, 0),                                         // KVM_CHECK_EXTENSION
    kvm(_IOC_NONE, 0x04, 0),                                         // KVM_GET_VCPU_MMAP_SIZE
    kvm(_IOC_READ | _IOC_WRITE, 0x05, size_of::<kvm_cpuid2>()),      // KVM_GET_SUPPORTED_CPUID
    kvm(_IOC_NONE, 0x41, 0),                                         // KVM_CREATE_VCPU
    kvm(_IOC_WRITE, 0x46, size_of::<kvm_userspace_memory_region>()), // KVM_SET_USER_MEMORY_REGION
    kvm(_IOC_NONE, 0x47, 0),                                         // KVM_SET_TSS_ADDR
    kvm(_IOC_WRITE, 0x48, size_of::<u64>()),                         // KVM_SET_IDENTITY_MAP_ADDR
    kvm(_IOC_NONE, 0x60, 0),                                         // KVM_CREATE_IRQCHIP
    kvm(_IOC_READ, 0x63, size_of::<kvm_irqchip>()),                  // KVM_SET_IRQCHIP
    kvm(_IOC_WRITE, 0x76, size_of::<kvm_irqfd>()),                   // KVM_IRQFD
    kvm(_IOC_WRITE, 0x77, size_of::<kvm_pit_config>()),              // KVM_CREATE_PIT2
    kvm(_IOC_WRITE, 0x79, size_of::<kvm_ioeventfd>()),               // KVM_IOEVENTFD
    kvm(_IOC_WRITE, 0x7b, size_of::<kvm_clock_data>()),              // KVM_SET_CLOCK
    kvm(_IOC_WRITE, 0x82, size_of::<kvm_regs>()),                    // KVM_SET_REGS
    kvm(_IOC_READ, 0x83, size_of::<kvm_sregs>()),                    // KVM_GET_SREGS
    kvm(_IOC_WRITE, 0x84, size_of::<kvm_sregs>()),                   // KVM_SET_SREGS
    kvm(_IOC_WRITE, 0x89, size_of::<kvm_msrs>()),                    // KVM_SET_MSRS
    kvm(_IOC_WRITE, 0x8d, size_of::<kvm_fpu>()),                     // KVM_SET_FPU
    kvm(_IOC_READ, 0x8e, size_of::<kvm_lapic_state>()),              // KVM_GET_LAPIC
    kvm(_IOC_WRITE, 0x8f, size_of::<kvm_lapic_state>()),             // KVM_SET_LAPIC
    kvm(_IOC_WRITE, 0x90, size_of::<kvm_cpuid2>()),                  // KVM_SET_CPUID2
    kvm(_IOC_WRITE, 0x99, size_of::<kvm_mp_state>()),                // KVM_SET_MP_STATE
    kvm(_IOC_WRITE, 0xa0, size_of::<kvm_pit_state2>()),              // KVM_SET_PIT2
    kvm(_IOC_WRITE, 0xa0, size_of::<kvm_vcpu_events>()),             // KVM_SET_VCPU_EVENTS
    kvm(_IOC_NONE, 0xa2, 0),                                         // KVM_SET_TSC_KHZ
    kvm(_IOC_WRITE, 0xa2, size_of::<kvm_debugregs>()),               // KVM_SET_DEBUGREGS
    kvm(_IOC_NONE, 0xa3, 0),                                         // KVM_GET_TSC_KHZ
    kvm(_IOC_WRITE, 0xa3, size_of::<kvm_enable_cap>()),              // KVM_ENABLE_CAP
    kvm(_IOC_WRITE, 0xa5, size_of::<kvm_xsave>()),                   // KVM_SET_XSAVE
    kvm(_IOC_WRITE, 0xa7, size_of::<kvm_xcrs>()),                    // KVM_SET_XCRS
    kvm(_IOC_WRITE, 0xcd, size_of::<kvm_sregs2>()),                  // KVM_SET_SREGS2
    libc::TUNGETFEATURES,
    libc::TUNGETIFF,
    libc::TUNSETIFF,
    libc::TUNSETVNETHDRSZ,
    libc::SIOCGIFFLAGS,
    libc::SIOCGIFINDEX,
    libc::SIOCSIFADDR,
    libc::SIOCSIFFLAGS,
    libc::SIOCSIFMTU,
    libc::SIOCSIFNETMASK,
    libc::TIOCGPGRP,
    libc::TIOCGPTN,
    libc::TIOCGPTPEER,
    libc::TIOCGWINSZ,
    libc::TIOCSPTLCK,
];

/// Telling which pages of this process were written (`linux/fs.h`).
#[expect(
    clippy::cast_possible_truncation,
    reason = "a request has 14 bits for the size of its argument"
)]
const PAGEMAP_SCAN: u64 = ioctl_expr(_IOC_READ | _IOC_WRITE, b'f' as u32, 16, size_of::<pm_scan_arg>() as u32);

/// A request of KVM: its direction, number, and bytes of argument.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a request has 14 bits for the size of its argument"
)]
const fn kvm(direction: u32, number: u32, size: usize) -> u64 {
    ioctl_expr(direction, KVMIO, number, size as u32)
}
