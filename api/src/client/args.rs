//! The shape of `cutover vm …`, and its help texts.

// Documentation here is help text, in which brackets mean a default.
#![allow(rustdoc::broken_intra_doc_links)]

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::SignedDuration;

use crate::runtime_dir::{NameError, VmName};
use crate::server::v1::types::{POWER_TIMEOUT_MAX_MS, StateV1};

/// Longest time limit that can be asked for.
const TIMEOUT_MAX: Duration = Duration::from_millis(POWER_TIMEOUT_MAX_MS);

/// `cutover vm`.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct VmArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: VmCommand,
}

/// What to do with VMs.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// List the VMs of this user that run and listen
    #[command(after_help = LIST_HELP)]
    List(AskArgs),
    /// Tell what VMs consist of and what they are doing
    #[command(after_help = INFO_HELP)]
    Info(VmsArgs),
    /// Stop the vCPUs and devices of VMs until they are resumed
    #[command(after_help = PAUSE_HELP)]
    Pause(VmsArgs),
    /// Let paused VMs go on
    #[command(after_help = RESUME_HELP)]
    Resume(VmsArgs),
    /// Have VMs back that were handed over to another monitor, if it is certain that they do not run there
    #[command(after_help = RECLAIM_HELP)]
    Reclaim(VmsArgs),
    /// Press the power buttons of VMs, and end by force those that are still there after a time
    #[command(after_help = SHUTDOWN_HELP)]
    Shutdown(DownArgs),
    /// Shut VMs down and start them anew; those that do not go down in time are cycled
    #[command(after_help = REBOOT_HELP)]
    Reboot(DownArgs),
    /// End VMs by force and start them anew
    #[command(after_help = CYCLE_HELP)]
    Cycle(PowerArgs),
    /// End VMs by force
    #[command(after_help = DESTROY_HELP)]
    Destroy(PowerArgs),
    /// Show what VMs use: processors, memory, disks, network
    #[command(after_help = STATS_HELP)]
    Stats(StatsArgs),
    /// Follow what happens to VMs
    #[command(after_help = EVENTS_HELP)]
    Events(EventsArgs),
    /// Connect this terminal with the console of a VM
    #[command(after_help = CONSOLE_HELP)]
    Console(ConsoleArgs),
    /// Print the metrics of a VM in Prometheus's text format
    #[command(after_help = METRICS_HELP)]
    Metrics(MetricsArgs),
}

/// Which VMs, and how to ask them.
#[derive(Clone, Debug, Args)]
pub struct VmsArgs {
    /// Which VMs.
    #[command(flatten)]
    pub vms: Targets,

    /// How to ask them.
    #[command(flatten)]
    pub ask: AskArgs,
}

/// Which VMs.
#[derive(Clone, Debug, Args)]
pub struct Targets {
    /// Names of VMs, or paths of their API sockets (with a '/')
    #[arg(value_name = "VM", required_unless_present = "all")]
    pub vms: Vec<VmRef>,

    /// All VMs that `cutover vm list` shows
    #[arg(long, conflicts_with = "vms")]
    pub all: bool,
}

/// How VMs are asked, and how their answers are shown.
#[derive(Clone, Debug, Args)]
pub struct AskArgs {
    /// Print a JSON object for each VM, on a line of its own
    #[arg(long)]
    pub json: bool,

    /// How long to wait for the answer of each VM
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "10s")]
    pub timeout: Duration,
}

/// Power operations that take effect at once.
#[derive(Clone, Debug, Args)]
pub struct PowerArgs {
    /// Which VMs, and how to ask them.
    #[command(flatten)]
    pub vms: VmsArgs,

    /// Return when the VM has accepted, without waiting until it is done
    #[arg(long)]
    pub no_wait: bool,
}

/// Power operations that leave it to the guest.
#[derive(Clone, Debug, Args)]
pub struct DownArgs {
    /// Which VMs.
    #[command(flatten)]
    pub vms: Targets,

    /// How long the guest may take before it is ended by force
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "30s")]
    pub timeout: Duration,

    /// Return when the VM has accepted, without waiting until it is done
    #[arg(long)]
    pub no_wait: bool,

    /// Print a JSON object for each VM, on a line of its own
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `cutover vm stats`.
#[derive(Clone, Debug, Args)]
pub struct StatsArgs {
    /// Which VMs, and how to ask them.
    #[command(flatten)]
    pub vms: VmsArgs,

    /// Show what is used per second, again and again every TIME [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = interval, num_args = 0..=1, default_missing_value = "1s", require_equals = true)]
    pub watch: Option<Duration>,
}

/// Arguments of `cutover vm events`.
#[derive(Clone, Debug, Args)]
pub struct EventsArgs {
    /// Which VMs, and how to ask them.
    #[command(flatten)]
    pub vms: VmsArgs,

    /// Begin with the event after number N; 0 shows all that are kept [default: only what happens from now on]
    #[arg(long, value_name = "N")]
    pub since: Option<u64>,

    /// End when every VM is in this state, or has been since the event of --since
    #[arg(long, value_name = "STATE")]
    pub until: Option<StateV1>,
}

/// Arguments of `cutover vm console`.
#[derive(Clone, Debug, Args)]
pub struct ConsoleArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub vm: VmRef,

    /// How long to wait for the VM's answer
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "10s")]
    pub timeout: Duration,
}

/// Arguments of `cutover vm metrics`.
#[derive(Clone, Debug, Args)]
pub struct MetricsArgs {
    /// Name of the VM, or path of its API socket
    #[arg(value_name = "VM")]
    pub vm: VmRef,

    /// How long to wait for the VM's answer
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "10s")]
    pub timeout: Duration,
}

/// How a person names a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmRef {
    /// By its name in the runtime directory.
    Name(VmName),
    /// By its socket.
    Socket(PathBuf),
}

impl FromStr for VmRef {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.contains('/') {
            Ok(Self::Socket(text.into()))
        } else {
            text.parse().map(Self::Name)
        }
    }
}

/// Reads a time: `500ms`, `30s`, `1m30s`, or a number of seconds.
///
/// # Errors
/// It is none, or longer than a day.
pub fn timeout(text: &str) -> Result<Duration, String> {
    let duration = match text.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => text
            .parse::<SignedDuration>()
            .ok()
            .and_then(|time| time.try_into().ok()),
    };
    match duration {
        Some(duration) if duration <= TIMEOUT_MAX => Ok(duration),
        Some(_) => Err("it is longer than a day".to_owned()),
        None => Err("write a time such as 500ms, 30s or 1m30s".to_owned()),
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    match timeout(text)? {
        Duration::ZERO => Err("it has to be longer than nothing".to_owned()),
        interval => Ok(interval),
    }
}

/// Shown with `cutover vm --help`.
pub const VM_HELP: &str = "\
A VM listens for this command if it was started with `cutover run --name NAME --api` or `cutover vmm --id NAME`. It is
named by that name, which is looked up in $XDG_RUNTIME_DIR/cutover (/run/cutover for root), or by the path of its API
socket, which has a '/' in it. $CUTOVER_RUNTIME_DIR names another directory.

Examples:
  What runs?
    cutover vm list

  End two VMs, giving their guests a minute:
    cutover vm shutdown web db --timeout 1m

  Pause everything, and go on:
    cutover vm pause --all && cutover vm resume --all

Exit codes:
  0  every VM did as asked
  1  no VM did, or this command failed
  2  the command line is wrong
  6  some VMs did, some did not";

const LIST_HELP: &str = "\
A VM that does not answer in time is listed without what it would have said. The sockets of VMs that are gone are
removed.

Examples:
  cutover vm list
  cutover vm list --json | jq -r 'select(.result.state == \"paused\") | .vm'";

const INFO_HELP: &str = "\
Examples:
  cutover vm info web
  cutover vm info --all --json | jq -r '[.vm, .result.pid] | @tsv'";

const PAUSE_HELP: &str = "\
A paused guest does not notice the time that passes, apart from its clocks.

Examples:
  cutover vm pause web
  cutover vm pause --all";

const RESUME_HELP: &str = "\
Examples:
  cutover vm resume web db";

const RECLAIM_HELP: &str = "\
A VM whose destination was lost just when it was told to run it stands still here, because it may run
there: two of it would ruin its disks. This command is for whoever has looked, and knows that it does
not. It is paused then. If it runs there, `cutover vm destroy` ends the one here.

Examples:
  cutover vm reclaim web && cutover vm resume web";

const SHUTDOWN_HELP: &str = "\
Examples:
  cutover vm shutdown web
  cutover vm shutdown --all --timeout 2m";

const REBOOT_HELP: &str = "\
The VM is built anew in the same process, from the same description; its name and socket stay.

Examples:
  cutover vm reboot web --timeout 1m";

const CYCLE_HELP: &str = "\
As if the power were cut and came back: what the guest has not written to its disks is lost.

Examples:
  cutover vm cycle web";

const DESTROY_HELP: &str = "\
As if the power were cut: what the guest has not written to its disks is lost.

Examples:
  cutover vm destroy web";

const STATS_HELP: &str = "\
Counters begin when the VM starts. With --watch, each line is what happened since the one before, per second; Ctrl-C
ends it.

Examples:
  cutover vm stats web
  cutover vm stats --all --watch
  cutover vm stats web --json --watch=5s";

const EVENTS_HELP: &str = "\
Every event has a number, 1 for the first of the VM's process. A connection that breaks is made again, beginning after
the last event seen; events that the VM no longer keeps are reported as a gap. The command ends when the VM does.

Examples:
  cutover vm events web
  cutover vm events web db --since 0 --json
  cutover vm events web --until paused && echo it is paused";

const CONSOLE_HELP: &str = "\
The VM's console has to be a socket: `cutover run … --serial socket=FILE`. It serves one client at a time.

Keys, on a terminal:
  Ctrl-A x       leave the console; the VM goes on
  Ctrl-A Ctrl-A  send Ctrl-A to the guest
  Ctrl-A h       show this list
  All other keys, Ctrl-C among them, go to the guest.

Examples:
  cutover vm console web
  echo reboot | cutover vm console ./vm.sock";

const METRICS_HELP: &str = "\
Examples:
  cutover vm metrics web
  cutover vm metrics web | grep ^cutover_vcpu";

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(line: &str) -> Result<VmCommand, clap::Error> {
        match Cli::try_parse_from(format!("cutover vm {line}").split(' '))?.command {
            Command::Vm(args) => Ok(args.command),
            other => panic!("not about VMs: {other:?}"),
        }
    }

    #[test]
    fn vms_are_given_by_name_by_socket_or_all_at_once() {
        let VmCommand::Pause(args) = parse("pause web ./db.sock --timeout 2s --json").expect("valid") else {
            panic!("it is pause");
        };
        assert_eq!(
            args.vms.vms,
            [
                VmRef::Name("web".parse().expect("a name")),
                VmRef::Socket("./db.sock".into())
            ]
        );
        assert_eq!((args.ask.timeout, args.ask.json), (Duration::from_secs(2), true));
        let VmCommand::Resume(args) = parse("resume --all").expect("valid") else {
            panic!("it is resume");
        };
        assert!(args.vms.all && args.vms.vms.is_empty());
        for line in ["pause", "pause web --all", "pause we,b", "console", "console a b"] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn times_have_units_or_are_seconds() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("7", 7_000),
            ("24h", 86_400_000),
        ] {
            assert_eq!(timeout(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "soon", "-1s", "25h", "99999999999999999999"] {
            assert!(timeout(text).is_err(), "{text}");
        }
        assert!(interval("0s").is_err());
    }

    #[test]
    fn watching_has_an_interval_of_a_second_unless_another_is_given() {
        for (line, interval) in [
            ("stats web", None),
            ("stats --watch web", Some(1)),
            ("stats web --watch=5s", Some(5)),
        ] {
            let VmCommand::Stats(args) = parse(line).expect(line) else {
                panic!("it is stats");
            };
            assert_eq!(args.watch, interval.map(Duration::from_secs), "{line}");
        }
    }

    #[test]
    fn states_have_their_names_in_the_api() {
        let VmCommand::Events(args) = parse("events web --since 0 --until shutting_down").expect("valid") else {
            panic!("it is events");
        };
        assert_eq!((args.since, args.until), (Some(0), Some(StateV1::ShuttingDown)));
        assert!(parse("events web --until asleep").is_err());
    }
}
