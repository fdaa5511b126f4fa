//! The part of a test run that happens where guests can run: staging the images and running the test binaries.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use tempfile::TempDir;

use super::libtest::{self, Tally};
use crate::{process, ui};

/// Name of the hidden task that does this.
pub const COMMAND: &str = "run-guest-tests";

/// A file system in memory, where disks, sockets and shared memory of guests work at full speed.
const MEMORY_FILE_SYSTEM: &str = "/dev/shm";

/// What the names of tests contain that go on with what others left, on a host that was started after theirs.
pub const LATER: &str = "on_a_later_host";

/// What to run, and with what.
#[derive(Args)]
pub struct Arguments {
    /// The `cutover` program under test
    #[arg(long)]
    monitor: PathBuf,
    /// The directory of guest images
    #[arg(long)]
    guests: PathBuf,
    /// The Python environment with foreign clients of the API
    #[arg(long)]
    clients: PathBuf,
    /// A directory in which tests on one host leave something for those on a later one
    #[arg(long)]
    legacy: PathBuf,
    /// Run the tests that go on with what others left, instead of all others
    #[arg(long)]
    later: bool,
    /// Run only the tests whose names contain this
    #[arg(long)]
    filter: Option<String>,
    /// The test binaries
    #[arg(required = true)]
    binaries: Vec<PathBuf>,
}

/// Runs the tests and returns 0 if all passed, 1 if not.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let scratch = TempDir::with_prefix_in("cutover-", MEMORY_FILE_SYSTEM)
        .with_context(|| format!("cannot create a directory in {MEMORY_FILE_SYSTEM}"))?;
    let guests = scratch.path().join("guests");
    ui::step("copying the guest images to memory", || {
        stage(&arguments.guests, &guests)
    })?;
    let share = Share::from_environment()?;
    let mut total = Tally::default();
    for binary in &arguments.binaries {
        let mut names = libtest::names(binary, arguments.filter.as_deref())?;
        names.retain(|name| name.contains(LATER) == arguments.later);
        let names = share.of(&names);
        if names.is_empty() {
            continue;
        }
        let tally = libtest::run(
            Command::new(binary)
                .arg("--exact")
                .args(names)
                .env("CUTOVER_BIN", &arguments.monitor)
                .env("CUTOVER_GUESTS", &guests)
                .env("CUTOVER_CLIENTS", &arguments.clients)
                .env("CUTOVER_LEGACY", &arguments.legacy)
                .env("CUTOVER_SCRATCH", scratch.path()),
        )?;
        total.add(tally);
    }
    total.report();
    Ok(if total.succeeded() { 0 } else { 1 })
}

/// The part of the tests that is this host's, where several share them.
struct Share {
    host: usize,
    hosts: usize,
}

impl Share {
    fn from_environment() -> Result<Self> {
        let number = |name| match std::env::var(name) {
            Ok(value) => value.parse().with_context(|| format!("{name} is not a number")),
            // Not a nested host.
            Err(_) => Ok(1),
        };
        Ok(Self {
            host: number("CUTOVER_HOST")?,
            hosts: number("CUTOVER_HOSTS")?,
        })
    }

    /// Every n-th, so that the tests of one subject, which take alike long, are spread.
    fn of<'a>(&self, names: &'a [String]) -> Vec<&'a String> {
        names.iter().skip(self.host - 1).step_by(self.hosts).collect()
    }
}

/// Copies to `staged` what every test reads, and links what tests copy for themselves: a disk is large, and none starts
/// a guest on the original.
fn stage(images: &Path, staged: &Path) -> Result<()> {
    fs::create_dir(staged)?;
    copy(&images.join("micro"), staged)?;
    symlink(images.join("debian"), staged.join("debian"))?;
    Ok(())
}

/// Copies a file or directory into `directory`, without the holes in it.
pub fn copy(from: &Path, directory: &Path) -> Result<()> {
    process::run(
        Command::new("cp")
            .args(["--recursive", "--sparse=always", "--preserve=mode"])
            .args([from, directory]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_share_the_tests_without_leaving_one_out() {
        let names: Vec<String> = ["a", "b", "c", "d", "e"].map(str::to_owned).into();
        let mut shared: Vec<_> = (1..=2).flat_map(|host| Share { host, hosts: 2 }.of(&names)).collect();
        shared.sort();
        assert_eq!(shared, names.iter().collect::<Vec<_>>());
        assert_eq!(Share { host: 1, hosts: 1 }.of(&names).len(), names.len());
    }
}
