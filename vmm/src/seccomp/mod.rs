//! Confinement: each kind of thread may make only the system calls it needs.
//!
//! A call outside of a thread's list raises `SIGSYS`; the handler names the call and ends the process, because code that
//! was diverted must not go on. [`filters`] holds the lists of calls, [`ioctls`] those of requests; [`program`] makes what
//! the kernel runs of them.

mod filters;
mod ioctls;
mod program;

use std::ffi::c_int;
use std::io::Write;
use std::sync::OnceLock;

use seccompiler::BpfProgram;
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use crate::Error;

/// What a thread is for, which decides what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The state driver of a VM that is built once and then only runs.
    StateDriver,
    /// The state driver of a [managed](crate::Options::managed) VM, which may open files and build the VM anew.
    Supervisor,
    /// A vCPU.
    Vcpu,
    /// The device event loop.
    Devices,
    /// The same of a VM with a socket device, whose guest asks for connections to Unix sockets.
    DevicesWithVsock,
    /// A worker of a disk without io_uring.
    Disk,
    /// The thread that waits for signals.
    Signals,
    /// The API server.
    Api,
    /// Takes care of page faults, or reads ahead what they would ask for.
    PageFault,
    /// Makes a snapshot, or copies disks from or to one.
    Snapshot,
    /// Moves the VM to another monitor, or has it from there.
    Migration,
    /// Sends cuts of a protected VM to its standby.
    Checkpoint,
}

impl ThreadKind {
    #[cfg(test)]
    const ALL: [Self; 12] = [
        Self::StateDriver,
        Self::Supervisor,
        Self::Vcpu,
        Self::Devices,
        Self::DevicesWithVsock,
        Self::Disk,
        Self::Signals,
        Self::Api,
        Self::PageFault,
        Self::Snapshot,
        Self::Migration,
        Self::Checkpoint,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::StateDriver | Self::Supervisor => "state driver",
            Self::Vcpu => "vCPU",
            Self::Devices | Self::DevicesWithVsock => "device",
            Self::Disk => "disk",
            Self::Signals => "signal",
            Self::Api => "API",
            Self::PageFault => "page-fault",
            Self::Snapshot => "snapshot",
            Self::Migration => "migration",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// Makes the filter program of a kind of thread.
fn compile(kind: ThreadKind) -> BpfProgram {
    program::assemble(&filters::rules(kind))
}

/// Confines the calling thread, and every thread it starts, for good.
///
/// # Errors
/// The kernel refused.
pub fn confine(kind: ThreadKind) -> Result<(), Error> {
    Filter::of(kind).confine()
}

/// The filter of threads of one kind, which is made when the first of them needs it: making it takes longer than putting it
/// in place.
pub struct Filter {
    kind: ThreadKind,
    program: OnceLock<BpfProgram>,
}

impl Filter {
    /// That of `kind`.
    pub fn of(kind: ThreadKind) -> Self {
        Self {
            kind,
            program: OnceLock::new(),
        }
    }

    /// Confines the calling thread, and every thread it starts, for good.
    ///
    /// # Errors
    /// The kernel refused.
    fn confine(&self) -> Result<(), Error> {
        install_violation_handler()?;
        let program = self.program.get_or_init(|| compile(self.kind));
        seccompiler::apply_filter(program).map_err(|error| Error::Seccomp {
            thread: self.kind.name(),
            reason: error.to_string(),
        })
    }

    /// The same where no error can be returned: a thread that cannot be confined must not run at all.
    pub fn confine_or_abort(&self) {
        if let Err(error) = self.confine() {
            tracing::error!(%error, "cannot go on unconfined");
            std::process::abort();
        }
    }
}

/// As [`confine`], where no error can be returned.
pub fn confine_or_abort(kind: ThreadKind) {
    Filter::of(kind).confine_or_abort();
}

/// Has the C library keep to what every filter allows; to be called before there is a second thread.
///
/// glibc gives threads heaps of their own, and looks into `/proc/sys/vm/overcommit_memory` before it shrinks one: whatever
/// thread frees the most first would open a file. With one heap for all it does not, and takes less memory.
pub fn prepare_process() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number that is looked at when a thread allocates for the first time.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Has a forbidden call reported by its name, and the process ended. Once is enough, and more often does no harm.
fn install_violation_handler() -> Result<(), Error> {
    register_signal_handler(libc::SIGSYS, report_violation).map_err(Error::os("install the SIGSYS handler"))
}

/// Only what is async-signal-safe from here on: no allocation, no lock, and calls that every filter allows.
extern "C" fn report_violation(_: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    /// Where `si_syscall` lies in `siginfo_t`, in 32-bit words (asm-generic/siginfo.h).
    const SI_SYSCALL: usize = 6;
    const TEXT_MAX: usize = 160;
    // SAFETY: the kernel passes a siginfo_t that, for SIGSYS, has the number of the system call there.
    let number = unsafe { info.cast::<i32>().add(SI_SYSCALL).read() };
    let name = usize::try_from(number)
        .ok()
        .and_then(Sysno::new)
        .map_or("unknown", |call| call.name());
    // SAFETY: the kernel passes the registers at the call; the second argument tells an ioctl's request.
    let argument = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RSI as usize] };
    let mut text = [0; TEXT_MAX];
    let mut rest = &mut text[..];
    // What does not fit is left out.
    let _ = writeln!(
        rest,
        "cutover: error: seccomp stopped the forbidden system call {name} (second argument {argument:#x}); \
         --no-seccomp turns the filter off"
    );
    let length = TEXT_MAX - rest.len();
    // SAFETY: a write of an initialized buffer.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), length) };
    // SAFETY: ends the process without running anything else of it.
    unsafe { libc::_exit(1) }
}

/// Unit tests confine threads too, and have no `main` of ours that would call this.
#[cfg(all(test, target_env = "gnu"))]
#[used]
// SAFETY: the loader calls the functions in this section once, before `main` and any second thread (System V ABI,
// "Initialization and Termination Functions"); the C library is set up by then.
#[unsafe(link_section = ".init_array")]
static PREPARE_TESTS: extern "C" fn() = {
    extern "C" fn prepare() {
        prepare_process();
    }
    prepare
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_thread_has_a_filter() {
        for kind in ThreadKind::ALL {
            // No more than the kernel takes (`BPF_MAXINSNS`).
            assert!((1..=4096).contains(&compile(kind).len()), "{kind:?}");
        }
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_is_named() {
        if std::env::var_os("CUTOVER_TEST_VIOLATION").is_some() {
            confine(ThreadKind::Vcpu).expect("filter");
            // SAFETY: does nothing but fail.
            unsafe { libc::ptrace(libc::PTRACE_ATTACH, 0, 0, 0) };
            unreachable!("the filter lets a vCPU thread call ptrace");
        }
        let this_test = std::env::current_exe().expect("a test has a path");
        let output = std::process::Command::new(this_test)
            .args([
                "--exact",
                "--nocapture",
                "seccomp::tests::a_forbidden_call_ends_the_process_and_is_named",
            ])
            .env("CUTOVER_TEST_VIOLATION", "1")
            .output()
            .expect("the test runs itself");
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("forbidden system call ptrace"), "{text}");
    }
}
