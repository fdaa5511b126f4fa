//! The lists: which system calls each kind of thread makes, and why.

use std::collections::BTreeMap;

use libc::c_long;

use super::program::Allowed;
use super::{ThreadKind, ioctls};
use crate::page_fault::uffd;

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
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
];

/// What the console's output takes, which a vCPU writes through: on sockets and terminals, it must not wait.
const CONSOLE_OUTPUT: &[c_long] = &[libc::SYS_poll, libc::SYS_ppoll, libc::SYS_sendto];

/// What serving queues and the console takes besides: waiting, io_uring, taps, rate limiters' timers,
/// the console's clients.
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
    libc::SYS_timerfd_settime,
];

/// What connections that the guest asks for take besides a socket: its family is checked below.
const VSOCK: &[c_long] = &[libc::SYS_connect];

/// What cleaning up takes: a console's socket is removed.
const CLEAN_UP: &[c_long] = &[libc::SYS_unlink, libc::SYS_unlinkat];

/// What building a VM takes, and opening the files of its devices: memory, threads that confine themselves, eventfds,
/// epoll, io_uring, taps with their addresses, consoles of every kind, boot files. Some have two names, of which each C
/// library uses one.
const BUILD: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_fchmodat,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getpgrp,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_socket,
    libc::SYS_statx,
    libc::SYS_timerfd_create,
];

/// What serving page faults takes: waiting for them, reading pages from a snapshot, standing back for everyone else,
/// watching another process behind a socket, and telling which pages are there.
const PAGE_FAULT: &[c_long] = &[
    libc::SYS_fcntl,
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_recvfrom,
    libc::SYS_setpriority,
    libc::SYS_userfaultfd,
];

/// What writing snapshots takes, and files of restored disks.
const SNAPSHOT: &[c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fchmod,
    libc::SYS_getdents64,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_pwrite64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_stat,
    libc::SYS_link,
    libc::SYS_linkat,
];

/// What moving a VM takes: connections, looking up where they lead, and threads that send pages.
const MIGRATION: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_clock_nanosleep,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_seccomp,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_uname,
];

/// What telling how much guest memory is resident takes.
const STATS: &[c_long] = &[libc::SYS_mincore];

/// What the API server takes: an async runtime, connections, its socket's file, the files of metrics and logs.
const API: &[c_long] = &[
    libc::SYS_bind,
    libc::SYS_chmod,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_prctl,
    libc::SYS_recvmsg,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_statx,
];

/// The calls a kind of thread may make, by their numbers.
pub fn rules(kind: ThreadKind) -> BTreeMap<u32, Allowed> {
    let (calls, requests): (&[&[c_long]], &[&[u64]]) = match kind {
        ThreadKind::StateDriver => (&[DISK, CONSOLE_OUTPUT, EVENT_LOOP, CLEAN_UP, STATS], &[ioctls::VM]),
        // Threads inherit the filter of the one that starts them, so it allows what all of them may do.
        ThreadKind::Supervisor => (
            &[
                DISK,
                CONSOLE_OUTPUT,
                EVENT_LOOP,
                CLEAN_UP,
                STATS,
                BUILD,
                PAGE_FAULT,
                SNAPSHOT,
                MIGRATION,
            ],
            &[
                ioctls::VCPU,
                ioctls::DEVICES,
                ioctls::BUILD,
                ioctls::VM,
                ioctls::FILES,
                uffd::REQUESTS,
                ioctls::SOCKETS,
            ],
        ),
        ThreadKind::Vcpu => (&[CONSOLE_OUTPUT], &[ioctls::VCPU]),
        ThreadKind::Devices => (&[DISK, CONSOLE_OUTPUT, EVENT_LOOP], &[ioctls::DEVICES]),
        ThreadKind::DevicesWithVsock => (&[DISK, CONSOLE_OUTPUT, EVENT_LOOP, VSOCK], &[ioctls::DEVICES]),
        ThreadKind::Disk => (&[DISK], &[]),
        ThreadKind::Signals => (&[&[libc::SYS_rt_sigtimedwait]], &[]),
        ThreadKind::PageFault => (&[PAGE_FAULT], &[uffd::REQUESTS]),
        // It starts threads that serve page faults and that copy disks.
        ThreadKind::Snapshot => (
            &[DISK, CLEAN_UP, BUILD, PAGE_FAULT, SNAPSHOT],
            &[ioctls::VM, ioctls::FILES, uffd::REQUESTS],
        ),
        // Those of a destination put pages that arrive while the guest runs.
        ThreadKind::Migration => (&[MIGRATION], &[ioctls::VM, ioctls::SOCKETS, uffd::REQUESTS]),
        ThreadKind::Checkpoint => (&[MIGRATION], &[ioctls::VM, ioctls::SOCKETS]),
        ThreadKind::Api => (&[DISK, CONSOLE_OUTPUT, EVENT_LOOP, CLEAN_UP, API], &[]),
    };
    let mut rules: BTreeMap<_, _> = [RUNTIME]
        .iter()
        .chain(calls)
        .copied()
        .flatten()
        .map(|&call| (number(call), Allowed::Always))
        .collect();
    // The terminal is put back as it was from wherever the monitor ends, in a panic too.
    let requests = requests.iter().chain([&ioctls::TERMINAL]).copied().flatten();
    let requests = requests.map(|&request| low_half(request)).collect();
    rules.insert(number(libc::SYS_ioctl), Allowed::WithSecond(requests));
    if kind == ThreadKind::DevicesWithVsock {
        let family = libc::AF_UNIX.cast_unsigned();
        rules.insert(number(libc::SYS_socket), Allowed::WithFirst(vec![family]));
    }
    if kind == ThreadKind::PageFault {
        // Huge pages are wanted again when all of memory is there.
        let operation = libc::PR_SET_THP_DISABLE.cast_unsigned();
        rules.insert(number(libc::SYS_prctl), Allowed::WithFirst(vec![operation]));
    }
    // Debug builds of Rust programs look whether a descriptor is open before they close it.
    rules
        .entry(number(libc::SYS_fcntl))
        .or_insert(Allowed::WithSecond(vec![libc::F_GETFD.cast_unsigned()]));
    rules
}

fn number(call: c_long) -> u32 {
    u32::try_from(call).expect("system calls have small numbers")
}

/// Requests have 32 bits (`_IOC`, asm-generic/ioctl.h), whatever type a header gives them.
fn low_half(request: u64) -> u32 {
    u32::try_from(request & u64::from(u32::MAX)).expect("masked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supervisor_may_do_what_the_threads_it_starts_may() {
        let supervisor = rules(ThreadKind::Supervisor);
        for kind in [
            ThreadKind::Vcpu,
            ThreadKind::Devices,
            ThreadKind::DevicesWithVsock,
            ThreadKind::Disk,
            ThreadKind::StateDriver,
            ThreadKind::PageFault,
            ThreadKind::Snapshot,
            ThreadKind::Migration,
            ThreadKind::Checkpoint,
        ] {
            for (call, allowed) in rules(kind) {
                match (supervisor.get(&call), allowed) {
                    (Some(Allowed::Always), _) => {}
                    (Some(Allowed::WithSecond(values)), Allowed::WithSecond(asked)) => {
                        let missing = asked.iter().find(|value| !values.contains(value));
                        assert_eq!(missing, None, "{kind:?}, system call {call}");
                    }
                    (has, asked) => panic!("{kind:?} may call {call} as {asked:?}, a supervisor as {has:?}"),
                }
            }
        }
    }
}
