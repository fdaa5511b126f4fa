//! What messages and pages travel on: TLS 1.3 over TCP, plain TCP where somebody says that it will do, and Unix sockets.

mod connection;
mod descriptors;
mod endpoint;
pub mod tls;

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

pub use connection::{Connection, SILENCE_MAX, link_error};
pub use endpoint::{Endpoint, HostPort, NotAnEndpoint};

use crate::error::Error;
use connection::TICK;
use tls::Identity;

/// How long it may take until a connection is there, handshake and all.
pub const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Connections that may wait to be accepted: all streams of a migration, and some strangers.
const BACKLOG: i32 = 64;

/// What protects a link.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// Whether `tcp://`, where anybody could read and change what is sent, will do.
    pub insecure: bool,
    /// Who this host is, for `tls://`.
    pub identity: Option<Identity>,
}

/// Where a destination waits.
#[derive(Debug)]
pub struct Listener {
    socket: ListeningSocket,
    endpoint: Endpoint,
}

#[derive(Debug)]
enum ListeningSocket {
    Tcp(TcpListener),
    Tls(TcpListener, Identity),
    /// Removed with the listener.
    Unix(UnixListener, PathBuf),
}

/// Connects to a destination.
///
/// # Errors
/// Nobody listens there, the peer is not whom it should be, or nothing protects the link.
pub fn connect(to: &Endpoint, security: &Security) -> Result<Connection, Error> {
    let failed = |source| Error::Connect {
        endpoint: to.to_string(),
        source,
    };
    match to {
        Endpoint::Tcp(_) if !security.insecure => Err(Error::Insecure(to.to_string())),
        Endpoint::Tcp(at) => connect_tcp(at).and_then(Connection::tcp).map_err(failed),
        Endpoint::Tls(at) => {
            let identity = identity(to, security)?;
            let stream = connect_tcp(at).map_err(failed)?;
            identity.connect(stream, &at.host).map_err(failed)
        }
        Endpoint::Unix(path) => UnixStream::connect(path).and_then(Connection::unix).map_err(failed),
    }
}

fn identity(endpoint: &Endpoint, security: &Security) -> Result<Identity, Error> {
    let identity = security.identity.clone();
    identity.ok_or_else(|| Error::NoIdentity(endpoint.to_string()))
}

fn connect_tcp(to: &HostPort) -> io::Result<TcpStream> {
    let until = Instant::now() + CONNECT_MAX;
    let mut failure = io::Error::other("the name has no address");
    for address in addresses(to)? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn addresses(at: &HostPort) -> io::Result<impl Iterator<Item = SocketAddr>> {
    (at.host.as_str(), at.port).to_socket_addrs()
}

impl Listener {
    /// Listens at `endpoint`. A Unix socket is for this user only, and replaces one that nobody listens at any more.
    ///
    /// # Errors
    /// It cannot be listened there, or nothing protects the link.
    pub fn bind(endpoint: &Endpoint, security: &Security) -> Result<Self, Error> {
        let failed = |source| Error::Listen {
            endpoint: endpoint.to_string(),
            source,
        };
        let socket = match endpoint {
            Endpoint::Tcp(_) if !security.insecure => return Err(Error::Insecure(endpoint.to_string())),
            Endpoint::Tcp(at) => ListeningSocket::Tcp(bind_tcp(at).map_err(failed)?),
            Endpoint::Tls(at) => {
                let identity = identity(endpoint, security)?;
                ListeningSocket::Tls(bind_tcp(at).map_err(failed)?, identity)
            }
            Endpoint::Unix(path) => ListeningSocket::Unix(bind_unix(path).map_err(failed)?, path.clone()),
        };
        let endpoint = socket.endpoint(endpoint).map_err(failed)?;
        Ok(Self { socket, endpoint })
    }

    /// Where it listens, with the port that was free if any would do.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The next connection; none if nobody connects in time, or `cancelled` is set.
    ///
    /// # Errors
    /// Of the connection that came, not of the listener: another may come.
    pub fn accept(&self, until: Option<Instant>, cancelled: &AtomicBool) -> Result<Option<Connection>, Error> {
        let failed = |source| Error::Listen {
            endpoint: self.endpoint.to_string(),
            source,
        };
        while !cancelled.load(Ordering::Relaxed) && until.is_none_or(|until| Instant::now() < until) {
            if self.is_ready().map_err(failed)? {
                return self.accept_now().map(Some).map_err(failed);
            }
        }
        Ok(None)
    }

    /// Waits for a tick at most.
    fn is_ready(&self) -> io::Result<bool> {
        let mut sockets = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::IN)];
        let tick = Timespec::try_from(TICK).map_err(io::Error::other)?;
        match poll(&mut sockets, Some(&tick)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn accept_now(&self) -> io::Result<Connection> {
        match &self.socket {
            ListeningSocket::Tcp(listener) => Connection::tcp(listener.accept()?.0),
            ListeningSocket::Tls(listener, identity) => identity.accept(listener.accept()?.0),
            ListeningSocket::Unix(listener, _) => Connection::unix(listener.accept()?.0),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            ListeningSocket::Tcp(listener) | ListeningSocket::Tls(listener, _) => listener.as_fd(),
            ListeningSocket::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let ListeningSocket::Unix(_, path) = &self.socket
            && let Err(error) = fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %error, "the socket of the listener was gone already");
        }
    }
}

impl ListeningSocket {
    /// `wanted`, with the port it has.
    fn endpoint(&self, wanted: &Endpoint) -> io::Result<Endpoint> {
        let port = match self {
            Self::Tcp(listener) | Self::Tls(listener, _) => listener.local_addr()?.port(),
            Self::Unix(..) => 0,
        };
        let with_port = |at: &HostPort| HostPort { port, ..at.clone() };
        Ok(match wanted {
            Endpoint::Tcp(at) => Endpoint::Tcp(with_port(at)),
            Endpoint::Tls(at) => Endpoint::Tls(with_port(at)),
            Endpoint::Unix(path) => Endpoint::Unix(path.clone()),
        })
    }
}

fn bind_tcp(at: &HostPort) -> io::Result<TcpListener> {
    let addresses: Vec<SocketAddr> = addresses(at)?.collect();
    let listener = TcpListener::bind(addresses.as_slice())?;
    // Somebody who is gone again when he is to be accepted must not be waited for.
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        fs::remove_file(path)?;
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before the socket listens, so nobody slips in before the permissions are right.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests;
