//! The half of `cargo xtask bench` that runs where virtual machines can run.
//!
//! Starts the same guest under Cutover and under its peers, measures, and writes one [`Sample`] per line as JSON. What
//! is made of the samples (medians, ratios, plots) is the other half's business.
//!
//! A bench is a list of [`Contestant`]s; how often and in which order they are measured is the same for all benches.

mod block;
mod boot;
mod net;
mod peers;
mod resident;
mod tools;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bench {
    /// Time from exec to user space, and memory beyond the guest's.
    Boot,
    /// Throughput of a disk.
    Block,
    /// Throughput of a network interface.
    Net,
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Measurements of each contestant, after one that is not counted.
    pub runs: u32,
    /// The Firecracker program, to be measured where a bench has a place for it.
    pub firecracker: Option<PathBuf>,
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
            let stage = boot::Stage::new(options.firecracker.as_deref())?;
            take_turns(&stage.contestants(), options.runs, out)
        }
        Bench::Block => take_turns(&block::contestants(), options.runs, out),
        Bench::Net => take_turns(&net::contestants(), options.runs, out),
    }
}

/// Measures the contestants in turns, so that a drift of the machine hits all alike. The first turn warms the page
/// cache and the emulator up and does not count.
fn take_turns(contestants: &[Contestant], runs: u32, out: &mut impl Write) -> Result<()> {
    for turn in 0..=runs {
        for contestant in contestants {
            let name = contestant.name;
            let values = (contestant.measure)().with_context(|| format!("cannot measure {name}"))?;
            let label = if turn == 0 {
                "warm-up".to_owned()
            } else {
                format!("run {turn} of {runs}")
            };
            eprintln!("{label}: {name}: {}", in_words(&values));
            if turn > 0 {
                for (metric, value) in values {
                    serde_json::to_writer(
                        &mut *out,
                        &Sample {
                            contestant: name,
                            metric,
                            value,
                        },
                    )?;
                    out.write_all(b"\n").context("cannot write a sample")?;
                }
            }
        }
    }
    Ok(())
}

fn in_words(values: &[(&'static str, f64)]) -> String {
    let words: Vec<String> = values
        .iter()
        .map(|(metric, value)| format!("{metric} {value:.2}"))
        .collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

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
}
