//! What the person at the terminal sees: one line a step, with a spinner while it lasts where there is a terminal.
//!
//! Everything goes to standard error, so that standard output carries only what was asked for.

use std::fmt::Display;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::ProgressBar;

const SPINNER_INTERVAL: Duration = Duration::from_millis(100);

/// Runs `work`, showing that `what` is going on and, at the end, how long it took. A failure is reported as `what`'s.
pub fn step<T>(what: impl Display, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let what = what.to_string();
    let started = Instant::now();
    let spinner = std::io::stderr().is_terminal().then(|| {
        let spinner = ProgressBar::new_spinner().with_message(what.clone());
        spinner.enable_steady_tick(SPINNER_INTERVAL);
        spinner
    });
    if spinner.is_none() {
        say(format_args!("{what} ..."));
    }
    let result = work();
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    let outcome = if result.is_ok() { "done" } else { "FAILED" };
    say(format_args!(
        "{what}: {outcome} ({:.1} s)",
        started.elapsed().as_secs_f64()
    ));
    result.context(what)
}

/// Prints one line about what is being done.
pub fn say(line: impl Display) {
    eprintln!("xtask: {line}");
}
