//! Everything a person or program talks to: the command line, the REST APIs, their clients.
//!
//! ```text
//!  argv ── cli ──► RunArgs ── config ──► Plan ── run ──► cutover_vmm::Vmm ──► Exit ── exit ──► exit code
//!              └─► check: HostFacts ──► findings
//! ```

pub mod check;
pub mod cli;
pub mod client;
pub mod config;
pub mod exit;
pub mod group_command;
mod jail_command;
pub mod log;
mod member;
pub mod metrics;
pub mod migration_command;
pub mod options;
pub mod plan;
pub mod run;
pub mod runtime_dir;
pub mod server;
mod signals;
pub mod snapshot_command;
mod text;
mod tls_dir;
pub mod vmm;

use std::{env, io};

use clap::{CommandFactory, Parser};
use cli::{Cli, Command};
use exit::ExitStatus;

/// The `cutover` program: reads the command line of this process, and does what it says.
pub fn main() -> ExitStatus {
    cutover_vmm::seccomp::prepare_process();
    let arguments = cli::arguments(env::args_os());
    // Not in `cutover jail`, where it would be made outside of the jail.
    if cli::is_about_a_new_vm(&arguments) {
        cutover_vmm::begin_vm();
    }
    carry_out(Cli::parse_from(arguments).command)
}

fn carry_out(command: Command) -> ExitStatus {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Vmm(args) => vmm::vmm(&args),
        Command::Vm(args) => client::run(&args),
        Command::Snapshot(args) => snapshot_command::run(&args),
        Command::Migrate(args) => migration_command::migrate(&args),
        Command::Receive(args) => migration_command::receive(&args),
        Command::Coordinator(args) => group_command::coordinator(&args),
        Command::Backup(args) => group_command::backup(&args),
        Command::Standby(args) => group_command::standby(&args),
        Command::Group(args) => group_command::group(&args),
        Command::Jail(args) => jail_command::run(*args),
        Command::Tls(args) => migration_command::tls(&args),
        Command::Check(args) => check::check(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "cutover", &mut script);
            exit::after_printing(&script, &mut io::stdout())
        }
    }
}
