//! The Unix socket a console listens on.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with};

use super::ConsoleError;

/// Clients that may wait for the one being served to leave.
const BACKLOG: i32 = 4;

/// A listening socket; dropping it removes its file.
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, for this user only. The socket file of a monitor that is gone is replaced.
    ///
    /// # Errors
    /// Someone listens there, another kind of file is there, or the directory refuses.
    pub fn bind(path: &Path) -> Result<Self, ConsoleError> {
        let failed = |source: Errno| ConsoleError::Listen {
            path: path.to_owned(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
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
        listen(&listener.socket, BACKLOG).map_err(failed)?;
        Ok(listener)
    }

    /// The descriptor to watch for clients.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The next waiting client, as a non-blocking stream.
    ///
    /// # Errors
    /// Nobody waits any more, or the process is out of descriptors.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        Ok(accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
    }
}

fn remove_stale(path: &Path) -> Result<(), ConsoleError> {
    let failed = |source: io::Error| ConsoleError::Listen {
        path: path.to_owned(),
        source,
    };
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(ConsoleError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(error) => Err(failed(error)),
        Ok(_) => Err(ConsoleError::SocketInUse { path: path.to_owned() }),
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the console's socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_socket_is_for_its_owner_only_and_goes_away_with_the_listener() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console");
        let listener = Listener::bind(&path).expect("free path");
        let mode = fs::metadata(&path).expect("the socket is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn the_socket_file_of_a_dead_monitor_is_replaced() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console");
        drop(UnixListener::bind(&path).expect("free path"));
        assert!(path.exists(), "std leaves the file behind");
        let listener = Listener::bind(&path).expect("stale");
        UnixStream::connect(&path).expect("the new listener");
        listener.accept().expect("the client that connected");
    }

    #[test]
    fn a_socket_somebody_listens_on_is_left_alone() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console");
        let _other = UnixListener::bind(&path).expect("free path");
        assert!(matches!(Listener::bind(&path), Err(ConsoleError::SocketInUse { .. })));
        UnixStream::connect(&path).expect("still the other's");
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console");
        fs::write(&path, "precious").expect("write");
        assert!(matches!(Listener::bind(&path), Err(ConsoleError::NotASocket { .. })));
        assert_eq!(fs::read(&path).expect("read"), b"precious");
    }
}
