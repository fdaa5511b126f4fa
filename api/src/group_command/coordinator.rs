//! `cutover coordinator`: decides about groups, and serves their API.

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;

use clap::Args;
use cutover_cluster::engine::Report;
use cutover_cluster::runtime::coordinator::{Coordinator, Options};
use cutover_cluster::runtime::file_journal::FileJournal;
use cutover_devices::listener::Listener;
use tokio::runtime;
use tokio::sync::oneshot;

use super::{GroupError, LinkArgs};
use crate::exit::{ExitStatus, report};
use crate::log::{self, LogArgs};
use crate::runtime_dir::{CLIENTS_WAITING_MAX, RuntimeDir};
use crate::server::groups;

/// Arguments of `cutover coordinator`.
#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    /// Where to listen for members and standbys.
    #[command(flatten)]
    link: LinkArgs,

    /// Directory in which decisions are made durable; it is made if there is none
    #[arg(long, value_name = "DIR")]
    journal: PathBuf,

    /// Where to listen for `cutover group` and other clients [default: coordinator in the runtime directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// What is logged, how, and where to.
    #[command(flatten)]
    log: LogArgs,
}

/// Shown with `cutover coordinator --help`.
pub const HELP: &str = "\
Groups have one coordinator, which may run on any host, also one that has members. It decides when
checkpoints are taken and who takes whose place, and makes that durable in its journal before anyone
hears of it. If it dies, members go on for as long as a lease (`cutover group create --lease`), and
then stand still until it is there again: start it with the same journal, and have a service manager
do so. Two must not have the same journal at a time; the second is refused.

Examples:
  cutover coordinator --listen tls://host1.example.com:7100 --journal /var/lib/cutover/journal

  On a network that nobody else is on:
    cutover coordinator --listen tcp://192.0.2.1:7100 --insecure --journal /var/lib/cutover/journal

Exit codes:
  1  it cannot listen, or its journal cannot be used
  2  the command line is wrong";

/// Coordinates until the process is ended.
pub fn run(args: &CoordinatorArgs) -> ExitStatus {
    if let Err(error) = log::start(&args.log) {
        report(&error);
        return ExitStatus::Usage;
    }
    match serve(args) {
        Ok(()) => ExitStatus::Success,
        Err(error) => {
            report(&error);
            error.status()
        }
    }
}

fn serve(args: &CoordinatorArgs) -> Result<(), GroupError> {
    let security = args.link.security()?;
    let clients = match &args.socket {
        Some(path) => Listener::bind(path, CLIENTS_WAITING_MAX)?,
        None => RuntimeDir::locate().listen_as_coordinator()?,
    };
    let journal = FileJournal::open(&args.journal)?;
    let listener = args.link.listener(&security)?;
    let endpoint = listener.endpoint().clone();
    let options = Options {
        security,
        observer: Box::new(tell),
        failed: Box::new(|error| {
            report(&error);
            // What is not durable must not be said: nothing is left to do here.
            process::exit(ExitStatus::Failure as i32);
        }),
    };
    let coordinator = Coordinator::start(listener, Box::new(journal), options)?;
    tracing::info!(%endpoint, clients = %clients.path().display(), "the coordinator runs");
    let socket = clients.as_fd().try_clone_to_owned().map_err(GroupError::Serve)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let (_kept, stop) = oneshot::channel();
    runtime
        .map_err(GroupError::Serve)?
        .block_on(groups::serve(UnixListener::from(socket), Arc::new(coordinator), stop))
        .map_err(GroupError::Serve)
}

/// Logs what happens to `group`, loudly what an operator has to know.
fn tell(group: &str, report: &Report) {
    match report {
        Report::Permanent { cut, cost } => tracing::debug!(group, cut, ?cost, "a cut is permanent"),
        Report::Invalid { cut, reason } => tracing::warn!(group, cut, reason, "a cut came to nothing"),
        Report::Protected => tracing::info!(group, "protected: any one host may be lost"),
        Report::Unprotected { reason } => tracing::warn!(group, reason, "UNPROTECTED: no host may be lost"),
        Report::Failed { seat, reason } => tracing::warn!(group, %seat, reason, "a member or standby has failed"),
        Report::RollingBack { cut } => tracing::warn!(group, cut, "all go back to a cut"),
        Report::Recovered { cut } => tracing::warn!(group, cut, "recovered: all go on from that cut"),
        Report::Lost { member, reason } => tracing::error!(group, member = member.0, reason, "A MEMBER IS LOST"),
        Report::Ended { member } => tracing::info!(group, member = member.0, "a member's guest has ended"),
        Report::Refused { seat, reason } => tracing::warn!(group, %seat, reason, "it cannot join, or be kept"),
    }
}
