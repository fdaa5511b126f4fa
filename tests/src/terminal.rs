//! A terminal for a monitor to run on, with the test in front of it.

use std::fs::{File, OpenOptions};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::tcgetattr;

use crate::Console;

/// A pseudo-terminal.
#[derive(Debug)]
pub struct Terminal {
    /// Where the test sees the screen and types.
    outer: File,
    /// What the monitor has as standard input and output.
    inner: File,
}

impl Terminal {
    /// A new terminal, in the mode new terminals have: lines are edited and echoed, Ctrl-C is a signal.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "each is a different one")]
    pub fn new() -> Self {
        let outer = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("the machine has pseudo-terminals");
        grantpt(&outer)
            .and_then(|()| unlockpt(&outer))
            .expect("a new pseudo-terminal can be unlocked");
        let name = ptsname(&outer, Vec::new()).expect("a pseudo-terminal has a name");
        let name = name.to_str().expect("names of pseudo-terminals are ASCII");
        let inner = OpenOptions::new()
            .read(true)
            .write(true)
            .open(name)
            .expect("an unlocked pseudo-terminal opens");
        let outer = outer.into();
        Self { outer, inner }
    }

    /// Whether input reaches the program byte by byte, unedited and without echo.
    pub fn is_raw(&self) -> bool {
        use rustix::termios::LocalModes;
        let settings = tcgetattr(&self.inner).expect("a terminal has settings");
        !settings
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    pub(crate) fn inner_end(&self) -> &File {
        &self.inner
    }

    pub(crate) fn console(&self) -> Console {
        let end = || self.outer.try_clone().expect("a descriptor can be duplicated");
        Console::attach(end(), end())
    }
}
