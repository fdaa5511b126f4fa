//! The `cutover` program as a child process: started, signalled, waited for, looked into.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, set_parent_process_death_signal, waitpid,
};
use tempfile::TempDir;

use crate::environment::{PATIENCE, monitor_binary, scratch};

/// How `cutover` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Exit code 0: the guest shut itself down, or the command did what it was asked.
    Shutdown,
    /// Exit code 1: the monitor could not go on.
    Error,
    /// Exit code 2: the command line makes no sense.
    Usage,
    /// Exit code 3: the guest asked for a reboot.
    Reboot,
    /// Exit code 4: the guest panicked.
    Panic,
    /// Exit code 5: the VM was ended by force.
    Forced,
    /// Any other exit code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(0), _) => Self::Shutdown,
            (Some(1), _) => Self::Error,
            (Some(2), _) => Self::Usage,
            (Some(3), _) => Self::Reboot,
            (Some(4), _) => Self::Panic,
            (Some(5), _) => Self::Forced,
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or_default()),
        }
    }
}

/// A running `cutover`, killed when dropped.
pub struct Monitor {
    child: Mutex<Child>,
    pid: Pid,
    directory: TempDir,
}

impl Monitor {
    /// The command that runs `cutover`, to be completed with arguments.
    pub fn command() -> Command {
        Command::new(monitor_binary())
    }

    /// Starts `command`, with pipes for standard input and output and a file for what it reports.
    #[track_caller]
    pub fn start(command: Command) -> Self {
        Self::start_with(command, Stdio::piped(), Stdio::piped())
    }

    /// Starts `command` on a terminal.
    #[track_caller]
    pub fn start_on(command: Command, terminal: &File) -> Self {
        let end = || Stdio::from(terminal.try_clone().expect("a descriptor can be duplicated"));
        Self::start_with(command, end(), end())
    }

    #[track_caller]
    fn start_with(mut command: Command, input: Stdio, output: Stdio) -> Self {
        let directory = scratch();
        let log = File::create(directory.path().join(LOG)).expect("a new directory takes a file");
        command.stdin(input).stdout(output).stderr(log);
        die_with_parent(&mut command);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", command.get_program().display()));
        Self {
            pid: Pid::from_child(&child),
            child: Mutex::new(child),
            directory,
        }
    }

    /// Both ends of the pipes; none once they have been taken.
    pub(crate) fn take_pipes(&self) -> Option<(std::process::ChildStdout, std::process::ChildStdin)> {
        let mut child = self.child();
        Some((child.stdout.take()?, child.stdin.take()?))
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// A file of the process's `/proc` directory.
    pub fn proc(&self, file: impl AsRef<OsStr>) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.pid())).join(file.as_ref())
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap_or_else(|error| panic!("cannot signal the monitor: {error}"));
    }

    /// Waits until a stop signal has stopped every thread.
    #[track_caller]
    pub(crate) fn wait_stopped(&self) {
        waitpid(Some(self.pid), WaitOptions::UNTRACED)
            .unwrap_or_else(|error| panic!("cannot wait for the monitor: {error}"));
    }

    /// What the monitor reported on its standard error.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join(LOG)).unwrap_or_default()).into_owned()
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub fn wait(&self) -> Exit {
        match self.wait_within(PATIENCE) {
            Ok(Some(exit)) => exit,
            Ok(None) => panic!("the monitor did not end within {PATIENCE:?}"),
            Err(error) => panic!("cannot wait for the monitor: {error}"),
        }
    }

    /// Whether the process has not ended yet.
    #[track_caller]
    pub fn is_running(&self) -> bool {
        self.wait_within(Duration::ZERO)
            .expect("a child can be waited for")
            .is_none()
    }

    fn wait_within(&self, time: Duration) -> io::Result<Option<Exit>> {
        let mut child = self.child();
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.into()));
        }
        let process = pidfd_open(self.pid, PidfdFlags::empty())?;
        let time = Timespec::try_from(time).map_err(io::Error::other)?;
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&time))?;
        Ok(child.try_wait()?.map(Exit::from))
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let mut child = self.child();
        // Neither fails but for a process that is gone already.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Name of the file that takes standard error.
const LOG: &str = "log";

/// Has the kernel kill the process when the test's thread ends without having done so, however it ends.
fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec, the closure makes one system call and neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}
