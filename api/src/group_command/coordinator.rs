//! `cutover coordinator`: decides about groups, and serves their API.

// Documentation here is help text, in which brackets mean that something can be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use cutover_cluster::engine::Report;
use cutover_cluster::runtime::coordinator::{Coordinator, Options};
use cutover_cluster::runtime::journal::{self, Link, Location};
use cutover_devices::listener::Listener;
use tokio::runtime;
use tokio::sync::oneshot;

use super::{GroupError, LinkArgs};
use crate::client::timeout;
use crate::exit::{ExitStatus, report};
use crate::log::{self, LogArgs};
use crate::runtime_dir::{CLIENTS_WAITING_MAX, RuntimeDir};
use crate::server::groups::{self, events::EventLog};
use crate::tls_dir;

/// Arguments of `cutover coordinator`.
#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    /// Where to listen for members and standbys.
    #[command(flatten)]
    link: LinkArgs,

    /// Where decisions are made durable: a database file of this host, which is made if there is none; or an etcd, as
    /// etcd+tls://host[:port],…[/PREFIX], or etcd:// with --insecure
    #[arg(long, value_name = "JOURNAL")]
    journal: Location,

    /// How long a coordinator that waits lets pass after the last word of the one that decides; of an etcd, whole seconds
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "2s")]
    lease: Duration,

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
then stand still until there is one again: this one, started anew with the same journal and --listen,
or another that was started before, with the same journal and a --listen of its own. That one waits,
members know of it, and it decides as soon as the first is gone: at once if that has died on the
same host, otherwise after --lease. A journal that is a file is for coordinators of one host; for
those of several, use an etcd, with auto-compaction (`etcd --auto-compaction-retention=1h`).

Examples:
  cutover coordinator --listen tls://host1.example.com:7100 --journal /var/lib/cutover/journal.db

  On three hosts that have an etcd, each with a certificate of `cutover tls init`:
    cutover coordinator --listen tls://host1.example.com:7100 \\
        --journal etcd+tls://host1.example.com,host2.example.com,host3.example.com

  On a network that nobody else is on:
    cutover coordinator --listen tcp://192.0.2.1:7100 --insecure --journal /var/lib/cutover/journal.db

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
    let listener = args.link.listener(&security)?;
    let endpoint = listener.endpoint().clone();
    let journal = journal::open(&location(args)?, &endpoint.to_string(), args.lease)?;
    let events = EventLog::default();
    let noted = events.clone();
    let options = Options {
        security,
        observer: Box::new(move |record, report| {
            tell(&record.spec.name, report);
            noted.note(record, report);
        }),
    };
    let coordinator = Coordinator::start(listener, journal, options)?;
    tracing::info!(%endpoint, clients = %clients.path().display(), "the coordinator runs");
    let socket = clients.as_fd().try_clone_to_owned().map_err(GroupError::Serve)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let (_kept, stop) = oneshot::channel();
    runtime
        .map_err(GroupError::Serve)?
        .block_on(groups::serve(
            UnixListener::from(socket),
            Arc::new(coordinator),
            events,
            stop,
        ))
        .map_err(GroupError::Serve)
}

/// The journal, with this host's certificate if that takes one.
fn location(args: &CoordinatorArgs) -> Result<Location, GroupError> {
    let mut location = args.journal.clone();
    if let Location::Etcd(cluster) = &mut location {
        match &mut cluster.link {
            Link::Plain if !args.link.insecure => return Err(GroupError::InsecureJournal(location)),
            Link::Plain => {}
            Link::Tls(directory) => *directory = args.link.tls_dir.clone().unwrap_or_else(tls_dir::of_user),
        }
    }
    Ok(location)
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
