//! A process without a past: nothing open that it inherited, and no environment but what it is meant to have.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::Error;

/// This program, whatever has become of its file.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// The first descriptor after the standard ones.
const FIRST: libc::c_uint = 3;

/// Closes what this process inherited but for its standard input, output and error, and rids it of its environment but for
/// the variables in `keep`. To be called first of all: where there is something to be rid of, the process begins anew, as
/// what has been in its memory once can be found there.
///
/// # Errors
/// The operating system refused.
pub fn begin_anew(keep: &[OsString]) -> Result<(), Error> {
    close_descriptors()?;
    let (kept, rest): (Vec<_>, Vec<_>) = env::vars_os().partition(|(name, _)| keep.contains(name));
    if rest.is_empty() {
        return Ok(());
    }
    let mut arguments = env::args_os();
    let mut again = Command::new(THIS_PROGRAM);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    let error = again.args(arguments).env_clear().envs(kept).exec();
    Err(Error::file("execute", THIS_PROGRAM)(error))
}

/// Closes all descriptors but the standard ones. Whoever owns one must not use it any more, nor drop it.
pub(crate) fn close_descriptors() -> Result<(), Error> {
    // SAFETY: nothing in memory depends on descriptors; that nobody uses those that are closed is for the callers, who do
    // this before they open any, and when they are done with all they opened.
    match unsafe { libc::close_range(FIRST, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(Error::step("close what is open", "Linux 5.9")(
            io::Error::last_os_error(),
        )),
    }
}
