//! The half of `cargo xtask bench` that runs where virtual machines can run.
//!
//! Starts the same guest under Cutover and under its peers, measures, and writes one [`Sample`] per line as JSON. What
//! is made of the samples (medians, ratios, plots) is the other half's business.
//!
//! A bench is a list of [`Contestant`]s; how often and in which order they are measured is the same for all benches.

mod api;
mod awake;
mod block;
mod boot;
mod migration;
mod net;
mod peers;
mod protect;
mod qemu_monitor;
mod resident;
mod snapshot;
mod stage;
mod tools;

use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use self::stage::Stage;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bench {
    /// Time from exec to user space, and memory beyond the guest's.
    Boot,
    /// Time until the API answers, to pause and to resume, and memory with the API.
    Api,
    /// Throughput of a disk.
    Block,
    /// Throughput of a network interface.
    Net,
    /// The pause of snapshots.
    Snapshot,
    /// Time to a restored guest's first sign of life.
    Restore,
    /// Live migration.
    Migration,
    /// Protection of a group.
    Protect,
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Measurements of each contestant, after one that is not counted.
    pub runs: u32,
    /// The Firecracker program, to be measured where a bench has a place for it.
    pub firecracker: Option<PathBuf>,
    /// The part of the bench to be measured; all of it if none is named.
    pub part: Option<String>,
}

/// One value that was measured.
#[derive(Debug, Serialize)]
struct Sample<'a> {
    contestant: &'a str,
    /// What it is, with its unit as last word.
    metric: &'a str,
    value: f64,
}

/// What one measurement came to: metrics and their values.
type Values = Vec<(&'static str, f64)>;

/// One side of a comparison.
struct Contestant<'a> {
    name: &'static str,
    /// Measures once.
    measure: Box<dyn Fn() -> Result<Values> + 'a>,
}

/// Runs `bench` and writes its samples to `out`.
///
/// # Errors
/// A contestant did not do its work, or `out` takes no more.
pub fn run(bench: Bench, options: &Options, out: &mut impl Write) -> Result<()> {
    match bench {
        Bench::Boot => {
            let stage = Stage::new(options.firecracker.as_deref())?;
            take_turns(&boot::contestants(&stage), options.runs, out)
        }
        Bench::Api => {
            let stage = Stage::new(options.firecracker.as_deref())?;
            take_turns(&api::contestants(&stage), options.runs, out)
        }
        Bench::Block => take_turns(&block::contestants(), options.runs, out),
        Bench::Net => take_turns(&net::contestants(), options.runs, out),
        Bench::Snapshot => {
            let stage = Stage::new(options.firecracker.as_deref())?;
            take_turns(&snapshot::makers(&stage), options.runs, out)
        }
        Bench::Restore => {
            let stage = Stage::new(options.firecracker.as_deref())?;
            take_turns(&snapshot::restorers(&stage), options.runs, out)
        }
        Bench::Migration => {
            let stage = Stage::new(options.firecracker.as_deref())?;
            take_turns(
                &migration::contestants(&stage, options.part.as_deref())?,
                options.runs,
                out,
            )
        }
        // Its guests are long warm when it begins to measure.
        Bench::Protect => measure_turns(&protect::contestants(&protect::Turn::default()), options.runs, out),
    }
}

/// Measures the contestants in turns, so that a drift of the machine hits all alike. The first turn warms the page
/// cache and the emulator up and does not count.
fn take_turns(contestants: &[Contestant], runs: u32, out: &mut impl Write) -> Result<()> {
    for contestant in contestants {
        contestant.measure("warm-up")?;
    }
    measure_turns(contestants, runs, out)
}

/// The turns that count.
fn measure_turns(contestants: &[Contestant], runs: u32, out: &mut impl Write) -> Result<()> {
    for turn in 1..=runs {
        for contestant in contestants {
            contestant.sample(&format!("run {turn} of {runs}"), out)?;
        }
    }
    Ok(())
}

impl Contestant<'_> {
    /// Measures once and tells the values.
    fn measure(&self, label: &str) -> Result<Values> {
        let name = self.name;
        let values = (self.measure)().with_context(|| format!("cannot measure {name}"))?;
        eprintln!("{label}: {name}: {}", in_words(&values));
        Ok(values)
    }

    /// Measures once and writes the values to `out`.
    fn sample(&self, label: &str, out: &mut impl Write) -> Result<()> {
        let contestant = self.name;
        for (metric, value) in self.measure(label)? {
            let sample = Sample {
                contestant,
                metric,
                value,
            };
            serde_json::to_writer(&mut *out, &sample)?;
            out.write_all(b"\n").context("cannot write a sample")?;
        }
        Ok(())
    }
}

fn in_words(values: &[(&'static str, f64)]) -> String {
    let words: Vec<String> = values
        .iter()
        .map(|(metric, value)| format!("{metric} {value:.2}"))
        .collect();
    words.join(", ")
}

/// Reads up to and including `marker`.
fn read_until(console: &mut impl Read, marker: &str) -> Result<()> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let length = console.read(&mut buffer).context("cannot read the console")?;
        if length == 0 {
            bail!(
                "the console ended before '{marker}', after: {}",
                String::from_utf8_lossy(&seen)
            );
        }
        seen.extend_from_slice(&buffer[..length]);
        if seen.windows(marker.len()).any(|window| window == marker.as_bytes()) {
            return Ok(());
        }
    }
}

fn mib(bytes: u64) -> f64 {
    // Exact up to 2^53 bytes.
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use cutover_guest::USER_SPACE_MARKER;

    use super::*;

    #[test]
    fn contestants_take_turns_and_the_first_turn_does_not_count() {
        let order = RefCell::new(Vec::new());
        let contestant = |name: &'static str, value: f64| Contestant {
            name,
            measure: Box::new({
                let order = &order;
                move || {
                    order.borrow_mut().push(name);
                    Ok(vec![("speed_mib_s", value)])
                }
            }),
        };
        let mut out = Vec::new();
        take_turns(&[contestant("a", 1.0), contestant("b", 2.5)], 2, &mut out).unwrap();
        assert_eq!(*order.borrow(), ["a", "b", "a", "b", "a", "b"]);
        let line = |name: &str, value: &str| {
            format!("{{\"contestant\":\"{name}\",\"metric\":\"speed_mib_s\",\"value\":{value}}}\n")
        };
        let turn = line("a", "1.0") + &line("b", "2.5");
        assert_eq!(String::from_utf8(out).unwrap(), turn.repeat(2));
    }

    #[test]
    fn the_marker_is_found_in_pieces_and_its_absence_is_an_error() {
        let mut pieces = b"noise guest: us".chain(&b"er space\nmore"[..]);
        read_until(&mut pieces, USER_SPACE_MARKER).unwrap();
        let error = read_until(&mut &b"Kernel panic"[..], USER_SPACE_MARKER).unwrap_err();
        assert!(error.to_string().contains("Kernel panic"), "{error}");
    }
}
