//! Measures one bench and writes its samples to a file; `cargo xtask bench` runs it where virtual machines can run.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use cutover_tests::bench::{self, Bench, Options};

/// Measures one bench.
#[derive(Parser)]
struct Cli {
    /// Which one
    #[arg(value_enum)]
    bench: Bench,
    /// Measurements of each contestant, after one that is not counted
    #[arg(long)]
    runs: u32,
    /// The Firecracker program
    #[arg(long)]
    firecracker: Option<PathBuf>,
    /// The part of it to be measured, if it has any; all of it if none is named
    #[arg(long)]
    part: Option<String>,
    /// Where the samples go, one JSON object per line
    #[arg(long)]
    samples: PathBuf,
}

fn main() -> Result<()> {
    let Cli {
        bench,
        runs,
        firecracker,
        part,
        samples,
    } = Cli::parse();
    let mut out = File::create(&samples).with_context(|| format!("cannot create {}", samples.display()))?;
    let options = Options {
        runs,
        firecracker,
        part,
    };
    bench::run(bench, &options, &mut out)
}
