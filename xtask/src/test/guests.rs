//! The part of a test run that happens where guests can run: staging the images and running the test binaries.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use tempfile::TempDir;

use super::libtest::{self, Tally};
use crate::{process, ui};

/// Name of the hidden task that does this.
pub const COMMAND: &str = "run-guest-tests";

/// A file system in memory, where disks, sockets and shared memory of guests work at full speed.
const MEMORY_FILE_SYSTEM: &str = "/dev/shm";

/// Which hosts tests need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Setting {
    /// Any host.
    Any,
    /// One that was started after that of others, to go on with what they left.
    Later,
    /// Two that are joined by a network.
    Joined,
}

impl Setting {
    /// That of a test, by what its name contains.
    pub fn of(test: &str) -> Self {
        if test.contains("on_a_later_host") {
            Self::Later
        } else if test.contains("between_hosts") {
            Self::Joined
        } else {
            Self::Any
        }
    }

    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Later => "later",
            Self::Joined => "joined",
        }
    }
}

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
    /// The program by which a test runs others on another host
    #[arg(long)]
    on_other_host: PathBuf,
    /// Run the tests for which this host is
    #[arg(long, value_enum, default_value = "any")]
    setting: Setting,
    /// Run only the tests whose names contain this
    #[arg(long)]
    filter: Option<String>,
    /// Show at once what tests print
    #[arg(long)]
    show: bool,
    /// The test binaries
    #[arg(required = true)]
    binaries: Vec<PathBuf>,
}

/// Runs the tests and returns 0 if all passed, 1 if not. Of joined hosts only the first one does; the others run
/// programs for it, for as long as they live.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let joined = arguments.setting == Setting::Joined;
    let share = Share::from_environment()?;
    if joined && share.host > 1 {
        let error = Command::new(&arguments.on_other_host).arg("serve").exec();
        return Err(error).with_context(|| format!("cannot run {}", arguments.on_other_host.display()));
    }
    let share = if joined { Share { host: 1, hosts: 1 } } else { share };
    let scratch = TempDir::with_prefix_in("cutover-", MEMORY_FILE_SYSTEM)
        .with_context(|| format!("cannot create a directory in {MEMORY_FILE_SYSTEM}"))?;
    let guests = if joined {
        // Where every host has them.
        arguments.guests.clone()
    } else {
        let guests = scratch.path().join("guests");
        ui::step("copying the guest images to memory", || {
            stage(&arguments.guests, &guests)
        })?;
        guests
    };
    let mut total = Tally::default();
    for binary in &arguments.binaries {
        let mut names = libtest::names(binary, arguments.filter.as_deref())?;
        names.retain(|name| Setting::of(name) == arguments.setting);
        let names = share.of(&names);
        if names.is_empty() {
            continue;
        }
        let mut command = Command::new(binary);
        if joined {
            // There is one other host, and tests switch it off.
            command.arg("--test-threads=1");
        }
        if arguments.show {
            command.arg("--nocapture");
        }
        let tally = libtest::run(
            command
                .arg("--exact")
                .args(names)
                .env("CUTOVER_BIN", &arguments.monitor)
                .env("CUTOVER_GUESTS", &guests)
                .env("CUTOVER_CLIENTS", &arguments.clients)
                .env("CUTOVER_LEGACY", &arguments.legacy)
                .env("CUTOVER_ON_OTHER_HOST", &arguments.on_other_host)
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
    fn tests_are_told_apart_by_the_hosts_they_need() {
        assert_eq!(
            Setting::of("snapshot::travel::a_guest_goes_on_on_a_later_host"),
            Setting::Later
        );
        assert_eq!(Setting::of("migration::between_hosts::a_guest_moves"), Setting::Joined);
        assert_eq!(Setting::of("boot::a_guest_boots"), Setting::Any);
        for setting in Setting::value_variants() {
            let value = setting.to_possible_value().expect("none is hidden");
            assert_eq!(value.get_name(), setting.name());
        }
    }

    #[test]
    fn hosts_share_the_tests_without_leaving_one_out() {
        let names: Vec<String> = ["a", "b", "c", "d", "e"].map(str::to_owned).into();
        let mut shared: Vec<_> = (1..=2).flat_map(|host| Share { host, hosts: 2 }.of(&names)).collect();
        shared.sort();
        assert_eq!(shared, names.iter().collect::<Vec<_>>());
        assert_eq!(Share { host: 1, hosts: 1 }.of(&names).len(), names.len());
    }
}
