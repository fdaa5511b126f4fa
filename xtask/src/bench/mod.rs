//! `cargo xtask bench`: what Cutover costs beside its peers, measured in one run on one machine.
//!
//! ```text
//!  catalogue: what each bench measures ─┐
//!  bench binary, where guests can run ──┴─ samples ─► report (medians, ratios, bars) ─► table | JSON | plot
//! ```
//! The bench binary (`tests/src/bench`) measures; everything about figures is here. A new bench is an entry of the
//! [`catalogue`] and a list of contestants there.
//!
//! In a nested host, whose speed depends on whatever else its machine does, time is counted in instructions, one a
//! nanosecond: figures repeat within a few percent.

mod catalogue;
mod plot;
mod report;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use tempfile::TempDir;

use self::catalogue::{BENCHES, Bench};
use self::report::{Clock, Report, Sample};
use crate::workspace::{Workspace, cargo};
use crate::{guest, host, setup, test, ui};

/// Room for the staged images, and for the guests that are alive at the same time.
const HOST_MEMORY_MIB: u32 = 8192;

/// How long a part of a bench may say nothing before its host is taken for hung: some times what a measurement takes.
const PART_SILENCE_MAX: Duration = Duration::from_secs(600);

/// A file system in memory, so that nothing measured waits for a disk.
const MEMORY_FILE_SYSTEM: &str = "/dev/shm";

/// What to measure, and where the results go.
#[derive(Args)]
pub struct Arguments {
    /// Which benches; all of them if none is named
    #[arg(value_name = "BENCH", value_parser = BENCHES.map(|bench| bench.name))]
    benches: Vec<String>,
    /// Measurements of each contestant, after one that is not counted; medians are reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// A Firecracker program to measure as well
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Print JSON, with every single value, instead of tables
    #[arg(long)]
    json: bool,
    /// Draw each bench as DIRECTORY/bench-NAME.svg; the default is `bench` in the target folder
    #[arg(long, value_name = "DIRECTORY")]
    plots: Option<PathBuf>,
}

/// Measures, prints and draws.
pub fn bench(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    setup::ensure_packages()?;
    let plots = arguments
        .plots
        .clone()
        .unwrap_or_else(|| workspace.target.join("bench"));
    fs::create_dir_all(&plots).with_context(|| format!("cannot create {}", plots.display()))?;
    let setting = Setting::prepare(workspace, arguments)?;
    let chosen = BENCHES
        .iter()
        .filter(|bench| arguments.benches.is_empty() || arguments.benches.iter().any(|name| name == bench.name));
    let mut reports = Vec::new();
    for bench in chosen {
        let report = Report::new(bench, setting.clock, setting.measure(bench)?);
        plot::draw(&report, &plots.join(format!("bench-{}.svg", bench.name)))?;
        if !arguments.json {
            println!("{report}");
        }
        reports.push(report);
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    }
    ui::say(format_args!("plots are in {}", plots.display()));
    Ok(())
}

/// Everything that is the same for all benches of a run.
struct Setting<'a> {
    workspace: &'a Workspace,
    clock: Clock,
    monitor: PathBuf,
    bench_binary: PathBuf,
    runs: u32,
    firecracker: Option<PathBuf>,
}

impl<'a> Setting<'a> {
    /// Builds programs and images.
    fn prepare(workspace: &'a Workspace, arguments: &Arguments) -> Result<Self> {
        let firecracker = arguments.firecracker.as_deref().map(|path| {
            let path = fs::canonicalize(path);
            path.context("cannot find the Firecracker program")
        });
        let monitor = test::build_monitor(workspace)?;
        let built = workspace.build(cargo().args(["build", "--release", "--package=cutover-tests", "--bin=bench"]))?;
        let bench_binary = built
            .into_iter()
            .next()
            .context("cargo built no program called bench")?
            .path;
        guest::micro::build(workspace)?;
        guest::debian::build(workspace)?;
        Ok(Self {
            workspace,
            clock: if host::machine_runs_guests().is_ok() {
                Clock::Wall
            } else {
                Clock::Instructions
            },
            monitor,
            bench_binary,
            runs: arguments.runs,
            firecracker: firecracker.transpose()?,
        })
    }

    /// Runs one bench where guests can run, and returns what it measured: of a part that failed, what it had measured until
    /// then.
    fn measure(&self, bench: &Bench) -> Result<Vec<Sample>> {
        ui::say(format_args!("bench {}: {}", bench.name, bench.title));
        if bench.parts.is_empty() {
            let (samples, outcome) = self.measure_part(bench, None)?;
            return outcome.map(|()| samples);
        }
        let mut all = Vec::new();
        for part in bench.parts {
            ui::say(format_args!("bench {}: {part}", bench.name));
            let (samples, outcome) = self.measure_part(bench, Some(part))?;
            if let Err(error) = outcome {
                ui::say(format_args!("{part} is not complete: {error:#}"));
            }
            all.extend(samples);
        }
        Ok(all)
    }

    /// What a bench, or a part of it, has measured, and whether it came to its end.
    fn measure_part(&self, bench: &Bench, part: Option<&str>) -> Result<(Vec<Sample>, Result<()>)> {
        // The folder that a nested host shares with this machine.
        let shared = self.workspace.target.join("host");
        fs::create_dir_all(&shared)?;
        let directory = TempDir::with_prefix_in("bench-", &shared)?;
        let samples = directory.path().join("samples");
        let options = host::Options {
            memory_mib: HOST_MEMORY_MIB,
            icount: true,
            exit_after_injection: bench.many_interrupts,
            silence_max: part.map(|_| PART_SILENCE_MAX),
            ..host::Options::default()
        };
        let code = host::run_where_guests_run(self.workspace, &options, &self.command(bench, part, &samples));
        let outcome = code.and_then(|code| {
            ensure!(code == 0, "bench {} ended with exit code {code}", bench.name);
            Ok(())
        });
        let text = fs::read_to_string(&samples).with_context(|| format!("cannot read {}", samples.display()));
        match (text, outcome) {
            (Ok(text), outcome) => Ok((report::parse_samples(&text)?, outcome)),
            // It has not even begun.
            (Err(_), Err(error)) => Ok((Vec::new(), Err(error))),
            (Err(error), Ok(())) => Err(error),
        }
    }

    fn command(&self, bench: &Bench, part: Option<&str>, samples: &Path) -> Vec<OsString> {
        let variable = |name: &str, value: &Path| {
            let mut assignment = OsString::from(format!("{name}="));
            assignment.push(value);
            assignment
        };
        let mut command = vec![
            "env".into(),
            variable("CUTOVER_BIN", &self.monitor),
            variable("CUTOVER_GUESTS", &self.workspace.guests()),
            variable("CUTOVER_SCRATCH", Path::new(MEMORY_FILE_SYSTEM)),
            self.bench_binary.clone().into(),
            bench.name.into(),
            "--runs".into(),
            self.runs.to_string().into(),
            "--samples".into(),
            samples.into(),
        ];
        if let Some(part) = part {
            command.extend(["--part".into(), part.into()]);
        }
        if let Some(firecracker) = &self.firecracker {
            command.extend(["--firecracker".into(), firecracker.into()]);
        }
        command
    }
}
