//! `cutover vm`: the client of the VMs on this machine.
//!
//! ```text
//!  names, sockets, --all ── many ──► for each VM, at once: http ── its socket ──► answer ── show ──► a line each
//!                                                           └─ events: followed without a gap, over reconnections
//! ```
//!
//! It knows of a VM what the API says, nothing more: any other client could do the same.

mod args;
mod console;
mod error;
mod events;
mod http;
mod long;
mod many;
mod operation;
mod show;
mod sse;
mod table;
#[cfg(test)]
mod testing;
mod watch;

use std::io;
use std::time::Duration;

use serde_json::json;
use tokio::runtime;
use tokio::sync::mpsc;

pub(crate) use args::timeout;
pub use args::{VM_HELP, VmArgs, VmRef};
pub(crate) use error::ClientError;
pub(crate) use http::{INFO, Vm};
pub(crate) use long::{LOOK_EVERY, Work, WorkError};
pub(crate) use many::{Screen, one};
pub(crate) use show::{bytes, milliseconds, time};
pub(crate) use table::{Cell, Side, Table};

use args::{ConsoleArgs, DownArgs, EventsArgs, MetricsArgs, PowerArgs, StatsArgs, VmCommand, VmsArgs};
use events::{Follower, Seen};
use many::{Tally, all, ask_each, resolve};
use operation::{Manner, Operation};

use crate::exit::{ExitStatus, report};
use crate::runtime_dir::{RuntimeDir, RuntimeDirError};
use crate::server::v1::types::{InfoV1, PowerAction, StateV1, StatsV1};

/// Time a VM has to accept a power operation.
const ACCEPTANCE: Duration = Duration::from_secs(10);
/// Most events that wait to be printed; their VMs' connections then wait, too.
const EVENTS_WAITING_MAX: usize = 64;

const STATS: &str = "/v1/stats";
const METRICS: &str = "/v1/metrics";

/// Why the command as a whole came to nothing.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Directory(#[from] RuntimeDirError),
    #[error("cannot write the answer")]
    Output(#[from] io::Error),
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Does what `args` say with the VMs they name.
pub fn run(args: &VmArgs) -> ExitStatus {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            report(&error);
            return ExitStatus::Failure;
        }
    };
    match runtime.block_on(execute(&args.command, &RuntimeDir::locate())) {
        Ok(tally) => tally.into(),
        // A reader that has seen enough (`cutover vm … | head`) is no failure.
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitStatus::Success,
        Err(error) => {
            report(&error);
            ExitStatus::Failure
        }
    }
}

async fn execute(command: &VmCommand, directory: &RuntimeDir) -> Result<Tally, CommandError> {
    let power = |action: PowerAction| Operation::Power(action, None);
    match command {
        VmCommand::List(args) => list(all(directory)?, args.json, args.timeout).await,
        VmCommand::Info(args) => info(args, directory).await,
        VmCommand::Pause(args) => change(Operation::Pause, args, true, directory).await,
        VmCommand::Resume(args) => change(Operation::Resume, args, true, directory).await,
        VmCommand::Reclaim(args) => change(Operation::Reclaim, args, true, directory).await,
        VmCommand::Shutdown(args) => down(PowerAction::Shutdown, args, directory).await,
        VmCommand::Reboot(args) => down(PowerAction::Reboot, args, directory).await,
        VmCommand::Cycle(PowerArgs { vms, no_wait }) => {
            change(power(PowerAction::Cycle), vms, !no_wait, directory).await
        }
        VmCommand::Destroy(PowerArgs { vms, no_wait }) => {
            change(power(PowerAction::Destroy), vms, !no_wait, directory).await
        }
        VmCommand::Stats(args) => stats(args, directory).await,
        VmCommand::Events(args) => events(args, directory).await,
        VmCommand::Console(args) => console(args, directory).await,
        VmCommand::Metrics(args) => metrics(args, directory).await,
    }
}

async fn list(vms: Vec<Vm>, json: bool, limit: Duration) -> Result<Tally, CommandError> {
    let mut screen = Screen::new(json);
    let mut table = show::list_table();
    let ask = |vm: Vm| async move { vm.get::<InfoV1>(INFO, limit).await };
    ask_each(vms, ask, |vm, info| {
        table.row(show::list_row(&vm.name, info.as_ref().ok()));
        screen.result(vm, info, |_| String::new())
    })
    .await?;
    if !json {
        screen.text(&table.render())?;
    }
    Ok(screen.tally())
}

async fn info(args: &VmsArgs, directory: &RuntimeDir) -> Result<Tally, CommandError> {
    let mut screen = Screen::new(args.ask.json);
    let limit = args.ask.timeout;
    let ask = |vm: Vm| async move { vm.get::<InfoV1>(INFO, limit).await };
    let mut separator = "";
    ask_each(resolve(&args.vms, directory)?, ask, |vm, info| {
        screen.result(vm, info, |info| {
            std::mem::replace(&mut separator, "\n").to_owned() + &show::info(&vm.name, info)
        })
    })
    .await?;
    Ok(screen.tally())
}

async fn down(action: PowerAction, args: &DownArgs, directory: &RuntimeDir) -> Result<Tally, CommandError> {
    let operation = Operation::Power(action, Some(args.timeout));
    let manner = Manner {
        limit: ACCEPTANCE,
        wait: !args.no_wait,
    };
    carry_out(operation, manner, resolve(&args.vms, directory)?, args.json).await
}

async fn change(
    operation: Operation,
    args: &VmsArgs,
    wait: bool,
    directory: &RuntimeDir,
) -> Result<Tally, CommandError> {
    let manner = Manner {
        limit: args.ask.timeout,
        wait,
    };
    carry_out(operation, manner, resolve(&args.vms, directory)?, args.ask.json).await
}

async fn carry_out(operation: Operation, manner: Manner, vms: Vec<Vm>, json: bool) -> Result<Tally, CommandError> {
    let mut screen = Screen::new(json);
    let width = vms.iter().map(|vm| vm.name.chars().count()).max().unwrap_or(0);
    let ask = |vm: Vm| operation.carry_out(vm, manner);
    ask_each(vms, ask, |vm, outcome| {
        screen.result(vm, outcome, |outcome| format!("{:width$}  {outcome}\n", vm.name))
    })
    .await?;
    Ok(screen.tally())
}

async fn stats(args: &StatsArgs, directory: &RuntimeDir) -> Result<Tally, CommandError> {
    let mut screen = Screen::new(args.vms.ask.json);
    let vms = resolve(&args.vms.vms, directory)?;
    let limit = args.vms.ask.timeout;
    match args.watch {
        Some(period) => watch::watch(vms, period, limit, &mut screen).await?,
        None => {
            let ask = |vm: Vm| async move { vm.get::<StatsV1>(STATS, limit).await };
            ask_each(vms, ask, |vm, stats| {
                screen.result(vm, stats, |stats| show::stats(&vm.name, stats))
            })
            .await?;
        }
    }
    Ok(screen.tally())
}

async fn events(args: &EventsArgs, directory: &RuntimeDir) -> Result<Tally, CommandError> {
    let mut screen = Screen::new(args.vms.ask.json);
    let (sender, mut seen) = mpsc::channel(EVENTS_WAITING_MAX);
    let vms = resolve(&args.vms.vms, directory)?;
    let (since, until, limit) = (args.since, args.until, args.vms.ask.timeout);
    let follow = vms.into_iter().map(|vm| {
        let sender = sender.clone();
        let name = vm.name.clone();
        let hand_on = async move |event| drop(sender.send((name.clone(), event)).await);
        (vm.clone(), tokio::spawn(follow(vm, since, until, limit, hand_on)))
    });
    let followed: Vec<_> = follow.collect();
    drop(sender);
    while let Some((name, event)) = seen.recv().await {
        let text = match screen.is_json() {
            true => json!({ "vm": name, "event": event.json }).to_string() + "\n",
            false => show::event(&name, &event),
        };
        screen.text(&text)?;
    }
    for (vm, task) in followed {
        match task.await.map_err(io::Error::other)? {
            Ok(()) => screen.count(true),
            Err(error) => screen.failure(&vm, error)?,
        }
    }
    Ok(screen.tally())
}

/// Hands on what happens to `vm` until it is gone, or in the state `until`.
async fn follow(
    vm: Vm,
    since: Option<u64>,
    until: Option<StateV1>,
    limit: Duration,
    hand_on: impl AsyncFn(Seen),
) -> Result<(), ClientError> {
    let now = vm.get::<InfoV1>(INFO, limit).await?;
    if since.is_none() && until == Some(now.state) {
        return Ok(());
    }
    let mut events = Follower::open(vm, since.unwrap_or(now.last_event), limit).await?;
    while let Some(event) = events.next().await? {
        let state = event.state();
        hand_on(event).await;
        if state.is_some() && state == until {
            return Ok(());
        }
    }
    match until {
        None | Some(StateV1::Ended) => Ok(()),
        Some(_) => Err(ClientError::Ended),
    }
}

async fn console(args: &ConsoleArgs, directory: &RuntimeDir) -> Result<Tally, CommandError> {
    let vm = one(&args.vm, directory);
    let info: InfoV1 = vm.get(INFO, args.timeout).await?;
    console::attach(&console::socket(&info)?)?;
    Ok(Tally::default())
}

async fn metrics(args: &MetricsArgs, directory: &RuntimeDir) -> Result<Tally, CommandError> {
    let metrics = one(&args.vm, directory).get_text(METRICS, args.timeout).await?;
    Screen::new(false).text(&metrics)?;
    Ok(Tally::default())
}
