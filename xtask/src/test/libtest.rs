//! Running test binaries: their output is passed through line by line, and what it says about the outcome is kept.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::{process, ui};

/// What came out of one or several test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    failed: Vec<String>,
    ignored: Vec<String>,
    /// Binaries that ended otherwise than by reporting failed tests: they did not build, crashed or were killed.
    broken: Vec<String>,
}

impl Tally {
    /// Adds another outcome to this one.
    pub fn add(&mut self, other: Self) {
        self.failed.extend(other.failed);
        self.ignored.extend(other.ignored);
        self.broken.extend(other.broken);
    }

    /// Whether every test ran and passed. A test that is not run proves nothing, so an ignored one is a failure.
    pub fn succeeded(&self) -> bool {
        *self == Self::default()
    }

    /// Says what did not pass, and how to run just that.
    pub fn report(&self) {
        for name in &self.failed {
            ui::say(format_args!("FAILED {name}; to run just this: cargo xtask test {name}"));
        }
        for name in &self.ignored {
            ui::say(format_args!("IGNORED {name}: no test may be skipped"));
        }
        for what in &self.broken {
            ui::say(format_args!("BROKEN {what}"));
        }
    }

    fn read_line(&mut self, line: &str) {
        let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) else {
            return;
        };
        if outcome == "FAILED" {
            self.failed.push(name.to_owned());
        } else if outcome.starts_with("ignored") {
            self.ignored.push(name.to_owned());
        }
    }
}

/// Runs a test binary (or cargo, which runs several), passing its output through.
pub fn run(command: &mut Command) -> Result<Tally> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let output = child.stdout.take().context("the test binary has no output")?;
    let mut tally = Tally::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        tally.read_line(&line);
    }
    let status = child.wait()?;
    if !status.success() && tally.failed.is_empty() {
        tally
            .broken
            .push(format!("{}: {status}", command.get_program().display()));
    }
    Ok(tally)
}

/// The tests of a binary whose names contain `filter`. Runs none.
pub fn names(binary: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    let list = process::read(Command::new(binary).args(["--list", "--format=terse"]).args(filter))?;
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(output: &str) -> Tally {
        let mut tally = Tally::default();
        output.lines().for_each(|line| tally.read_line(line));
        tally
    }

    #[test]
    fn a_run_succeeds_only_if_every_test_ran_and_passed() {
        assert!(tally("test boot::one ... ok\ntest result: ok. 1 passed; 0 failed").succeeded());
        assert!(!tally("test boot::one ... FAILED").succeeded());
        assert!(!tally("test boot::one ... ignored, needs luck").succeeded());
    }

    #[test]
    fn failed_and_ignored_tests_are_known_by_name() {
        let tally = tally("test a::b ... ok\ntest a::c ... FAILED\ntest d - should panic ... ok\ntest e ... ignored\n");
        assert_eq!(tally.failed, ["a::c"]);
        assert_eq!(tally.ignored, ["e"]);
    }

    #[test]
    fn a_binary_that_dies_without_a_verdict_is_no_success() {
        let tally = run(Command::new("sh").args(["-c", "echo 'test x ... ok'; exit 101"])).unwrap();
        assert_eq!(tally.broken.len(), 1);
        assert!(!tally.succeeded());
    }
}
