//! The lists: which system calls each kind of thread makes, and why.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::ThreadKind;

/// What allocating memory, locking, logging, signals, panicking and ending take, in any thread of a Rust program.
const RUNTIME: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What serving queues takes: waiting, disk images, taps, consoles.
const DEVICES: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_io_uring_enter,
    libc::SYS_poll,
    libc::SYS_preadv,
    libc::SYS_pread64,
    libc::SYS_pwritev,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// `ioctl` requests by kind of thread; no thread may make any other.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
/// Restoring the terminal on the way out.
const TCSETS: u64 = 0x5402;
const TCSETSW: u64 = 0x5403;
const TCSETSF: u64 = 0x5404;

/// The calls a kind of thread may make: an empty list of rules allows all arguments.
pub fn rules(kind: ThreadKind) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let (calls, ioctls): (&[&[c_long]], &[u64]) = match kind {
        // Waits for events, ends the others, takes devices off the event loop, cleans up files.
        ThreadKind::StateDriver => (
            &[RUNTIME, DEVICES, &[libc::SYS_unlink, libc::SYS_unlinkat]],
            &[TCSETS, TCSETSW, TCSETSF, TUNSETOFFLOAD],
        ),
        // Runs the guest; its accesses reach devices: the console's output, starting and stopping queues.
        ThreadKind::Vcpu => (&[RUNTIME, DEVICES], &[KVM_RUN, KVM_GET_REGS, TUNSETOFFLOAD]),
        ThreadKind::Devices => (
            &[RUNTIME, DEVICES],
            &[TUNSETOFFLOAD, BLKDISCARD, BLKZEROOUT, TCSETS, TCSETSW, TCSETSF],
        ),
    };
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = calls
        .iter()
        .copied()
        .flatten()
        .map(|&call| (call, Vec::new()))
        .collect();
    let ioctls = ioctls
        .iter()
        .map(|&request| ioctl(request))
        .collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_ioctl, ioctls);
    Ok(rules)
}

fn ioctl(request: u64) -> Result<SeccompRule, BackendError> {
    const REQUEST_ARGUMENT: u8 = 1;
    let is_request = SeccompCondition::new(REQUEST_ARGUMENT, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request)?;
    SeccompRule::new(vec![is_request])
}
