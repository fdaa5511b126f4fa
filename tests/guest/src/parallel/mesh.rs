//! A TCP connection between each two ranks, and what they exchange over them: messages, each a length and its bytes.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::widen;

/// Longest message that is believed: more than any kernel sends.
const MESSAGE_MAX: u64 = 64 << 20;
/// How often a rank that does not listen yet is tried, and how long is waited in between.
const TRIES: u32 = 600;
const PAUSE: Duration = Duration::from_millis(100);

/// One rank's connections to all others.
pub struct Mesh {
    rank: usize,
    /// By rank; none to itself.
    peers: Vec<Option<TcpStream>>,
}

impl Mesh {
    /// Connects rank `rank` of those at `addresses`, which listens there.
    ///
    /// # Errors
    /// The address is not to be had, or another rank is not reached.
    pub fn join(rank: usize, addresses: &[SocketAddr]) -> io::Result<Self> {
        let own = addresses.get(rank).ok_or(io::ErrorKind::InvalidInput)?;
        Self::join_at(&TcpListener::bind(own)?, rank, addresses)
    }

    /// The same for one that has its `listener` already. It connects to the ranks below it, and those above it connect
    /// to it.
    pub(super) fn join_at(listener: &TcpListener, rank: usize, addresses: &[SocketAddr]) -> io::Result<Self> {
        let mut peers: Vec<Option<TcpStream>> = addresses.iter().map(|_| None).collect();
        for (peer, address) in peers.iter_mut().zip(addresses).take(rank) {
            let mut connection = connect(address)?;
            connection.write_all(&widen(rank).to_le_bytes())?;
            *peer = Some(connection);
        }
        for _ in rank + 1..addresses.len() {
            let (mut connection, _) = listener.accept()?;
            connection.set_nodelay(true)?;
            let caller = usize::try_from(read_number(&mut connection)?).unwrap_or(usize::MAX);
            match peers.get_mut(caller) {
                Some(peer @ None) if caller > rank => *peer = Some(connection),
                _ => return Err(invalid(&format!("nobody waits for rank {caller}"))),
            }
        }
        Ok(Self { rank, peers })
    }

    /// Which rank this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn ranks(&self) -> usize {
        self.peers.len()
    }

    /// Gives each rank its message of `outgoing`, and returns what each has for this one. All ranks have to call it.
    ///
    /// # Errors
    /// A connection has ended.
    pub fn exchange(&mut self, mut outgoing: Vec<Vec<u8>>) -> io::Result<Vec<Vec<u8>>> {
        let own = std::mem::take(&mut outgoing[self.rank]);
        let mut own = Some(own);
        thread::scope(|scope| {
            let mut sending = Vec::new();
            for (peer, message) in self.peers.iter().zip(&outgoing) {
                if let Some(peer) = peer {
                    sending.push(scope.spawn(move || send(peer, message)));
                }
            }
            let received = self
                .peers
                .iter()
                .map(|peer| match peer {
                    Some(peer) => receive(peer),
                    None => Ok(own.take().unwrap_or_default()),
                })
                .collect();
            for thread in sending {
                thread.join().map_err(|_| io::ErrorKind::Other)??;
            }
            received
        })
    }

    /// Gives all ranks the same `message`, and returns that of each, in order.
    ///
    /// # Errors
    /// A connection has ended.
    pub fn share(&mut self, message: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.exchange(vec![message.to_vec(); self.ranks()])
    }
}

fn connect(address: &SocketAddr) -> io::Result<TcpStream> {
    let mut refused = io::Error::from(io::ErrorKind::TimedOut);
    for _ in 0..TRIES {
        match TcpStream::connect(address) {
            Ok(connection) => {
                connection.set_nodelay(true)?;
                return Ok(connection);
            }
            Err(error) => refused = error,
        }
        // It says nothing when it begins to listen.
        thread::sleep(PAUSE);
    }
    Err(refused)
}

fn send(mut to: &TcpStream, message: &[u8]) -> io::Result<()> {
    to.write_all(&widen(message.len()).to_le_bytes())?;
    to.write_all(message)
}

fn receive(mut from: &TcpStream) -> io::Result<Vec<u8>> {
    let length = read_number(&mut from)?;
    if length > MESSAGE_MAX {
        return Err(invalid(&format!("a message of {length} bytes")));
    }
    let mut message = Vec::new();
    from.take(length).read_to_end(&mut message)?;
    if widen(message.len()) < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(message)
}

fn read_number(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// A message that makes no sense.
pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
