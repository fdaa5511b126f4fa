//! Work that goes on when the command that began it has ended.

use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::setsid;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::Error;
use crate::keeper::{exit_with, fork};
use crate::told::{self, Teller};

/// Does `work` in a process of its own, in a session of its own, and returns when it has told of success.
///
/// # Errors
/// It told of something else, or ended without a word.
pub fn in_background(work: impl FnOnce(Teller) -> u8) -> Result<(), Error> {
    let (hearer, teller) = told::pair()?;
    if fork()?.is_none() {
        drop(hearer);
        exit_with(|| {
            // A process that has just begun leads no group, so that nothing speaks against this.
            let _ = setsid();
            work(teller)
        });
    }
    drop(teller);
    hearer.hear()
}

/// Has this process neither read nor write what it was started with.
pub(crate) fn let_go_of_standard_streams() -> Result<(), Error> {
    const NULL: &str = "/dev/null";
    let null =
        open(Path::new(NULL), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(Error::file("open", NULL))?;
    dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .and_then(|()| dup2_stderr(&null))
        .map_err(Error::step("let go of the standard streams", "nothing"))
}
