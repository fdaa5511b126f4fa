//! `cargo xtask sim`: groups of VMs on made-up hosts, with faults by seed (see `cluster/src/sim/`).

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::process;
use crate::workspace::{Workspace, cargo};

/// Optimized without the rest: the simulation is what takes the time.
const OPTIMIZED: &str = "profile.dev.package.cutover-cluster.opt-level=2";

/// What to simulate.
#[derive(Args)]
pub struct Arguments {
    /// The first seed; a run with the same seed is the same
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How many seeds, from that on; one that fails is shown with all that happened
    #[arg(long, value_name = "K", default_value_t = 1000)]
    seeds: u64,
    /// Members of the group
    #[arg(long, value_name = "M", default_value_t = 3)]
    members: u16,
    /// Hosts they are on, which back each other up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..))]
    hosts: u16,
    /// How long faults happen, in simulated seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
    /// What fails
    #[arg(long, value_enum, default_value = "storm")]
    faults: Faults,
    /// Instead, have groups of 1 to 1000 members take cuts, and show what these cost
    #[arg(long)]
    grow: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Faults {
    /// Nothing
    None,
    /// One host or process after the other: no member may be lost
    Successive,
    /// Anything at any time
    Storm,
}

impl Faults {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Successive => "successive",
            Self::Storm => "storm",
        }
    }
}

/// Simulates what `arguments` say.
pub fn sim(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let mut command = cargo();
    command.current_dir(&workspace.root);
    command.args(["run", "--quiet", "--package=cutover-cluster", "--features=simulation"]);
    command.args(["--bin=simulate", "--config", OPTIMIZED, "--"]);
    if arguments.grow {
        command.args(["--grow", "yes"]);
    } else {
        command.args(["--faults", arguments.faults.name()]);
        let numbers = [
            ("--seed", arguments.seed),
            ("--seeds", arguments.seeds),
            ("--members", arguments.members.into()),
            ("--hosts", arguments.hosts.into()),
            ("--seconds", arguments.seconds),
        ];
        for (name, number) in numbers {
            command.args([name.to_owned(), number.to_string()]);
        }
    }
    process::show(&mut command)
}
