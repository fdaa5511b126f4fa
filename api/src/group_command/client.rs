//! `cutover group`: asks a coordinator, over its API.

// Documentation here is help text, in which brackets mean a default.
#![allow(rustdoc::broken_intra_doc_links)]

use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use cutover_migration::transport::Endpoint;
use hyper::Method;
use tokio::runtime;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::checkpoint::{self, CheckpointArgs, CheckpointsArgs};
use super::restore::{self, RestoreArgs};
use super::show;
use crate::client::{ClientError, Screen, Vm, timeout};
use crate::exit::{ExitStatus, report};
use crate::options::pair;
use crate::runtime_dir::{NAME_MAX, RuntimeDir, VmName};
use crate::server::groups::types::{
    FailoverV1, GroupMemberV1, GroupStateV1, GroupStatusV1, GroupTimingV1, GroupV1, IntervalV1,
};
use crate::text::escaped;

/// How often a group is looked at while it is waited for.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long the coordinator may take to answer.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long to wait for a group until it is told what is waited for.
pub(super) const TELL_AFTER: Duration = Duration::from_secs(5);
/// How long a group may take to recover.
const RECOVERY_MAX: Duration = Duration::from_secs(600);
/// The interval of a group that chooses its own has this for its longest, unless another is given.
const ADAPTIVE_MAX: Duration = Duration::from_millis(100);

/// Arguments of `cutover group`.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct GroupArgs {
    /// What to do.
    #[command(subcommand)]
    command: GroupCommand,

    /// The coordinator's socket [default: coordinator in the runtime directory]
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,

    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
}

/// What to do with groups.
#[derive(Debug, Subcommand)]
enum GroupCommand {
    /// Protect VMs together against the loss of hosts
    #[command(after_help = CREATE_HELP)]
    Create(Box<CreateArgs>),
    /// Show the groups of the coordinator
    #[command(after_help = LIST_HELP)]
    List,
    /// Show how groups and their members are doing
    #[command(after_help = STATUS_HELP)]
    Status(StatusArgs),
    /// Keep a cut of the whole group in files, while it runs
    #[command(after_help = checkpoint::HELP)]
    Checkpoint(CheckpointArgs),
    /// Start all VMs of a group from a checkpoint that is kept, and protect them again
    #[command(after_help = restore::HELP)]
    Restore(Box<RestoreArgs>),
    /// Show the checkpoints of a group that are kept
    #[command(after_help = checkpoint::LIST_HELP)]
    Checkpoints(CheckpointsArgs),
    /// Have a member fail, to see that the group survives that
    #[command(after_help = FAILOVER_HELP)]
    Failover(FailoverArgs),
    /// Protect VMs no more, which go on on their own
    #[command(after_help = STOP_HELP)]
    Stop(StopArgs),
}

/// Arguments of `cutover group create`.
#[derive(Debug, Args)]
struct CreateArgs {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = name)]
    name: String,

    /// A VM that runs, by its name, and where `cutover backup` listens on its host: vm1=tls://host1:7200
    #[arg(long = "member", value_name = "VM=HOST", value_parser = member, required = true)]
    members: Vec<GroupMemberV1>,

    /// Where `cutover backup` listens on a host that may keep standbys; those given first are preferred, and none
    /// keeps the standby of a member that it runs
    #[arg(long = "backup", value_name = "HOST", required = true)]
    backups: Vec<Endpoint>,

    #[command(flatten)]
    pace: PaceArgs,

    /// Return when the coordinator knows of the group, without waiting until it is protected
    #[arg(long)]
    no_wait: bool,
}

/// How often checkpoints are taken, and how long everything may take.
#[derive(Clone, Debug, Args)]
pub(super) struct PaceArgs {
    /// Time from one checkpoint to the next, 10ms to 60s; or adaptive: as short as pays, up to 100ms
    #[arg(long, value_name = "TIME", default_value = "adaptive")]
    interval: Interval,

    /// How often each process says that it is there
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "50ms", help_heading = "Patience")]
    heartbeat: Duration,

    /// How long a member may run after it said so, if the coordinator has answered
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "200ms", help_heading = "Patience")]
    lease: Duration,

    /// After what time a process of which nothing is heard has failed; longer than --lease
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "250ms", help_heading = "Patience")]
    suspicion: Duration,

    /// How long all members together may take for a cut
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "2s", help_heading = "Patience")]
    cut: Duration,

    /// How long it may take to send what has changed to a standby
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "10s", help_heading = "Patience")]
    ship: Duration,

    /// How long a member may take to go back
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "30s", help_heading = "Patience")]
    roll_back: Duration,
}

/// Arguments of `cutover group status`.
#[derive(Debug, Args)]
struct StatusArgs {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = name)]
    name: String,

    /// Show it again and again, every TIME [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = timeout, num_args = 0..=1, default_missing_value = "1s", require_equals = true)]
    watch: Option<Duration>,
}

/// Arguments of `cutover group failover`.
#[derive(Debug, Args)]
struct FailoverArgs {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = name)]
    name: String,

    /// The member that is to fail: its VM is ended, and its standby takes its place
    #[arg(long = "test", value_name = "MEMBER", required = true)]
    member: String,
}

/// Arguments of `cutover group stop`.
#[derive(Debug, Args)]
struct StopArgs {
    /// Name of the group
    #[arg(value_name = "GROUP", value_parser = name)]
    name: String,
}

/// How often a cut is taken, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval(IntervalV1);

impl FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "adaptive" {
            return Ok(Self(IntervalV1::Adaptive {
                max_ms: milliseconds(ADAPTIVE_MAX),
            }));
        }
        let interval = timeout(text).map_err(|reason| format!("{reason}, or adaptive"))?;
        Ok(Self(IntervalV1::Fixed {
            ms: milliseconds(interval),
        }))
    }
}

/// Reads the name of a group, which is part of a path in the API.
pub(super) fn name(text: &str) -> Result<String, String> {
    let name: VmName = text.parse().map_err(|_| {
        format!("a group's name has 1 to {NAME_MAX} letters, digits, '-', '_' or '.', the first a letter or digit")
    })?;
    Ok(name.to_string())
}

pub(super) fn member(text: &str) -> Result<GroupMemberV1, String> {
    let (name, host) = pair(text).map_err(|_| "write the name of the VM, '=', and its host".to_owned())?;
    let host: Endpoint = host.parse().map_err(|error| format!("{error}"))?;
    Ok(GroupMemberV1 {
        name,
        host: host.to_string(),
        restore: None,
    })
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Shown with `cutover group --help`.
pub const GROUP_HELP: &str = "\
The VMs of a group are checkpointed together, again and again, while they run; each has a standby on
another host. When one of them is lost, its standby takes its place and all others go back to the last
checkpoint, so that none of them, and nobody outside, ever sees that one was lost: what they send
leaves when it can no longer be undone.

Examples:
  Two VMs, each on one of two hosts and kept on the other:
    host1$ cutover backup --listen tls://host1:7200 &
    host2$ cutover backup --listen tls://host2:7200 &
    host1$ cutover coordinator --listen tls://host1:7100 --journal /var/lib/cutover/journal.db &
    host1$ cutover group create shop --member web=tls://host1:7200 --member db=tls://host2:7200 \\
               --backup tls://host1:7200 --backup tls://host2:7200
    host1$ cutover group status shop --watch

Exit codes:
  0  done
  1  it was refused, or has failed
  2  the command line is wrong";

const CREATE_HELP: &str = "\
Returns when the first checkpoint is permanent: from then on, the group survives the loss of any one
host. Ctrl-C leaves it to the coordinator.

Examples:
  A checkpoint every 100 ms:
    cutover group create shop --member web=tls://host1:7200 --member db=tls://host2:7200 \\
        --backup tls://host1:7200 --backup tls://host2:7200 --interval 100ms

  One VM on its own, on hosts that are slow to answer:
    cutover group create one --member web=tls://host1:7200 --backup tls://host2:7200 \\
        --heartbeat 1s --lease 4s --suspicion 5s";

const LIST_HELP: &str = "\
Examples:
  cutover group list
  cutover group list --json | jq -r '.[].name'";

const STATUS_HELP: &str = "\
PAUSE is how long the guest stood still for the last checkpoint, HELD what waits to be sent until that
is permanent, LAG how many checkpoints the standby is behind.

Examples:
  cutover group status shop
  cutover group status shop --watch=500ms
  cutover group status shop --json | jq .state";

const FAILOVER_HELP: &str = "\
Returns when the group has recovered: the standby of the member is the VM then, and the others have
gone back to the last checkpoint.

Examples:
  cutover group failover shop --test web";

const STOP_HELP: &str = "\
What is held is sent, standbys end, and the VMs run on, protected no more.

Examples:
  cutover group stop shop";

/// Does what `args` say.
pub fn run(args: &GroupArgs) -> ExitStatus {
    let socket = args.socket.clone();
    let coordinator = Vm {
        name: "the coordinator".to_owned(),
        socket: socket.unwrap_or_else(|| RuntimeDir::locate().coordinator()),
    };
    match &args.command {
        GroupCommand::Checkpoint(checkpoint) => checkpoint::run(checkpoint, &coordinator, args.json),
        GroupCommand::Checkpoints(checkpoints) => checkpoint::list(checkpoints, args.json),
        command => ask(command, &coordinator, args.json),
    }
}

/// Asks `coordinator` for what is answered soon, or looked at again and again.
fn ask(command: &GroupCommand, coordinator: &Vm, json: bool) -> ExitStatus {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            report(&error);
            return ExitStatus::Failure;
        }
    };
    match runtime.block_on(execute(command, coordinator, json)) {
        Ok(()) => ExitStatus::Success,
        // A reader that has seen enough is no failure.
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitStatus::Success,
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

/// Why a command came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommandError {
    #[error("no coordinator listens on {}: start `cutover coordinator`, or say with --socket where it is", .0.display())]
    NoCoordinator(PathBuf),
    #[error(transparent)]
    Client(ClientError),
    #[error("group '{group}' is not protected: {reason}")]
    NotProtected { group: String, reason: String },
    #[error(transparent)]
    Checkpoint(#[from] cutover_cluster::Error),
    #[error("{}: there is no checkpoint of a group", .0.display())]
    NoCheckpoint(PathBuf),
    #[error("{}: the checkpoint has no member '{vm}'", .dir.display())]
    NoMember { dir: PathBuf, vm: String },
    #[error("{}: say where '{vm}' is to run: --member {vm}=HOST", .dir.display())]
    NoHost { dir: PathBuf, vm: String },
    #[error("cannot name the directory {}", .0.display())]
    Directory(PathBuf, #[source] io::Error),
    #[error("cannot write the answer")]
    Output(#[from] io::Error),
}

impl From<ClientError> for CommandError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NotThere(socket) => Self::NoCoordinator(socket),
            error => Self::Client(error),
        }
    }
}

async fn execute(command: &GroupCommand, coordinator: &Vm, json: bool) -> Result<(), CommandError> {
    let mut screen = Screen::new(json);
    match command {
        GroupCommand::Create(create) => {
            coordinator
                .tell(Method::POST, "/v1/groups", &body(create), ANSWER_MAX)
                .await?;
            let status = match create.no_wait {
                true => status(coordinator, &create.name).await?,
                false => wait_until_protected(coordinator, &create.name).await?,
            };
            show_status(&status, &mut screen)?;
        }
        GroupCommand::List => {
            let groups: Vec<GroupStatusV1> = coordinator.get("/v1/groups", ANSWER_MAX).await?;
            match json {
                true => screen.text(&pretty(&groups)?)?,
                false => screen.text(&show::list(&groups))?,
            }
        }
        GroupCommand::Status(StatusArgs { name, watch: None }) => {
            show_status(&status(coordinator, name).await?, &mut screen)?;
        }
        GroupCommand::Status(StatusArgs {
            name,
            watch: Some(period),
        }) => watch(coordinator, name, *period, &mut screen).await?,
        GroupCommand::Failover(FailoverArgs { name, member }) => {
            let body = FailoverV1 { member: member.clone() };
            let path = format!("{}/failover", path(name));
            coordinator.tell(Method::POST, &path, &body, RECOVERY_MAX).await?;
            show_status(&status(coordinator, name).await?, &mut screen)?;
        }
        GroupCommand::Restore(restore) => {
            if let Some(status) = restore::run(restore, coordinator).await? {
                show_status(&status, &mut screen)?;
            }
        }
        // What takes longer is waited for in another way.
        GroupCommand::Checkpoint(_) | GroupCommand::Checkpoints(_) => {}
        GroupCommand::Stop(StopArgs { name }) => coordinator.delete(&path(name), ANSWER_MAX).await?,
    }
    Ok(())
}

/// Where group `name` is: names have no characters that mean something in a path.
pub(super) fn path(name: &str) -> String {
    format!("/v1/groups/{name}")
}

pub(super) async fn status(coordinator: &Vm, name: &str) -> Result<GroupStatusV1, CommandError> {
    Ok(coordinator.get(&path(name), ANSWER_MAX).await?)
}

pub(super) async fn wait_until_protected(coordinator: &Vm, name: &str) -> Result<GroupStatusV1, CommandError> {
    let began = Instant::now();
    let mut told = None;
    loop {
        let status = status(coordinator, name).await?;
        match status.state {
            GroupStateV1::Protected => return Ok(status),
            GroupStateV1::Dissolved => {
                return Err(CommandError::NotProtected {
                    group: status.name,
                    reason: status.reason.unwrap_or_else(|| "it was stopped".to_owned()),
                });
            }
            _ => {}
        }
        // What is refused is tried again: whoever asked may mend it meanwhile, or give up.
        if began.elapsed() > TELL_AFTER && status.reason != told {
            let reason = status.reason.as_deref().unwrap_or("its standbys are brought up");
            // Nobody reads it where there is no standard error.
            let _ = writeln!(io::stderr(), "cutover: waiting for group '{name}': {}", escaped(reason));
            told = status.reason;
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn watch(coordinator: &Vm, name: &str, period: Duration, screen: &mut Screen) -> Result<(), CommandError> {
    let mut ticks = interval(period.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: Option<(Instant, GroupStatusV1)> = None;
    loop {
        ticks.tick().await;
        let now = (Instant::now(), status(coordinator, name).await?);
        if screen.is_json() {
            screen.text(&format!(
                "{}\n",
                serde_json::to_string(&now.1).map_err(io::Error::other)?
            ))?;
        } else {
            let rate = before.as_ref().map(|(then, status)| {
                let cuts = now.1.cuts.saturating_sub(status.cuts);
                show::per_second(cuts, now.0 - *then)
            });
            screen.text(&show::status(&now.1, rate.as_deref()))?;
        }
        before = Some(now);
    }
}

fn show_status(status: &GroupStatusV1, screen: &mut Screen) -> Result<(), CommandError> {
    match screen.is_json() {
        true => screen.text(&pretty(status)?)?,
        false => screen.text(&show::status(status, None))?,
    }
    Ok(())
}

fn pretty(value: &impl serde::Serialize) -> io::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// The group as it is asked for.
fn body(args: &CreateArgs) -> GroupV1 {
    group(&args.name, args.members.clone(), &args.backups, &args.pace)
}

/// A group as the API has it.
pub(super) fn group(name: &str, members: Vec<GroupMemberV1>, backups: &[Endpoint], args: &PaceArgs) -> GroupV1 {
    GroupV1 {
        name: name.to_owned(),
        members,
        backups: backups.iter().map(Endpoint::to_string).collect(),
        interval: args.interval.0,
        timing: GroupTimingV1 {
            heartbeat_ms: milliseconds(args.heartbeat),
            lease_ms: milliseconds(args.lease),
            suspicion_ms: milliseconds(args.suspicion),
            cut_ms: milliseconds(args.cut),
            ship_ms: milliseconds(args.ship),
            roll_back_ms: milliseconds(args.roll_back),
        },
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(line: &str) -> Result<GroupCommand, clap::Error> {
        match Cli::try_parse_from(format!("cutover group {line}").split(' '))?.command {
            Command::Group(args) => Ok(args.command),
            other => panic!("not about groups: {other:?}"),
        }
    }

    fn created(line: &str) -> GroupV1 {
        let GroupCommand::Create(args) = parse(line).expect("valid") else {
            panic!("it is create");
        };
        body(&args)
    }

    #[test]
    fn members_and_backups_are_enough_and_the_rest_is_as_the_api_has_it() {
        let group = created("create shop --member web=tls://h1:1 --member db=tls://h2:1 --backup tls://h1:1");
        let default: GroupV1 = serde_json::from_str(
            r#"{"name":"shop","members":[{"name":"web","host":"tls://h1:1"},{"name":"db","host":"tls://h2:1"}],
                "backups":["tls://h1:1"]}"#,
        )
        .expect("valid");
        assert_eq!(group, default);
    }

    #[test]
    fn every_option_is_sent() {
        let group = created(
            "create g --member a=unix:/a --backup unix:/b --interval 25ms --heartbeat 1s --lease 4s --suspicion 5s \
             --cut 6s --ship 7s --roll-back 8s",
        );
        assert_eq!(group.interval, IntervalV1::Fixed { ms: 25 });
        let timing = GroupTimingV1 {
            heartbeat_ms: 1000,
            lease_ms: 4000,
            suspicion_ms: 5000,
            cut_ms: 6000,
            ship_ms: 7000,
            roll_back_ms: 8000,
        };
        assert_eq!(group.timing, timing);
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        for line in [
            "create g",
            "create g --member a=unix:/a",
            "create g --member a --backup unix:/b",
            "create g --member a=host1 --backup unix:/b",
            "create g/h --member a=unix:/a --backup unix:/b",
            "create g --member a=unix:/a --backup unix:/b --interval soon",
            "status",
            "failover g",
        ] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
    }
}
