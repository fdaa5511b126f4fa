//! Developer tasks of Cutover: guest images, nested hosts, tests, benches, demo, lint.
//!
//! `cargo xtask demo` and `cargo xtask test` are the two commands a newcomer needs; each does all of its set-up.

mod bench;
mod clients;
mod demo;
mod guest;
mod host;
mod initramfs;
mod lint;
mod process;
mod setup;
mod sim;
mod test;
mod ui;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::workspace::Workspace;

/// Developer tasks of Cutover.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Show Cutover at work, from nothing
    Demo {
        /// What to show
        #[arg(value_enum, default_value = "guest")]
        what: Shown,
    },
    /// Run all tests, or those whose names contain FILTER, with real guests
    Test {
        /// Part of the names of the tests to run
        filter: Option<String>,
    },
    /// Run the tests that repeat for long, or those whose names contain NAME
    Soak {
        /// Part of the names of the tests to run
        name: Option<String>,
    },
    /// Measure Cutover beside other monitors: all benches, or those named
    Bench(bench::Arguments),
    /// Check format, lints, documentation, dependency edges and, where cargo-deny is installed, dependencies
    Lint,
    /// Simulate groups of VMs with faults by seed
    Sim(sim::Arguments),
    /// Build guest images from distribution packages, as far as they are not built yet
    Guest {
        /// Which one
        #[arg(value_enum, default_value = "all")]
        image: GuestImage,
    },
    /// Open a shell, or run a command, where virtual machines can run
    ///
    /// On a machine without hardware virtualization that is a nested host: Linux under QEMU's emulator, which sees the
    /// machine's files (changes are discarded, except below $CUTOVER_OUT) and has a working /dev/kvm. On an
    /// interactive console, Ctrl-] x ends it by force.
    Host {
        #[command(flatten)]
        options: HostOptions,
        /// The command and its arguments; none for a shell
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    /// The part of `test` and `soak` that happens where guests can run
    #[command(name = test::guests::COMMAND, hide = true)]
    RunGuestTests(test::guests::Arguments),
    /// The part of `demo` that happens where guests can run
    #[command(name = demo::COMMAND, hide = true)]
    RunDemo(demo::Arguments),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shown {
    /// A Debian guest that boots: interactive on a terminal, otherwise a scripted visit
    Guest,
    /// Four guests on two hosts, of which one loses its power in the middle of their work
    Group,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GuestImage {
    /// A stock kernel with a small initramfs of test programs
    Micro,
    /// A whole distribution with systemd, services and workloads
    Debian,
    All,
}

#[derive(Args)]
struct HostOptions {
    /// Start this many nested hosts, joined by a network (host N has 10.77.0.N), and run the command on each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=100))]
    hosts: u8,
    /// The run is over when the first host is done: the others serve it, and start again when they are reset
    #[arg(long, requires = "hosts")]
    first_leads: bool,
    /// Count instructions instead of time, so that measurements repeat; always nested, with one processor
    #[arg(long)]
    icount: bool,
    /// Memory of each nested host in MiB
    #[arg(long, value_name = "MIB", default_value_t = host::Options::default().memory_mib)]
    memory: u32,
    /// Processors of each nested host
    #[arg(long, value_name = "N", default_value_t = host::Options::default().cpus)]
    cpus: u8,
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does `task` and returns the exit code of the command it was to run, or 0.
fn perform(task: Task) -> Result<i32> {
    match task {
        Task::Demo { what: Shown::Guest } => demo::demo(&Workspace::find()?),
        Task::Demo { what: Shown::Group } => test::demonstrate(&Workspace::find()?),
        Task::Test { filter } => test::test(&Workspace::find()?, filter.as_deref()),
        Task::Soak { name } => test::soak(&Workspace::find()?, name.as_deref()),
        Task::Bench(arguments) => bench::bench(&Workspace::find()?, &arguments).map(|()| 0),
        Task::Lint => lint::lint(&Workspace::find()?).map(|()| 0),
        Task::Sim(arguments) => sim::sim(&Workspace::find()?, &arguments).map(|()| 0),
        Task::Guest { image } => build_guests(image).map(|()| 0),
        Task::Host { options, command } => run_on_host(&options, &command),
        Task::RunGuestTests(arguments) => test::guests::run(&arguments),
        Task::RunDemo(arguments) => demo::run(&arguments),
    }
}

fn build_guests(image: GuestImage) -> Result<()> {
    let workspace = Workspace::find()?;
    setup::ensure_packages()?;
    if image != GuestImage::Debian {
        guest::micro::build(&workspace)?;
    }
    if image != GuestImage::Micro {
        guest::debian::build(&workspace)?;
    }
    Ok(())
}

fn run_on_host(options: &HostOptions, command: &[OsString]) -> Result<i32> {
    let workspace = Workspace::find()?;
    let nested = options.hosts > 1 || options.icount;
    let options = host::Options {
        hosts: options.hosts,
        memory_mib: options.memory,
        cpus: options.cpus,
        icount: options.icount,
        first_leads: options.first_leads,
        ..host::Options::default()
    };
    if nested {
        host::run_nested(&workspace, &options, command)
    } else {
        host::run_where_guests_run(&workspace, &options, command)
    }
}
