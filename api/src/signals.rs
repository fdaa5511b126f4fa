//! SIGTERM and SIGINT: the first presses the guest's power button, the second ends the VM.
//!
//! The signals are blocked in every thread and fetched by one of our own, so that no handler ever runs in the middle
//! of a vCPU's or a device's work, or under its system call filter.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::thread;

use cutover_devices::THREAD_STACK_SIZE;
use cutover_vmm::Controller;
use cutover_vmm::seccomp::{self, ThreadKind};

const SIGNALS: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

/// Whether a signal is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// It is.
    First,
    /// It is not: whoever sent it means it.
    Again,
}

/// Does to `vm` what a signal means.
pub fn tell(vm: &Controller, time: Time) {
    match time {
        Time::First => {
            tracing::warn!("told to end: pressing the guest's power button (once more ends the VM now)");
            if let Err(refusal) = vm.press_power_button() {
                tracing::warn!(%refusal, "the power button has no effect");
            }
        }
        Time::Again => {
            tracing::warn!("told to end again: ending the VM");
            // A VM that has ended meanwhile is as wanted.
            let _ = vm.destroy();
        }
    }
}

/// Signals that wait to be fetched instead of ending the process.
pub struct Blocked {
    set: libc::sigset_t,
}

impl Blocked {
    /// Blocks the signals in this thread and those it starts from now on; call it before there are others.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set; the calls after it are given an initialised set.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in SIGNALS {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            set.assume_init()
        };
        // SAFETY: `set` is initialised, and the previous mask is not asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } {
            0 => Ok(Self { set }),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Serves the signals from a thread of their own, which lasts as long as the process: `told` is called for each.
    /// The thread is confined to the system calls it needs, or not.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn serve(self, mut told: impl FnMut(Time) + Send + 'static, confine: bool) -> io::Result<()> {
        thread::Builder::new()
            .name("signals".to_owned())
            .stack_size(THREAD_STACK_SIZE)
            .spawn(move || {
                if confine {
                    seccomp::confine_or_abort(ThreadKind::Signals);
                }
                self.wait();
                told(Time::First);
                loop {
                    self.wait();
                    told(Time::Again);
                }
            })?;
        Ok(())
    }

    fn wait(&self) {
        let mut signal = 0;
        // SAFETY: the set is initialised, and `signal` is a valid place for the result. The call fails only for a set
        // with an invalid signal, which this is not.
        unsafe { libc::sigwait(&raw const self.set, &raw mut signal) };
    }
}
