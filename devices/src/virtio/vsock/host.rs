//! The host's end, as Firecracker has it: a Unix socket through which clients ask for a port of the guest's, and one Unix
//! socket for each port of the host's that the guest asks for.
//!
//! ```text
//!  client ── connects to PATH, writes "CONNECT 52\n" ──► the guest is asked for its port 52 ──► "OK 1073741824\n"
//!  guest ─── asks for port 52 of CID 2 ────────────────► PATH_52, where somebody listens, or it is refused
//! ```

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::listener::{self, ListenError, Listener};

/// Clients that may wait to be looked at.
pub const BACKLOG: i32 = 128;
/// Most bytes of a command with its end.
const COMMAND_MAX: usize = 32;
const COMMAND: &str = "connect";

/// See the module.
pub struct Host {
    path: PathBuf,
    listener: Option<Listener>,
}

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// It has not said all of it.
    Unknown,
    /// This port of the guest's.
    Port(u32),
    /// Something else, or nothing: it has gone.
    Nonsense,
}

impl Host {
    /// The host's end at `path`, where nobody listens yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            listener: None,
        }
    }

    /// Listens for clients, if it does not already.
    ///
    /// # Errors
    /// Somebody else does, or the path cannot be used.
    pub fn listen(&mut self) -> Result<(), ListenError> {
        if self.listener.is_none() {
            self.listener = Some(Listener::bind(&self.path, BACKLOG)?);
        }
        Ok(())
    }

    /// Lets another process listen.
    pub fn stop_listening(&mut self) {
        self.listener = None;
    }

    /// Where clients come from.
    pub fn listener(&self) -> Option<&Listener> {
        self.listener.as_ref()
    }

    /// Connects to whoever listens for the guest at `port`, without waiting.
    ///
    /// # Errors
    /// Nobody does, or too many wait there.
    pub fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        listener::connect_to(Path::new(&path))
    }
}

/// What the client behind `socket` wants. A command that is complete is taken from the socket, and nothing that follows it.
pub fn wish(socket: &OwnedFd) -> Wish {
    let mut bytes = [0; COMMAND_MAX];
    let len = match recv(socket.as_fd(), &mut bytes[..], RecvFlags::PEEK) {
        Ok((len, _)) if len > 0 => len,
        Err(Errno::AGAIN | Errno::INTR) => return Wish::Unknown,
        _ => return Wish::Nonsense,
    };
    let Some(end) = bytes[..len].iter().position(|&byte| byte == b'\n') else {
        return if len < COMMAND_MAX {
            Wish::Unknown
        } else {
            Wish::Nonsense
        };
    };
    let mut command = [0; COMMAND_MAX];
    match rustix::io::read(socket, &mut command[..=end]) {
        Ok(count) if count == end + 1 => parse(&command[..end]).map_or(Wish::Nonsense, Wish::Port),
        _ => Wish::Nonsense,
    }
}

/// The port in a command, without its end.
fn parse(command: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(command).ok()?.split_ascii_whitespace();
    let is_known = words.next()?.eq_ignore_ascii_case(COMMAND);
    let port = words.next()?;
    let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok()?;
    (is_known && is_number && words.next().is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, OwnedFd) {
        let (client, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (client, ours.into())
    }

    #[test]
    fn a_command_is_understood_once_it_is_complete_and_what_follows_is_left() {
        let (mut client, ours) = pair();
        assert_eq!(wish(&ours), Wish::Unknown);
        client.write_all(b"CONN").unwrap();
        assert_eq!(wish(&ours), Wish::Unknown);
        client.write_all(b"ECT 4294967295\nhello").unwrap();
        assert_eq!(wish(&ours), Wish::Port(u32::MAX));
        let mut rest = [0; 5];
        UnixStream::from(ours).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn what_is_no_command_is_nonsense() {
        for text in [
            "\n",
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "LISTEN 1\n",
            "CONNECT 1                       \n",
            "CONNECT \u{661}\n",
        ] {
            let (mut client, ours) = pair();
            client.write_all(text.as_bytes()).unwrap();
            assert_eq!(wish(&ours), Wish::Nonsense, "{text:?}");
        }
        let (client, ours) = pair();
        drop(client);
        assert_eq!(wish(&ours), Wish::Nonsense);
    }
}
