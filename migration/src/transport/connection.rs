//! A connection that never waits for ever.
//!
//! ```text
//!  read, write ──► socket, which waits for a TICK at most ──► again, unless  ├─ nobody wants it any more
//!                                                                            ├─ nothing moves, while it should
//!                                                                            └─ the deadline is over
//! ```
//! That the other host, or the way to it, is gone without a word is noticed by the kernel: it asks an idle peer each
//! second, and gives up what is not acknowledged, after [`SILENCE_MAX`]. A link that is cut for a shorter time is as if
//! it had been slow.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use super::descriptors;
use crate::error::Error;

/// How long a peer may neither send nor take anything when it should.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);

/// How long a system call waits before it is looked whether to go on waiting.
pub const TICK: Duration = Duration::from_millis(100);

/// How often the kernel asks a peer from which nothing comes.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// What a connection reads from and writes to.
pub trait Duplex: Read + Write + Send {}

impl<T: Read + Write + Send> Duplex for T {}

/// A connection to the peer.
pub struct Connection {
    socket: Socket,
    /// Set by somebody who does not want the answer any more.
    cancelled: Vec<Arc<AtomicBool>>,
    deadline: Instant,
    /// How long nothing may move before that.
    silence: Duration,
    /// How long that may be where it always has to move.
    silence_max: Duration,
    bytes_written: u64,
    bytes_read: u64,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<dyn Duplex>),
}

impl Socket {
    fn duplex(&mut self) -> &mut dyn Duplex {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
            Self::Tls(stream) => stream,
        }
    }
}

/// The reason of an [`io::Error`]: somebody does not want the answer any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
struct Cancelled;

impl Connection {
    /// A connection over TCP, neither encrypted nor authenticated.
    ///
    /// # Errors
    /// The system refused an option.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        prepare_tcp(&stream)?;
        Ok(Self::of(Socket::Tcp(stream)))
    }

    /// A connection within this host.
    ///
    /// # Errors
    /// The system refused an option.
    pub fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        Ok(Self::of(Socket::Unix(stream)))
    }

    /// A connection over TLS, whose socket was prepared as one of TCP is.
    pub fn tls(stream: Box<dyn Duplex>) -> Self {
        Self::of(Socket::Tls(stream))
    }

    fn of(socket: Socket) -> Self {
        Self {
            socket,
            cancelled: Vec::new(),
            deadline: Instant::now() + SILENCE_MAX,
            silence: SILENCE_MAX,
            silence_max: SILENCE_MAX,
            bytes_written: 0,
            bytes_read: 0,
        }
    }

    /// Gives up waiting when `cancelled` is set.
    pub fn watch(&mut self, cancelled: Arc<AtomicBool>) {
        self.cancelled.push(cancelled);
    }

    /// Nobody can have it give up waiting any more.
    pub fn watch_nothing(&mut self) {
        self.cancelled.clear();
    }

    /// What comes next has this long, whenever in that time it moves.
    pub fn within(&mut self, limit: Duration) {
        self.deadline = Instant::now() + limit;
        self.silence = limit;
    }

    /// What comes next has this long, and in that time always moves: [`SILENCE_MAX`] holds, or what is
    /// [said](Self::silent_at_most) instead.
    pub fn steadily_within(&mut self, limit: Duration) {
        self.within(limit);
        self.silence = limit.min(self.silence_max);
    }

    /// Where something has to move, it may take no longer than `silence` until it does.
    pub fn silent_at_most(&mut self, silence: Duration) {
        self.silence_max = silence;
    }

    /// How many bytes the system has taken to send them, those of TLS not counted.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// How many bytes went both ways, those of TLS not counted.
    pub fn bytes_moved(&self) -> u64 {
        self.bytes_written + self.bytes_read
    }

    /// Hands `descriptors` over to the peer, on this host. Without any, nothing is done.
    ///
    /// # Errors
    /// The peer is on another host, or the link broke.
    pub fn send_descriptors(&mut self, descriptors: Vec<OwnedFd>) -> Result<(), Error> {
        if descriptors.is_empty() {
            return Ok(());
        }
        self.within(SILENCE_MAX);
        let sent = self.patiently(|socket| match socket {
            Socket::Unix(stream) => descriptors::send(stream, &descriptors),
            Socket::Tcp(_) | Socket::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        });
        sent.map_err(link_error("hand descriptors over", "that they are taken"))
    }

    /// Takes the `count` descriptors that the peer hands over. Without any, nothing is done.
    ///
    /// # Errors
    /// The peer is on another host, sends something else, or the link broke.
    pub fn receive_descriptors(&mut self, count: usize) -> Result<Vec<OwnedFd>, Error> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.within(SILENCE_MAX);
        let taken = self.patiently(|socket| match socket {
            Socket::Unix(stream) => descriptors::receive(stream, count),
            Socket::Tcp(_) | Socket::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        });
        taken.map_err(link_error("take descriptors", "descriptors"))
    }

    /// Writes all of `pieces`.
    ///
    /// # Errors
    /// As of [`Write::write`].
    pub fn write_all_pieces(&mut self, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        // Without it, an empty first piece would look like the end of the connection.
        IoSlice::advance_slices(&mut pieces, 0);
        while !pieces.is_empty() {
            match self.write_vectored(pieces)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => IoSlice::advance_slices(&mut pieces, written),
            }
        }
        Ok(())
    }

    /// Carries out `transfer` until it is not interrupted by a tick.
    fn patiently<T>(&mut self, mut transfer: impl FnMut(&mut Socket) -> io::Result<T>) -> io::Result<T> {
        let mut waiting_since = None;
        loop {
            match transfer(&mut self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let since = *waiting_since.get_or_insert_with(Instant::now);
                    if since.elapsed() + TICK > self.silence {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                outcome => return outcome,
            }
            self.check()?;
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.cancelled.iter().any(|flag| flag.load(Ordering::Relaxed)) {
            return Err(io::Error::other(Cancelled));
        }
        if self.deadline <= Instant::now() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl Read for Connection {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // A peer that sends byte by byte has no tick in which it would be noticed.
        self.check()?;
        let read = self.patiently(|socket| socket.duplex().read(into))?;
        self.bytes_read += read as u64;
        Ok(read)
    }
}

impl Write for Connection {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.check()?;
        let written = self.patiently(|socket| socket.duplex().write_vectored(from))?;
        self.bytes_written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.patiently(|socket| socket.duplex().flush())
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.socket {
            Socket::Tcp(_) => "Connection over TCP",
            Socket::Unix(_) => "Connection within the host",
            Socket::Tls(_) => "Connection over TLS",
        })
    }
}

/// Has `stream` send at once, notice a silent peer, and wait for a [`TICK`] at most.
///
/// # Errors
/// The system refused an option.
pub fn prepare_tcp(stream: &TcpStream) -> io::Result<()> {
    let silence_ms = u32::try_from(SILENCE_MAX.as_millis()).expect("some seconds");
    let probes = SILENCE_MAX.as_secs() / PROBE_EVERY.as_secs();
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(TICK))?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, PROBE_EVERY)?;
    sockopt::set_tcp_keepintvl(stream, PROBE_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, u32::try_from(probes).expect("a few"))?;
    sockopt::set_tcp_user_timeout(stream, silence_ms)?;
    Ok(())
}

/// What it means that `action` failed with an error, where `expected` was waited for.
pub fn link_error(action: &'static str, expected: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| {
        if source.get_ref().is_some_and(|reason| reason.is::<Cancelled>()) {
            return Error::Cancelled;
        }
        match source.kind() {
            io::ErrorKind::TimedOut => Error::Silent { expected },
            io::ErrorKind::UnexpectedEof => Error::Ended { expected },
            _ => Error::Link { action, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Connection::unix(near).unwrap(), far)
    }

    #[test]
    fn whoever_waits_can_be_told_to_stop() {
        let (mut near, _far) = pair();
        let cancelled = Arc::new(AtomicBool::new(false));
        near.watch(Arc::clone(&cancelled));
        let waiting = thread::spawn(move || near.read_exact(&mut [0]));
        cancelled.store(true, Ordering::Relaxed);
        let error = waiting.join().unwrap().expect_err("nothing was sent");
        assert!(matches!(link_error("read", "an answer")(error), Error::Cancelled));
    }

    #[test]
    fn a_deadline_holds_also_for_a_peer_that_sends_byte_by_byte() {
        let (mut near, mut far) = pair();
        far.write_all(&[0; 100]).unwrap();
        near.within(Duration::ZERO);
        let error = near.read_exact(&mut [0]).expect_err("the deadline is over");
        assert!(matches!(link_error("read", "an answer")(error), Error::Silent { .. }));
    }

    #[test]
    fn pieces_arrive_one_after_the_other_however_much_the_system_takes_at_once() {
        let (mut near, mut far) = pair();
        let pieces = [vec![], vec![1; 700_000], vec![], vec![2; 3], vec![3; 500_000]];
        let expected = pieces.concat();
        let reading = thread::spawn(move || {
            let mut all = Vec::new();
            far.read_to_end(&mut all).map(|_| all)
        });
        near.write_all_pieces(&mut pieces.each_ref().map(|piece| IoSlice::new(piece)))
            .unwrap();
        assert_eq!(near.bytes_written(), expected.len() as u64);
        drop(near);
        assert!(reading.join().unwrap().unwrap() == expected);
    }
}
