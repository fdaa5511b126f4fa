//! How the command ends: exit codes, which scripts rely on, and error messages, which people do.

use std::error::Error;
use std::io::{self, Write};
use std::process::{ExitCode, Termination};

use cutover_vmm::Exit;
use serde::Serialize;

/// Exit codes of `cutover`. Those from 3 to 5 are of commands that run a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Done; for `run`: the guest shut itself down, or goes on elsewhere; for `check`: this machine can run guests; for `vm`: every VM did as
    /// asked.
    Success = 0,
    /// The monitor failed; for `check`: this machine cannot run guests; for `vm`: no VM did as asked.
    Failure = 1,
    /// The command line or the configuration file is wrong.
    Usage = 2,
    /// The guest asked for a reboot.
    Reboot = 3,
    /// The guest panicked.
    Panic = 4,
    /// The VM was ended by force: console escape, or a second signal.
    Ended = 5,
    /// For `vm`: some VMs did as asked, and some did not.
    Partly = 6,
    /// For `migrate`: the VM was handed over, and does not run here any more, but is not known to run there.
    HandedOver = 7,
}

impl ExitStatus {
    const ALL: [Self; 8] = [
        Self::Success,
        Self::Failure,
        Self::Usage,
        Self::Reboot,
        Self::Panic,
        Self::Ended,
        Self::Partly,
        Self::HandedOver,
    ];

    /// That of another process of this program, by its exit code.
    pub fn of_code(code: u8) -> Self {
        let known = Self::ALL.into_iter().find(|status| *status as u8 == code);
        known.unwrap_or(Self::Failure)
    }
}

impl From<Exit> for ExitStatus {
    fn from(exit: Exit) -> Self {
        match exit {
            // Whoever restarts what has failed must not restart what runs elsewhere.
            Exit::Shutdown | Exit::Migrated => Self::Success,
            Exit::Reboot => Self::Reboot,
            Exit::Panic => Self::Panic,
            Exit::Ended => Self::Ended,
        }
    }
}

impl Termination for ExitStatus {
    fn report(self) -> ExitCode {
        ExitCode::from(self as u8)
    }
}

/// What `--json` prints of a value whose keys are all strings, as those of every answer and report are: a line for each of them.
pub fn as_json(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).expect("string keys only, which always can be written");
    format!("{value:#}\n")
}

/// Writes `text` to `output`. A reader that has seen enough (`cutover … | head`) is no failure.
pub fn after_printing(text: &[u8], output: &mut impl Write) -> ExitStatus {
    match output.write_all(text).and_then(|()| output.flush()) {
        Ok(()) => ExitStatus::Success,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitStatus::Success,
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

/// Tells the user, on the standard error, what went wrong and why.
pub fn report(error: &dyn Error) {
    // There is nobody left to tell if the standard error is closed.
    let _ = writeln!(io::stderr(), "cutover: error: {}", with_causes(error));
}

/// The message of `error` followed by those of its causes, as far as they add something.
pub fn with_causes(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Many messages have their cause within the sentence.
        if !message.contains(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        cause = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open vm.json")]
    struct Plain(#[source] io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open vm.json: {0}; does it exist?")]
    struct Telling(#[source] io::Error);

    #[test]
    fn causes_are_told_once() {
        let cause = || io::Error::other("no such file");
        assert_eq!(with_causes(&Plain(cause())), "cannot open vm.json: no such file");
        assert_eq!(
            with_causes(&Telling(cause())),
            "cannot open vm.json: no such file; does it exist?"
        );
    }

    #[test]
    fn every_end_of_a_vm_has_the_documented_code() {
        for (exit, code) in [
            (Exit::Shutdown, 0),
            (Exit::Reboot, 3),
            (Exit::Panic, 4),
            (Exit::Ended, 5),
            (Exit::Migrated, 0),
        ] {
            assert_eq!(ExitStatus::from(exit) as u8, code, "{exit:?}");
        }
        for status in ExitStatus::ALL {
            assert_eq!(ExitStatus::of_code(status as u8), status);
        }
        assert_eq!(ExitStatus::of_code(101), ExitStatus::Failure);
        assert_eq!(ExitStatus::Failure as u8, 1);
        assert_eq!(ExitStatus::Usage as u8, 2);
        assert_eq!(ExitStatus::Partly as u8, 6);
        assert_eq!(ExitStatus::HandedOver as u8, 7);
    }

    #[test]
    fn a_reader_that_leaves_early_is_no_failure() {
        struct Gone(io::ErrorKind);
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert_eq!(
            after_printing(b"text", &mut Gone(io::ErrorKind::BrokenPipe)),
            ExitStatus::Success
        );
        assert_eq!(
            after_printing(b"text", &mut Gone(io::ErrorKind::StorageFull)),
            ExitStatus::Failure
        );
    }
}
