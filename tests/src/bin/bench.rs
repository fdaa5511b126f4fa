//! Measures one bench and writes its samples to a file; `cargo xtask bench` runs it where virtual machines can run.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use cutover_tests::bench::{self, Bench, Options, Turns};

/// Measures one bench.
#[derive(Parser)]
struct Cli {
    /// Which one
    #[arg(value_enum)]
    bench: Bench,
    #[command(flatten)]
    schedule: Schedule,
    /// The Firecracker program
    #[arg(long)]
    firecracker: Option<PathBuf>,
    /// Where the samples go, one JSON object per line
    #[arg(long)]
    samples: PathBuf,
}

/// What is measured how often.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct Schedule {
    /// Measurements of each contestant, after one that is not counted
    #[arg(long)]
    runs: Option<u32>,
    /// A single measurement of this contestant, the first being 0; no samples if there are not so many
    #[arg(long)]
    contestant: Option<usize>,
}

fn main() -> Result<()> {
    let Cli {
        bench,
        schedule,
        firecracker,
        samples,
    } = Cli::parse();
    let mut out = File::create(&samples).with_context(|| format!("cannot create {}", samples.display()))?;
    let turns = match schedule.contestant {
        Some(contestant) => Turns::Only(contestant),
        None => Turns::All {
            runs: schedule.runs.context("clap requires one of the two")?,
        },
    };
    bench::run(bench, &Options { turns, firecracker }, &mut out)
}
