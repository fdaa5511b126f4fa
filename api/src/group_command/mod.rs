//! `cutover coordinator`, `cutover backup`, `cutover group`: groups of VMs that survive the loss of a host.
//!
//! ```text
//!  cutover group ── its API ──► cutover coordinator ══╦══ cutover backup, the agent of a host ──► cutover standby
//!                                                     ╠══ members: VMs with an API
//!                                                     ╚══ standbys, each a member once it is promoted
//! ```

mod agent;
mod checkpoint;
mod client;
mod coordinator;
mod restore;
mod show;
mod standby;

use std::path::{Path, PathBuf};

use clap::Args;
use cutover_cluster::runtime::journal::Location;
use cutover_devices::listener::ListenError;
use cutover_migration::transport::tls::Identity;
use cutover_migration::transport::{Endpoint, Listener, Security};

use crate::exit::ExitStatus;
use crate::runtime_dir::RuntimeDirError;
use crate::tls_dir;

pub use agent::{BackupArgs, HELP as BACKUP_HELP, run as backup};
pub use client::{GROUP_HELP, GroupArgs, run as group};
pub use coordinator::{CoordinatorArgs, HELP as COORDINATOR_HELP, run as coordinator};
pub use standby::{HELP as STANDBY_HELP, StandbyArgs, run as standby};

/// How the processes of groups on this host reach others, and are reached.
#[derive(Clone, Debug, Args)]
struct LinkArgs {
    /// Where to listen, by the name that other hosts reach this one by: tls://host:port, or tcp://host:port with
    /// --insecure; unix:PATH if all is on this host
    #[arg(long, value_name = "ENDPOINT")]
    listen: Endpoint,

    /// Directory of this host's certificate, as `cutover tls init` makes it [default: that of the user]
    #[arg(long, value_name = "DIR", help_heading = "Link")]
    tls_dir: Option<PathBuf>,

    /// Allow tcp://, where anyone on the way can read and change what is sent, and anyone can connect
    #[arg(long, help_heading = "Link")]
    insecure: bool,
}

/// Why a process of a group cannot do its work.
#[derive(Debug, thiserror::Error)]
enum GroupError {
    #[error(
        "{0}: anyone on the way can read and change what is sent there, and anyone can connect: write tls://, or give \
         --insecure if that is meant"
    )]
    Insecure(Endpoint),
    #[error("{0}: whoever can reach that can decide about VMs: write etcd+tls://, or give --insecure if that is meant")]
    InsecureJournal(Location),
    #[error("{0}: others cannot reach this host by that: write the name or address by which they do")]
    Unreachable(Endpoint),
    #[error(transparent)]
    Link(#[from] cutover_migration::Error),
    #[error(transparent)]
    Cluster(#[from] cutover_cluster::Error),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error("cannot serve the coordinator's API")]
    Serve(#[source] std::io::Error),
}

impl GroupError {
    fn status(&self) -> ExitStatus {
        match self {
            Self::Insecure(_) | Self::InsecureJournal(_) | Self::Unreachable(_) => ExitStatus::Usage,
            _ => ExitStatus::Failure,
        }
    }
}

impl LinkArgs {
    /// What protects links. Without a certificate nothing can be reached by `tls://`, which shows when that is tried.
    fn security(&self) -> Result<Security, GroupError> {
        let tls_dir = tls_dir::for_endpoint(&self.listen, self.tls_dir.as_deref());
        Ok(security(tls_dir.as_deref(), self.insecure)?)
    }

    fn listener(&self, security: &Security) -> Result<Listener, GroupError> {
        match &self.listen {
            Endpoint::Tcp(_) if !self.insecure => return Err(GroupError::Insecure(self.listen.clone())),
            Endpoint::Tcp(at) | Endpoint::Tls(at) if is_any(&at.host) => {
                return Err(GroupError::Unreachable(self.listen.clone()));
            }
            _ => {}
        }
        Ok(Listener::bind(&self.listen, security)?)
    }
}

/// What protects links of a host with its certificate in `tls_dir`.
///
/// # Errors
/// There is none.
pub(crate) fn security(tls_dir: Option<&Path>, insecure: bool) -> Result<Security, cutover_migration::Error> {
    Ok(Security {
        insecure,
        identity: tls_dir.map(Identity::read).transpose()?,
    })
}

/// Whether `host` is an address to listen at, but not one to reach anybody by.
fn is_any(host: &str) -> bool {
    host.parse::<std::net::IpAddr>()
        .is_ok_and(|address| address.is_unspecified())
}
