//! The end of a process whose guest memory, or a disk, can no longer be filled. Its vCPUs wait in the kernel for pages that
//! will not come, or for those that must not be used; they cannot be joined, nor anything be saved.

use std::io::Write;

use std::error::Error as StdError;

use cutover_devices::console::restore_terminal;

/// What the process exits with: an error of the monitor.
const EXIT_FAILURE: i32 = 1;

/// Ends the process, for `reason`.
pub fn end_process(reason: &str) -> ! {
    restore_terminal();
    tracing::error!(reason, "the VM cannot go on");
    // The log may go elsewhere, or nowhere; there may be nobody to read this either.
    let _ = writeln!(std::io::stderr(), "cutover: error: {reason}");
    // SAFETY: ends the process without running anything else of it, which could wait for a thread that cannot end.
    unsafe { libc::_exit(EXIT_FAILURE) }
}

/// Ends the process when dropped while a thread panics: who waits for it would wait for ever.
pub struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            end_process("the thread that fills the VM's memory has panicked");
        }
    }
}

/// An error with all that led to it.
pub fn with_sources(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
