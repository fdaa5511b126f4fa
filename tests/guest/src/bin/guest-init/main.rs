//! Process 1 of the `micro` guest.
//!
//! Prints the user-space marker before anything else (the boot benchmark times it), mounts the kernel's file systems,
//! loads the modules listed in `/etc/modules` and serves the agent on the serial port for ever.
//!
//! The kernel parameter `cutover_mode=bench` makes it ask for a reset right after the marker, so that every monitor
//! ends by itself. (The kernel hands parameters it does not know, and that have no dot, to process 1 as environment.)
#![forbid(unsafe_code)]

mod agent;
mod modules;
mod power_button;

use std::convert::Infallible;
use std::io::{self, Write};
use std::process::ExitCode;

use cutover_guest::USER_SPACE_MARKER;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// File systems to mount, and where.
const MOUNTS: [(&str, &str); 6] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/run"),
];

fn main() -> ExitCode {
    let error = match run() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    eprintln!("guest-init: {error}");
    // Process 1 ending makes the kernel panic, which is how the harness learns of it.
    ExitCode::FAILURE
}

fn run() -> io::Result<Infallible> {
    // One write: a marker in pieces could be cut by a kernel message.
    io::stdout().write_all(format!("{USER_SPACE_MARKER}\n").as_bytes())?;
    if std::env::var("cutover_mode").is_ok_and(|mode| mode == "bench") {
        reboot(RebootCommand::Restart)?;
    }
    for (kind, directory) in MOUNTS {
        std::fs::create_dir_all(directory)?;
        mount(kind, directory, kind, MountFlags::empty(), None)
            .map_err(|error| io::Error::other(format!("cannot mount {kind} on {directory}: {error}")))?;
    }
    modules::load_listed("/etc/modules")?;
    power_button::watch()?;
    agent::serve("/dev/ttyS0")
}
