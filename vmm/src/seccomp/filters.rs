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

/// What a request on a disk image takes.
const DISK: &[c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
];

/// What the console's output takes, which a vCPU writes through: on sockets and terminals, it must not wait.
const CONSOLE_OUTPUT: &[c_long] = &[libc::SYS_poll, libc::SYS_ppoll, libc::SYS_sendto];

/// What serving queues and the console takes besides: waiting, io_uring, taps, the console's clients.
const EVENT_LOOP: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fcntl,
    libc::SYS_io_uring_enter,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
];

/// What cleaning up takes: a console's socket is removed.
const CLEAN_UP: &[c_long] = &[libc::SYS_unlink, libc::SYS_unlinkat];

/// `ioctl` requests; no thread may make any but those of its kind.
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
/// The terminal is put back as it was from wherever the monitor ends, in a panic too.
const TERMINAL: [u64; 4] = [libc::TCGETS, libc::TCGETS2, libc::TCSETS, libc::TCSETS2];

/// The calls a kind of thread may make: an empty list of rules allows all arguments.
pub fn rules(kind: ThreadKind) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let (calls, ioctls): (&[&[c_long]], &[u64]) = match kind {
        ThreadKind::StateDriver => (&[DISK, CONSOLE_OUTPUT, EVENT_LOOP, CLEAN_UP], &[]),
        ThreadKind::Vcpu => (&[CONSOLE_OUTPUT], &[KVM_RUN, KVM_GET_REGS]),
        ThreadKind::Devices => (&[DISK, CONSOLE_OUTPUT, EVENT_LOOP], &[TUNSETOFFLOAD]),
        ThreadKind::Disk => (&[DISK], &[]),
        ThreadKind::Signals => (&[&[libc::SYS_rt_sigtimedwait]], &[]),
    };
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = [RUNTIME]
        .iter()
        .chain(calls)
        .copied()
        .flatten()
        .map(|&call| (call, Vec::new()))
        .collect();
    let ioctls = ioctls.iter().chain(&TERMINAL);
    let ioctls = ioctls.map(|&request| ioctl(request)).collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_ioctl, ioctls);
    Ok(rules)
}

fn ioctl(request: u64) -> Result<SeccompRule, BackendError> {
    const REQUEST_ARGUMENT: u8 = 1;
    let is_request = SeccompCondition::new(REQUEST_ARGUMENT, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request)?;
    SeccompRule::new(vec![is_request])
}
