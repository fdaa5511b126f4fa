//! The terminal on standard input in raw mode, and the way back from there, whichever way the process ends.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

/// Settings to go back to: kept outside [`RawTerminal`] so that a panic hook reaches them.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode; dropping it restores the terminal.
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts the terminal on standard input in raw mode; none if standard input is no terminal.
    ///
    /// # Errors
    /// The terminal's settings cannot be read or changed.
    pub fn enable() -> io::Result<Option<Self>> {
        if !isatty(stdin()) {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Log lines share the terminal, and end in a newline only.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        Ok(Some(Self(())))
    }
}

/// Whether this process runs in the background of its terminal, where it may neither read nor change it.
pub fn in_background() -> bool {
    isatty(stdin()) && tcgetpgrp(stdin()).is_ok_and(|foreground| foreground != rustix::process::getpgrp())
}

/// Restores the terminal if it is in raw mode. For panic hooks and exits that run no destructors.
pub fn restore() {
    // Not waiting for the lock: its holder may be the very thread that panics.
    let Ok(mut before) = BEFORE.try_lock() else {
        return;
    };
    if let Some(before) = before.take()
        && let Err(error) = tcsetattr(stdin(), OptionalActions::Now, &before)
    {
        tracing::warn!(%error, "cannot restore the terminal");
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}
