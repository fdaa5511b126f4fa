//! [`Link`]: the wire between two monitors, which fails when a test wants it to.
//!
//! ```text
//!  source ──► Link ──► destination       a relay of TCP connections; at one byte of those that pass towards one side
//!         ◄──      ◄──                   it falls silent, resets everything, or flips a bit
//! ```
//! A link that is silent keeps what it was given, and passes it on once it is healed: just what TCP makes of a cable that
//! was pulled and put back. It can also fall silent right before or after a message.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crate::environment::PATIENCE;

/// Bytes that are passed on at a time.
const PIECE: usize = 64 << 10;

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toward {
    /// From the side that connects to the side that listens.
    Destination,
    /// Back.
    Source,
}

/// What happens to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing comes through any more in either direction, and nobody is told.
    Silence,
    /// Every connection is ended, also those that begin later.
    End,
    /// A bit is not what it was.
    Flip,
}

/// A message of the protocol that is alone on its way: who sends it has heard the answer to all before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The VM is the destination's: the commit point.
    Handoff,
    /// It runs there.
    Running,
}

impl Message {
    /// What every message begins with.
    const MAGIC: &[u8] = b"CoMg";
    /// Bytes before what it says, of which the first is its number.
    const HEADER: usize = 24;

    /// Where it goes.
    fn toward(self) -> Toward {
        match self {
            Self::Handoff => Toward::Destination,
            Self::Running => Toward::Source,
        }
    }

    /// Whether `bytes`, which have just come, are it.
    fn begins(self, bytes: &[u8]) -> bool {
        let number = match self {
            Self::Handoff | Self::Running => 5,
        };
        bytes.starts_with(Self::MAGIC) && bytes.get(Self::HEADER) == Some(&number)
    }
}

/// When something happens to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// When so many bytes have passed towards one side, over all connections.
    AtByte(Toward, u64),
    /// Before this message is passed on.
    Before(Message),
    /// When it was passed on, and before anything else is.
    After(Message),
}

/// A wire between two monitors on this host. It ends when dropped.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What is to happen, and when.
    pending: Option<(When, Fault)>,
    to_destination: u64,
    to_source: u64,
    silent: bool,
    ended: bool,
    connections: Vec<TcpStream>,
}

impl Link {
    /// A wire to `address` that does what it should.
    #[track_caller]
    pub fn to(address: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback interface has a free port");
        let own = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared::default());
        let serving = shared.clone();
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                // A side that cannot be reached is told by the end of the connection to it.
                if let Ok(destination) = TcpStream::connect(address) {
                    let _ = serving.join(&source, &destination);
                }
            }
        });
        Self { address: own, shared }
    }

    /// The same, with `fault` when so many bytes have passed towards one side.
    #[track_caller]
    pub fn failing(address: SocketAddr, toward: Toward, byte: u64, fault: Fault) -> Self {
        Self::to(address).pending(When::AtByte(toward, byte), fault)
    }

    /// One that falls silent when `message` comes, which it keeps.
    #[track_caller]
    pub fn keeping(address: SocketAddr, message: Message) -> Self {
        Self::to(address).pending(When::Before(message), Fault::Silence)
    }

    /// One that falls silent as soon as it has passed on `message`.
    #[track_caller]
    pub fn silent_after(address: SocketAddr, message: Message) -> Self {
        Self::to(address).pending(When::After(message), Fault::Silence)
    }

    fn pending(self, when: When, fault: Fault) -> Self {
        self.shared.lock().pending = Some((when, fault));
        self
    }

    /// Where the source connects.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the fault has happened.
    #[track_caller]
    pub fn wait_for_fault(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.shared.lock();
        while state.pending.is_some() {
            let left = deadline.checked_duration_since(Instant::now());
            let left = left.unwrap_or_else(|| panic!("not so many bytes have passed within {PATIENCE:?}"));
            let woken = self.shared.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Cuts it.
    pub fn cut(&self) {
        self.shared.lock().silent = true;
    }

    /// Ends the silence.
    pub fn heal(&self) {
        self.shared.lock().silent = false;
        self.shared.changed.notify_all();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.lock().end();
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries what two ends say to each other, on threads of its own.
    fn join(self: &Arc<Self>, source: &TcpStream, destination: &TcpStream) -> io::Result<()> {
        let mut state = self.lock();
        for (from, to, toward) in [
            (source, destination, Toward::Destination),
            (destination, source, Toward::Source),
        ] {
            to.set_nodelay(true)?;
            state.connections.push(to.try_clone()?);
            let (from, to, shared) = (from.try_clone()?, to.try_clone()?, self.clone());
            thread::spawn(move || {
                // Either end may be gone at any time, which the other end then is told.
                let _ = shared.carry(from, &to, toward);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
        if state.ended {
            state.end();
        }
        Ok(())
    }

    fn carry(&self, mut from: TcpStream, mut to: &TcpStream, toward: Toward) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            let length = from.read(&mut piece)?;
            if length == 0 {
                return Ok(());
            }
            let mut rest = &mut piece[..length];
            while !rest.is_empty() {
                let passing = self.pass(toward, rest);
                if passing == 0 {
                    return Ok(());
                }
                to.write_all(&rest[..passing])?;
                rest = &mut rest[passing..];
            }
        }
    }

    /// How many of the next bytes may pass now, as they are then; waits while there is silence. 0 at the end.
    fn pass(&self, toward: Toward, bytes: &mut [u8]) -> usize {
        let mut state = self.lock();
        loop {
            while state.silent && !state.ended {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.ended {
                return 0;
            }
            let distance = state.distance(toward, bytes);
            if distance == Some(0) {
                state.strike(bytes);
                self.changed.notify_all();
                continue;
            }
            let passing = distance.unwrap_or(bytes.len());
            *state.passed(toward) += u64::try_from(passing).expect("a piece is small");
            if passing == bytes.len() && distance.is_some() {
                // These pass, and nothing after them.
                state.strike(&mut []);
                self.changed.notify_all();
            }
            return passing;
        }
    }
}

impl State {
    fn passed(&mut self, toward: Toward) -> &mut u64 {
        match toward {
            Toward::Destination => &mut self.to_destination,
            Toward::Source => &mut self.to_source,
        }
    }

    /// After how many of `bytes` the fault is, if it is among them or right behind.
    fn distance(&mut self, toward: Toward, bytes: &[u8]) -> Option<usize> {
        match self.pending?.0 {
            When::AtByte(direction, byte) if direction == toward => {
                let distance = usize::try_from(byte.saturating_sub(*self.passed(toward))).ok()?;
                (distance < bytes.len()).then_some(distance)
            }
            When::Before(message) if message.toward() == toward && message.begins(bytes) => Some(0),
            When::After(message) if message.toward() == toward && message.begins(bytes) => Some(bytes.len()),
            _ => None,
        }
    }

    /// Has the fault happen, right before the first of `bytes`.
    fn strike(&mut self, bytes: &mut [u8]) {
        match self.pending.take() {
            Some((_, Fault::Silence)) => self.silent = true,
            Some((_, Fault::End)) => self.end(),
            Some((_, Fault::Flip)) => bytes[0] ^= 1 << 4,
            None => {}
        }
    }

    fn end(&mut self) {
        self.ended = true;
        for connection in self.connections.drain(..) {
            // It may have ended by itself.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `bytes` over a link and returns what arrives, once `meanwhile` is over.
    fn arrives(bytes: &'static [u8], link: impl FnOnce(SocketAddr) -> Link, meanwhile: impl FnOnce(&Link)) -> Vec<u8> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let link = link(listener.local_addr().unwrap());
        let mut source = TcpStream::connect(link.address()).unwrap();
        let (mut destination, _) = listener.accept().unwrap();
        source.write_all(bytes).unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        meanwhile(&link);
        let mut arrived = Vec::new();
        let _ = destination.read_to_end(&mut arrived);
        arrived
    }

    #[test]
    fn a_healthy_link_and_one_that_was_silent_for_a_while_pass_everything_on() {
        assert_eq!(arrives(b"0123456789", Link::to, |_| {}), b"0123456789");
        let silent = |address| Link::failing(address, Toward::Destination, 4, Fault::Silence);
        let arrived = arrives(b"0123456789", silent, |link| {
            link.wait_for_fault();
            link.heal();
        });
        assert_eq!(arrived, b"0123456789");
    }

    #[test]
    fn a_fault_happens_at_its_byte() {
        let failing = |fault| move |address| Link::failing(address, Toward::Destination, 4, fault);
        let flipped = arrives(b"0123456789", failing(Fault::Flip), Link::wait_for_fault);
        assert_eq!(flipped, b"0123$56789");
        let ended = arrives(b"0123456789", failing(Fault::End), Link::wait_for_fault);
        assert!(b"0123".starts_with(&ended), "{ended:?}");
    }
}
