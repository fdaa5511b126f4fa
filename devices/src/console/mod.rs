//! The host's end of the guest's serial port: what a [`SerialSpec`] names, opened.
//!
//! | spec   | input                  | output                                                        |
//! |--------|------------------------|---------------------------------------------------------------|
//! | stdio  | standard input         | standard output; on a terminal: raw mode and escapes (below)  |
//! | file   | none                   | appended                                                      |
//! | socket | the client's bytes     | to the client; discarded while there is none                  |
//! | pty    | what is typed there    | kept for whoever attaches, up to a limit                      |
//! | null   | none                   | discarded                                                     |
//!
//! - A **terminal** on standard input is in raw mode while the VM runs: Ctrl-C goes to the guest, and
//!   [Ctrl-A x](escape) ends the VM. A monitor in its terminal's background leaves it alone and takes no input.
//! - Input from a **pipe or file** reaches the guest unchanged; at its end the guest lives on without input.
//! - A **socket** serves one client at a time, others wait until it leaves. A client leaves by closing either
//!   direction.
//!
//! How output that nobody reads is treated is [`output`]'s matter; when input is read, that of the serial port.

mod escape;
mod output;
mod pty;
mod terminal;

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use cutover_snapshot::spec::SerialSpec;
use rustix::io::fcntl_dupfd_cloexec;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use escape::{Command, Escape};
pub use output::{Output, PENDING_MAX};
pub use terminal::{RawTerminal, keep_signals, restore as restore_terminal};

pub(crate) use escape::HELP;

use crate::listener::{ListenError, Listener};

/// First descriptor number for duplicates: the standard three stay what they are.
const FIRST_OWN_FD: RawFd = 3;

/// Clients of a socket that may wait for the one being served to leave.
const CLIENTS_WAITING_MAX: i32 = 4;
/// Most bytes typed at a terminal that wait for the guest to read; more are lost, as on a real line.
const TYPED_AHEAD_MAX: usize = 4096;
/// Most bytes read from a terminal at once.
const TYPED_CHUNK: usize = 256;

/// Why a console cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The terminal cannot be put in raw mode, or the standard descriptors cannot be duplicated.
    #[error("cannot use the standard input and output as the console: {0}")]
    Stdio(#[source] io::Error),
    /// The file cannot be opened for appending.
    #[error("cannot open {} for the console's output: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its socket cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No pseudo-terminal can be had.
    #[error("cannot open a pseudo-terminal for the console: {0}")]
    Pty(#[source] io::Error),
    /// No event descriptor can be had.
    #[error("cannot create an event descriptor for the console: {0}")]
    Wake(#[source] io::Error),
}

/// An open console, for a serial port to use.
pub struct Console {
    pub(crate) input: Input,
    pub(crate) output: Output,
    /// Calls the event loop's attention to the serial port.
    pub(crate) wake: EventFd,
}

/// The receiving half of a console.
#[derive(Default)]
pub(crate) struct Input {
    /// Where bytes come from; none: nowhere (any more).
    stream: Option<OwnedFd>,
    /// Where clients come from.
    listener: Option<Listener>,
    /// Escapes are a terminal's privilege.
    escape: Option<Escape>,
    /// What was typed for the guest while it did not read; always empty without escapes.
    ahead: VecDeque<u8>,
    _terminal: Option<RawTerminal>,
    _pty_slave: Option<OwnedFd>,
}

impl Console {
    /// Opens what `spec` names. The name of a new pseudo-terminal is printed on the standard error.
    ///
    /// # Errors
    /// The file, socket, terminal or pseudo-terminal cannot be had.
    pub fn open(spec: &SerialSpec) -> Result<Self, ConsoleError> {
        let (input, output) = match spec {
            SerialSpec::Stdio => open_stdio().map_err(ConsoleError::Stdio)?,
            SerialSpec::File(path) => {
                let file = OpenOptions::new()
                    .append(true)
                    .create(true)
                    // For named pipes and terminals, which may be slow; regular files ignore it.
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)
                    .map_err(|source| ConsoleError::File {
                        path: path.clone(),
                        source,
                    })?;
                (Input::default(), Output::new(file.into()))
            }
            SerialSpec::Socket(path) => {
                let listener = Some(Listener::bind(path, CLIENTS_WAITING_MAX)?);
                (
                    Input {
                        listener,
                        ..Input::default()
                    },
                    Output::default(),
                )
            }
            SerialSpec::Pty => open_pty().map_err(ConsoleError::Pty)?,
            SerialSpec::Null => (Input::default(), Output::default()),
        };
        let wake = EventFd::new(EFD_NONBLOCK).map_err(ConsoleError::Wake)?;
        Ok(Self { input, output, wake })
    }
}

fn open_stdio() -> io::Result<(Input, Output)> {
    let output = Output::stdout()?;
    let stdin = rustix::stdio::stdin();
    if terminal::in_background(stdin) {
        return Ok((Input::default(), output));
    }
    let terminal = RawTerminal::enable(stdin)?;
    let input = Input {
        stream: Some(fcntl_dupfd_cloexec(stdin, FIRST_OWN_FD)?),
        escape: terminal.is_some().then(Escape::default),
        _terminal: terminal,
        ..Input::default()
    };
    Ok((input, output))
}

fn open_pty() -> io::Result<(Input, Output)> {
    let pty = pty::open()?;
    // Whoever cannot read this asked for a pseudo-terminal and closed the only way to learn its name.
    let _ = io::Write::write_fmt(&mut io::stderr(), format_args!("cutover: console on {}\n", pty.name));
    let output = Output::new(fcntl_dupfd_cloexec(&pty.master, FIRST_OWN_FD)?);
    let input = Input {
        stream: Some(pty.master),
        _pty_slave: Some(pty.slave),
        ..Input::default()
    };
    Ok((input, output))
}

impl Input {
    /// The descriptor bytes come from.
    pub(crate) fn stream(&self) -> Option<RawFd> {
        self.stream.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The descriptor clients come from, while there is none.
    pub(crate) fn vacant_listener(&self) -> Option<RawFd> {
        let listener = self.listener.as_ref().filter(|_| self.stream.is_none())?;
        Some(listener.as_fd().as_raw_fd())
    }

    /// Whether a client is connected, who may be exchanged for another.
    pub(crate) fn has_client(&self) -> bool {
        self.listener.is_some() && self.stream.is_some()
    }

    /// Takes the next client, and returns the way to answer it.
    ///
    /// # Errors
    /// The client has left already, or the process is out of descriptors.
    pub(crate) fn accept(&mut self) -> io::Result<Output> {
        let Some(listener) = &self.listener else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let client = listener.accept()?;
        let output = Output::new(fcntl_dupfd_cloexec(&client, FIRST_OWN_FD)?);
        self.stream = Some(client);
        Ok(output)
    }

    /// Whether to read now, if the guest has room for `room` bytes: a terminal always, since an escape may come.
    pub(crate) fn is_wanted(&self, room: usize) -> bool {
        self.stream.is_some() && (room > 0 || self.escape.is_some())
    }

    /// Reads at most `room` bytes for the guest, and what the person at the terminal wants of the monitor.
    ///
    /// # Errors
    /// The other end failed; `UnexpectedEof` if it is over, `WouldBlock` if there is nothing yet.
    pub(crate) fn read(&mut self, room: usize) -> io::Result<(Vec<u8>, Vec<Command>)> {
        let Some(stream) = self.stream.as_ref().filter(|_| self.is_wanted(room)) else {
            return Ok((Vec::new(), Vec::new()));
        };
        let mut bytes = vec![0; if self.escape.is_some() { TYPED_CHUNK } else { room }];
        let length = rustix::io::read(stream.as_fd(), &mut bytes[..])?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.truncate(length);
        let Some(escape) = &mut self.escape else {
            return Ok((bytes, Vec::new()));
        };
        let commands = escape.filter(&mut bytes);
        bytes.truncate(TYPED_AHEAD_MAX - self.ahead.len());
        self.ahead.extend(bytes);
        Ok((self.take_typed_ahead(room), commands))
    }

    /// Whether something typed waits for the guest.
    pub(crate) fn has_typed_ahead(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// At most `room` bytes of what was typed while the guest did not read.
    pub(crate) fn take_typed_ahead(&mut self, room: usize) -> Vec<u8> {
        self.ahead.drain(..room.min(self.ahead.len())).collect()
    }

    /// Lets go of where clients come from.
    pub(crate) fn stop_listening(&mut self) {
        self.listener = None;
    }

    /// Lets go of what bytes came from.
    pub(crate) fn close(&mut self) {
        self.stream = None;
    }
}

#[cfg(test)]
impl Console {
    /// A console with `input`, typed at a terminal or not, and `output`, for tests of the serial port.
    pub(crate) fn of(input: OwnedFd, typed: bool, output: OwnedFd) -> Self {
        let escape = typed.then(Escape::default);
        Self {
            input: Input {
                stream: Some(input),
                escape,
                ..Input::default()
            },
            output: Output::new(output),
            wake: EventFd::new(EFD_NONBLOCK).expect("an event descriptor"),
        }
    }
}
