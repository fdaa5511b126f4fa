//! A terminal in raw mode, and the way back from there, whichever way the process ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

use super::FIRST_OWN_FD;

/// The terminal in raw mode and its settings before: kept outside [`RawTerminal`] so that a panic hook reaches them.
static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Raw mode; dropping it restores the terminal. A process has one at most.
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts `terminal` in raw mode; none if it is no terminal.
    ///
    /// # Errors
    /// The terminal's settings cannot be read or changed.
    pub fn enable(terminal: impl AsFd) -> io::Result<Option<Self>> {
        if !isatty(&terminal) {
            return Ok(None);
        }
        let before = tcgetattr(&terminal)?;
        let own = fcntl_dupfd_cloexec(&terminal, FIRST_OWN_FD)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Log lines share the terminal, and end in a newline only.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some((own, before));
        Ok(Some(Self(())))
    }
}

/// Whether this process runs in the background of `terminal`, where it would be stopped for reading or changing it.
pub fn in_background(terminal: impl AsFd) -> bool {
    isatty(&terminal) && tcgetpgrp(&terminal).is_ok_and(|foreground| foreground != getpgrp())
}

/// Restores the terminal if it is in raw mode. For panic hooks and exits that run no destructors.
pub fn restore() {
    // Not waiting for the lock: its holder may be the very thread that panics.
    let Ok(mut before) = BEFORE.try_lock() else {
        return;
    };
    if let Some((terminal, before)) = before.take()
        && let Err(error) = tcsetattr(&terminal, OptionalActions::Now, &before)
    {
        tracing::warn!(%error, "cannot restore the terminal");
    }
}

/// Whether Ctrl-C and its like end this process although the terminal is raw, as while its guest is still elsewhere, or
/// are the guest's. Nothing happens where no terminal is raw.
///
/// # Errors
/// The terminal's settings cannot be read or changed.
pub fn keep_signals(keep: bool) -> io::Result<()> {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((terminal, _)) = before.as_ref() else {
        return Ok(());
    };
    let mut settings = tcgetattr(terminal)?;
    settings.local_modes.set(LocalModes::ISIG, keep);
    Ok(tcsetattr(terminal, OptionalActions::Now, &settings)?)
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

#[cfg(test)]
mod tests {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

    use super::*;

    /// What of a terminal's settings differs between line and raw mode.
    fn modes(terminal: impl AsFd) -> (bool, bool, bool) {
        let settings = tcgetattr(terminal).expect("a terminal");
        let local = |mode| settings.local_modes.contains(mode);
        (
            local(LocalModes::ICANON),
            local(LocalModes::ECHO),
            local(LocalModes::ISIG),
        )
    }

    #[test]
    fn a_terminal_is_raw_until_the_guard_is_dropped_or_somebody_restores_it() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("pseudo-terminal");
        unlockpt(&master).expect("ours");
        let terminal = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("its other end");
        assert_eq!(modes(&terminal), (true, true, true));

        let raw = RawTerminal::enable(&terminal).expect("settable").expect("a terminal");
        assert_eq!(modes(&terminal), (false, false, false));
        keep_signals(true).expect("settable");
        assert_eq!(modes(&terminal), (false, false, true));
        keep_signals(false).expect("settable");
        assert_eq!(modes(&terminal), (false, false, false));
        drop(raw);
        keep_signals(false).expect("nothing to do");
        assert_eq!(modes(&terminal), (true, true, true));

        let raw = RawTerminal::enable(&terminal).expect("settable").expect("a terminal");
        restore();
        assert_eq!(modes(&terminal), (true, true, true));
        drop(raw);
        assert_eq!(modes(&terminal), (true, true, true));
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let (reader, _writer) = std::io::pipe().expect("pipe");
        assert!(RawTerminal::enable(&reader).expect("nothing to do").is_none());
        assert!(!in_background(&reader));
    }
}
