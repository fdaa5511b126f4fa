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
    /// Where the samples go, one JSON object per line
    #[arg(long)]
    samples: PathBuf,
}

fn main() -> Result<()> {
    let Cli {
        bench,
        runs,
        firecracker,
        samples,
    } = Cli::parse();
    let mut out = File::create(&samples).with_context(|| format!("cannot create {}", samples.display()))?;
    bench::run(bench, &Options { runs, firecracker }, &mut out)
}
