//! `cutover` run to its end, for commands that do not start a guest, or are not meant to.

use std::ffi::OsStr;
use std::io::Read;
use std::process::Command;

use crate::{Exit, Monitor};

/// What a finished `cutover` left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// How it ended.
    pub exit: Exit,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs `cutover` with these arguments.
#[track_caller]
pub fn cutover<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Finished {
    let mut command = Monitor::command();
    command.args(arguments);
    finish(command)
}

/// Runs a command, `cutover` or something that executes it, to its end.
#[track_caller]
pub fn finish(command: Command) -> Finished {
    let monitor = Monitor::start(command);
    let (mut output, input) = monitor.take_pipes().expect("a monitor is started with pipes");
    drop(input);
    let reader = std::thread::spawn(move || {
        let mut stdout = Vec::new();
        output.read_to_end(&mut stdout).expect("a pipe can be read");
        String::from_utf8_lossy(&stdout).into_owned()
    });
    let exit = monitor.wait();
    Finished {
        exit,
        stdout: reader.join().expect("the reader does not panic"),
        stderr: monitor.log(),
    }
}
