//! `cutover vm console`: this terminal, or whatever standard input and output are, connected with a VM's console.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process;

use cutover_devices::console::{Command, Escape, RawTerminal, restore_terminal};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read};

use super::error::ClientError;
use crate::exit::ExitStatus;
use crate::server::v1::types::{InfoV1, SerialInfoV1};
use crate::signals::Blocked;

/// Most bytes moved at once.
const CHUNK: usize = 4096;

const WELCOME: &str = "Connected; Ctrl-A x leaves the console, Ctrl-A h shows all keys.\r\n";
const HELP: &str = "\r\n\
    Ctrl-A x       leave the console; the VM goes on\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n\
    Ctrl-A h       show this list\r\n";

/// The socket of the console of the VM that says `info` of itself.
///
/// # Errors
/// Its console is something else; the error says what to do instead.
pub fn socket(info: &InfoV1) -> Result<PathBuf, ClientError> {
    const ADVICE: &str = "start it with --serial socket=FILE to have a console to connect with";
    let elsewhere = match &info.serial {
        SerialInfoV1::Socket { path } => return Ok(as_seen_by(info.pid, Path::new(path))),
        SerialInfoV1::File { path } => format!("it is written to the file {path}: use tail -f there, or {ADVICE}"),
        SerialInfoV1::Pty => {
            format!("it is a pseudo-terminal, whose name was printed at the start: use that, or {ADVICE}")
        }
        SerialInfoV1::Stdio => format!("it is the standard input and output of process {}: {ADVICE}", info.pid),
        SerialInfoV1::Null => format!("the VM has none: {ADVICE}"),
    };
    Err(ClientError::NoConsole(format!("its console is no socket; {elsewhere}")))
}

/// A path of the process `pid`, which may have another working directory.
fn as_seen_by(pid: u32, path: &Path) -> PathBuf {
    if path.is_absolute() {
        path.to_owned()
    } else {
        Path::new("/proc").join(pid.to_string()).join("cwd").join(path)
    }
}

/// Connects standard input and output with the console at `socket`, until the person leaves or the VM ends.
///
/// # Errors
/// Nobody listens there, or one of the ends fails.
pub fn attach(socket: &Path) -> Result<(), ClientError> {
    let console = UnixStream::connect(socket).map_err(|source| ClientError::Connect {
        socket: socket.to_owned(),
        source,
    })?;
    let input = io::stdin();
    restore_terminal_when_told_to_end().map_err(ClientError::Console)?;
    let terminal = RawTerminal::enable(&input).map_err(ClientError::Console)?;
    if terminal.is_some() {
        tell(WELCOME);
    }
    let escape = terminal.is_some().then(Escape::default);
    relay(input.as_fd(), &mut io::stdout(), &console, escape).map_err(ClientError::Console)
}

fn restore_terminal_when_told_to_end() -> io::Result<()> {
    let told = |_| {
        restore_terminal();
        process::exit(ExitStatus::Failure as i32);
    };
    Blocked::block()?.serve(told, false)
}

/// Moves bytes both ways until the console's end closes, or the person says so. The end of the input is not the end of
/// the output: what the guest answers is still shown.
fn relay(
    input: impl AsFd,
    output: &mut impl Write,
    mut console: &UnixStream,
    mut escape: Option<Escape>,
) -> io::Result<()> {
    let mut buffer = [0; CHUNK];
    let mut input_is_open = true;
    loop {
        let wanted = if input_is_open {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut ready = [PollFd::new(&console, PollFlags::IN), PollFd::new(&input, wanted)];
        // The input last: without it there is one less to wait for.
        let count = if input_is_open { ready.len() } else { ready.len() - 1 };
        match poll(&mut ready[..count], None) {
            Err(Errno::INTR) => continue,
            result => result?,
        };
        let [from_console, from_input] = ready.map(|end| !end.revents().is_empty());
        if from_console {
            match read(console, &mut buffer)? {
                0 => return Ok(()),
                count => {
                    output.write_all(&buffer[..count])?;
                    output.flush()?;
                }
            }
        }
        if from_input {
            let count = read(&input, &mut buffer)?;
            input_is_open = count > 0;
            let mut typed = buffer[..count].to_vec();
            let commands = escape.as_mut().map(|escape| escape.filter(&mut typed));
            console.write_all(&typed)?;
            for command in commands.into_iter().flatten() {
                match command {
                    Command::Quit => return Ok(()),
                    Command::Help => tell(HELP),
                }
            }
        }
    }
}

/// Says something to the person, not to whoever reads the guest's output.
fn tell(text: &str) {
    // Whoever closed the standard error does not want to be told.
    let _ = io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::thread;

    use super::*;

    fn info(serial: SerialInfoV1) -> InfoV1 {
        InfoV1 {
            serial,
            ..crate::client::testing::info("web")
        }
    }

    #[test]
    fn a_socket_is_found_wherever_the_vm_was_started() {
        let at = |path: &str| socket(&info(SerialInfoV1::Socket { path: path.to_owned() })).expect("a socket");
        assert_eq!(at("/srv/console"), Path::new("/srv/console"));
        assert_eq!(at("console"), Path::new("/proc/42/cwd/console"));
    }

    #[test]
    fn a_console_elsewhere_is_refused_with_what_to_do() {
        for (serial, part) in [
            (SerialInfoV1::Stdio, "standard input and output of process 42"),
            (
                SerialInfoV1::File {
                    path: "/log".to_owned(),
                },
                "use tail -f there",
            ),
            (SerialInfoV1::Pty, "pseudo-terminal"),
            (SerialInfoV1::Null, "has none"),
        ] {
            let message = socket(&info(serial)).expect_err(part).to_string();
            assert!(
                message.contains(part) && message.contains("--serial socket=FILE"),
                "{message}"
            );
        }
    }

    #[test]
    fn what_the_guest_says_after_the_end_of_the_input_is_shown() {
        let (ours, mut guest) = UnixStream::pair().expect("socket pair");
        let (input, mut typing) = io::pipe().expect("pipe");
        typing.write_all(b"\x01xls\n").expect("room");
        drop(typing);
        let guest = thread::spawn(move || {
            let mut typed = [0; 5];
            guest.read_exact(&mut typed).expect("what was typed");
            guest.write_all(b"a b\n").expect("room");
            typed
        });
        let mut output = Vec::new();
        relay(input, &mut output, &ours, None).expect("no end fails");
        assert_eq!(output, b"a b\n");
        assert_eq!(&guest.join().expect("it has read"), b"\x01xls\n");
    }

    #[test]
    fn the_escape_leaves_and_what_was_typed_before_it_arrives() {
        let (ours, mut guest) = UnixStream::pair().expect("socket pair");
        let (input, mut typing) = io::pipe().expect("pipe");
        typing.write_all(b"ls\n\x01xrm").expect("room");
        relay(input, &mut Vec::new(), &ours, Some(Escape::default())).expect("no end fails");
        drop(ours);
        let mut typed = Vec::new();
        guest.read_to_end(&mut typed).expect("it was left");
        assert_eq!(typed, b"ls\nrm");
    }
}
