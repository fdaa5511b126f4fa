//! A new pseudo-terminal for a console, which a terminal program attaches to.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// Both ends of a pseudo-terminal.
pub struct Pty {
    /// Our end, which does not block.
    pub master: OwnedFd,
    /// The other end, held open so that the last program to detach does not hang the line up.
    pub slave: OwnedFd,
    /// Where to find the other end, such as `/dev/pts/3`.
    pub name: String,
}

/// Opens a pseudo-terminal in raw mode.
///
/// # Errors
/// The host has none left, or no devpts.
pub fn open() -> io::Result<Pty> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    let mut settings = tcgetattr(&slave)?;
    settings.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &settings)?;
    fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
    Ok(Pty { master, slave, name })
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn attach(name: &str) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(name)
            .expect(name)
    }

    #[test]
    fn bytes_pass_unchanged_in_both_directions_for_one_who_attaches_after_another() {
        let pty = open().expect("pseudo-terminal");
        let mut master = File::from(pty.master);
        for bytes in [*b"\x03\x04\r\n\x1a", *b"again"] {
            let mut attached = attach(&pty.name);
            let mut seen = [0; 5];
            attached.write_all(&bytes).expect("room");
            master.read_exact(&mut seen).expect("bytes are there");
            assert_eq!(seen, bytes);
            master.write_all(&bytes).expect("room");
            attached.read_exact(&mut seen).expect("bytes are there");
            assert_eq!(seen, bytes);
        }
    }
}
