//! A Unix socket to listen on: for its owner only, in place of a dead one's, gone with its listener.
//!
//! Consoles listen on one, and so do the vsock device and the API.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};

/// Why nothing can listen at a path.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// No socket can be made at this path.
    #[error("cannot listen on {}: {source}", .path.display())]
    Os {
        /// The socket's path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process serves clients at this path.
    #[error("cannot listen on {}: another process does; choose another path or end it", .path.display())]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// The path is taken by something that must not be replaced.
    #[error("cannot listen on {}: a file that is no socket is there", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
}

/// A listening socket that does not block; dropping it removes its file.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, for this user only; `backlog` clients may wait to be accepted. The socket file of a process
    /// that is gone is replaced.
    ///
    /// # Errors
    /// Someone listens there, another kind of file is there, or the directory refuses.
    pub fn bind(path: &Path, backlog: i32) -> Result<Self, ListenError> {
        let failed = |source: Errno| ListenError::Os {
            path: path.to_owned(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = new_socket().map_err(failed)?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path)?;
                bind(&socket, &address).map_err(failed)?;
            }
            result => result.map_err(failed)?,
        }
        let listener = Self {
            socket,
            path: path.to_owned(),
        };
        // Nobody can connect before the socket listens, so nobody slips in before the permissions are right.
        chmod(path, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        listen(&listener.socket, backlog).map_err(failed)?;
        Ok(listener)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next waiting client, as a non-blocking stream.
    ///
    /// # Errors
    /// Nobody waits any more, or the process is out of descriptors.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        Ok(accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

/// Connects to whoever listens at `path`, as a non-blocking stream, without waiting.
///
/// # Errors
/// Nobody listens, or as many wait to be accepted as may; no permission, no such file.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Whether the socket file at `path` has someone behind it, found without waiting.
///
/// # Errors
/// Neither can be told: no permission, no such file.
pub fn is_served(path: &Path) -> io::Result<bool> {
    match connect_to(path) {
        Ok(_) => Ok(true),
        // A listener with a full backlog is there all the same.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the socket file at `path` if nobody is behind it.
///
/// # Errors
/// Someone is, it is no socket, or it cannot be removed.
pub fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::Os {
        path: path.to_owned(),
        source,
    };
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    if is_served(path).map_err(failed)? {
        return Err(ListenError::InUse { path: path.to_owned() });
    }
    fs::remove_file(path).map_err(failed)
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    const BACKLOG: i32 = 4;

    #[test]
    fn the_socket_is_for_its_owner_only_and_goes_away_with_the_listener() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("socket");
        let listener = Listener::bind(&path, BACKLOG).expect("free path");
        let mode = fs::metadata(&path).expect("the socket is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn the_socket_file_of_a_dead_process_is_replaced() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).expect("free path"));
        assert!(path.exists(), "std leaves the file behind");
        assert!(!is_served(&path).expect("a socket"));
        let listener = Listener::bind(&path, BACKLOG).expect("stale");
        UnixStream::connect(&path).expect("the new listener");
        listener.accept().expect("the client that connected");
    }

    #[test]
    fn a_socket_somebody_listens_on_is_left_alone_even_with_a_full_backlog() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("socket");
        let other = Listener::bind(&path, 0).expect("free path");
        let _waiting = UnixStream::connect(&path).expect("room for one");
        assert!(is_served(&path).expect("a socket"));
        assert!(matches!(Listener::bind(&path, BACKLOG), Err(ListenError::InUse { .. })));
        other.accept().expect("still the other's");
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("socket");
        fs::write(&path, "precious").expect("write");
        assert!(matches!(
            Listener::bind(&path, BACKLOG),
            Err(ListenError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).expect("read"), b"precious");
    }
}
