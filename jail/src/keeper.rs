//! The process that waits for a monitor: it passes signals on, and leaves when the monitor has, with what it made.
//!
//! It is the one process of a jail that is still root and on the host, since only such a one can remove the jail. The
//! monitor cannot reach it: it is of another user, and in another PID namespace, in which it does not exist.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, getpid, pidfd_open, pidfd_send_signal, waitpid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::begin::close_descriptors;
use crate::told::{self, Teller};
use crate::{Error, background};

/// Exit codes of a process that could not be confined, and of one that panicked.
const NOT_CONFINED: u8 = 1;
const PANICKED: u8 = 101;

/// Signals that are for the monitor.
const PASSED_ON: [Signal; 2] = [Signal::TERM, Signal::INT];

/// How a monitor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Exited(u8),
    /// By this signal.
    Killed(i32),
}

/// Runs `program` in a process of its own, in a PID namespace of its own, once `confine` has confined that; returns when it
/// has ended. `started` is told when it is confined, where it goes on in the background.
pub(crate) fn keep(
    started: Option<Teller>,
    confine: impl FnOnce(&OwnedFd) -> Result<(), Error>,
    program: impl FnOnce() -> u8,
) -> Result<Ended, Error> {
    let signals = Held::hold()?;
    let keeper = pidfd_open(getpid(), PidfdFlags::empty()).map_err(Error::step("watch a process", "Linux 5.3"))?;
    // SAFETY: descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.map_err(Error::step("make a PID namespace", "CAP_SYS_ADMIN"))?;
    let (hearer, teller) = told::pair()?;
    let Some(pid) = fork()? else {
        exit_with(|| {
            let confined = begin(&signals, started.is_some()).and_then(|()| confine(&keeper));
            let is_confined = confined.is_ok();
            teller.tell(&confined);
            // Nothing that is open so far is of any use to the program.
            if is_confined && close_descriptors().is_ok() {
                program()
            } else {
                NOT_CONFINED
            }
        });
    };
    drop(teller);
    let monitor = pidfd_open(pid, PidfdFlags::empty()).map_err(Error::step("watch a process", "Linux 5.3"))?;
    let mut confined = hearer.hear();
    if let Some(started) = started {
        confined = confined.and_then(|()| background::let_go_of_standard_streams());
        started.tell(&confined);
    }
    let ended = signals.pass_on_until_end(pid, &monitor)?;
    confined.map(|()| ended)
}

/// What a monitor's process does first.
fn begin(signals: &Held, is_in_background: bool) -> Result<(), Error> {
    signals.release()?;
    if is_in_background {
        background::let_go_of_standard_streams()?;
    }
    Ok(())
}

/// Whether the process that `keeper` stands for has ended.
pub(crate) fn has_ended(keeper: &OwnedFd) -> Result<bool, Error> {
    let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(keeper, PollFlags::IN)], Some(&at_once))
        .map(|ready| ready > 0)
        .map_err(Error::step("look after a process", "nothing"))
}

/// A process like this one; none in the new one.
pub(crate) fn fork() -> Result<Option<Pid>, Error> {
    // SAFETY: there are no other threads, whose locks would never be released in the new process; in tests, where there are
    // some, only what the C library makes usable after a fork is used.
    match unsafe { libc::fork() } {
        -1 => Err(Error::step("start a process", "processes that the user may still have")(io::Error::last_os_error())),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Ends this process with what `work` returns, whatever happens in there: what called it is another process's.
pub(crate) fn exit_with(work: impl FnOnce() -> u8) -> ! {
    let code = catch_unwind(AssertUnwindSafe(work)).unwrap_or(PANICKED);
    process::exit(code.into())
}

/// [`PASSED_ON`], held back from this process, to be fetched.
struct Held {
    /// A signalfd(2).
    fetch: OwnedFd,
    /// What was held back before.
    before: libc::sigset_t,
}

impl Held {
    fn hold() -> Result<Self, Error> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set, which the calls after it are given.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in PASSED_ON {
                libc::sigaddset(set.as_mut_ptr(), signal.as_raw());
            }
            set.assume_init()
        };
        let mut before = MaybeUninit::uninit();
        // SAFETY: the set is initialised, and `before` is a place for one.
        let fetch = unsafe {
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, before.as_mut_ptr());
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC)
        };
        if fetch < 0 {
            return Err(Error::step("wait for signals", "descriptors that are free")(
                io::Error::last_os_error(),
            ));
        }
        Ok(Self {
            // SAFETY: the call returned a new descriptor that nobody else owns.
            fetch: unsafe { OwnedFd::from_raw_fd(fetch) },
            // SAFETY: sigprocmask fails only for a first argument that does not exist; it has written the set.
            before: unsafe { before.assume_init() },
        })
    }

    /// In the monitor's process they do what they did before.
    fn release(&self) -> Result<(), Error> {
        // SAFETY: the set is initialised, and the previous one is not asked for.
        match unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(Error::step("let signals through", "nothing")(io::Error::last_os_error())),
        }
    }

    /// Sends those that come to the process `pid`, for which `monitor` stands, until it ends.
    fn pass_on_until_end(&self, pid: Pid, monitor: &OwnedFd) -> Result<Ended, Error> {
        let failed = || Error::step("wait for the monitor", "nothing");
        loop {
            let mut ready = [
                PollFd::new(monitor, PollFlags::IN),
                PollFd::new(&self.fetch, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Err(Errno::INTR) => continue,
                result => result.map_err(failed())?,
            };
            let [has_ended, is_signalled] = ready.map(|one| !one.revents().is_empty());
            if is_signalled && let Some(signal) = self.next().map_err(failed())? {
                // A monitor that is gone is as wanted.
                let _ = pidfd_send_signal(monitor, signal);
            }
            if has_ended && let Some((_, status)) = waitpid(Some(pid), WaitOptions::empty()).map_err(failed())? {
                let code = status.exit_status().and_then(|code| u8::try_from(code).ok());
                let signal = || status.terminating_signal().unwrap_or_default();
                return Ok(code.map_or_else(|| Ended::Killed(signal()), Ended::Exited));
            }
        }
    }

    /// The next signal, if it is one to pass on: one of the terminal has reached the monitor as it is.
    fn next(&self) -> rustix::io::Result<Option<Signal>> {
        /// Bytes of a `struct signalfd_siginfo`, and where it has the number and the origin (signalfd(2)).
        const INFO: usize = size_of::<libc::signalfd_siginfo>();
        const CODE: usize = 8;
        let mut info = [0; INFO];
        rustix::io::read(&self.fetch, &mut info)?;
        let word = |at: usize| i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        let is_of_the_kernel = word(CODE) == libc::SI_KERNEL;
        Ok(PASSED_ON
            .into_iter()
            .find(|signal| !is_of_the_kernel && signal.as_raw() == word(0)))
    }
}
