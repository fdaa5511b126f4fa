//! The agent: runs shell commands that come over the serial port.

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use cutover_guest::agent::{OUTPUT_MAX, Reply, Request};
use cutover_guest::frame::{self, Item};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};
use rustix::termios::{OptionalActions, QueueSelector, tcflush, tcgetattr, tcsetattr};

/// Serves requests on the terminal `line` until it fails.
pub fn serve(line: &str) -> io::Result<Infallible> {
    let mut line = OpenOptions::new().read(true).write(true).open(line)?;
    let mut settings = tcgetattr(&line)?;
    settings.make_raw();
    tcsetattr(&line, OptionalActions::Now, &settings)?;

    // The agent being up is the reply to a request nobody sent.
    let mut last = Reply::default();
    frame::write(&mut line, &last.encode())?;

    let mut reader = frame::Reader::default();
    let mut buffer = [0; 4096];
    loop {
        let length = line.read(&mut buffer)?;
        reader.push(&buffer[..length]);
        while let Some(item) = reader.next_item() {
            match item {
                Item::Payload(payload) => {
                    let Some(request) = Request::decode(&payload) else {
                        continue;
                    };
                    if request.number != last.number {
                        last = answer(&request);
                    }
                    // The same request may have come again while the command ran; one reply is enough.
                    tcflush(&line, QueueSelector::IFlush)?;
                    frame::write(&mut line, &last.encode())?;
                }
                // The harness asks again.
                Item::Text(_) | Item::Damage => {}
            }
        }
    }
}

fn answer(request: &Request) -> Reply {
    run(request).unwrap_or_else(|error| Reply {
        number: request.number,
        exit_code: 126,
        stderr: format!("guest-init: cannot run the command: {error}\n").into_bytes(),
        ..Reply::default()
    })
}

/// Runs a command to its end, its output collected in memory files: children that outlive it in the background may
/// go on writing there without keeping anybody waiting, as they would with a pipe.
fn run(request: &Request) -> io::Result<Reply> {
    let (stdout, stderr) = (memory_file()?, memory_file()?);
    let shell = Command::new("/bin/sh")
        .args(["-c", &request.command])
        .env("PATH", "/bin:/sbin")
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()?;
    let exit_code = wait_reaping(shell.id())?;
    let (stdout, stdout_cut) = beginning(&stdout)?;
    let (stderr, stderr_cut) = beginning(&stderr)?;
    Ok(Reply {
        number: request.number,
        exit_code,
        stdout,
        stderr,
        truncated: stdout_cut || stderr_cut,
    })
}

/// Waits for one child, and takes in the orphans that process 1 inherits meanwhile.
fn wait_reaping(child: u32) -> io::Result<i32> {
    let child = i32::try_from(child).ok().and_then(Pid::from_raw);
    loop {
        match waitpid(None, WaitOptions::empty())? {
            Some((pid, status)) if Some(pid) == child => return Ok(shell_code(status)),
            _ => {}
        }
    }
}

fn shell_code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => -1,
    }
}

fn memory_file() -> io::Result<File> {
    Ok(memfd_create("output", MemfdFlags::CLOEXEC)?.into())
}

/// The first bytes of a file, and whether there are more. Leaves the file's position, which the children share, alone.
fn beginning(file: &File) -> io::Result<(Vec<u8>, bool)> {
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length.min(OUTPUT_MAX)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok((bytes, length > OUTPUT_MAX))
}
