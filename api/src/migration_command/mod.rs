//! `cutover migrate`, `cutover receive` and `cutover tls`: VMs that move between monitors while they run.
//!
//! ```text
//!  cutover migrate ── API ──► VM ═══ tls://, unix:, tcp:// ═══► cutover receive: from then on its monitor
//! ```

mod bar;
mod migrate;
mod receive;
mod tls;

use cutover_migration::transport::Endpoint;

use crate::options;

pub use migrate::{HELP as MIGRATE_HELP, MigrateArgs, run as migrate};
pub use receive::{HELP as RECEIVE_HELP, ReceiveArgs, run as receive};
pub use tls::{HELP as TLS_HELP, TlsArgs, run as tls};

/// Why arguments make no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum UsageError {
    #[error(
        "{0}: anyone on the way can read and change what is sent there, and anyone can connect: write tls://, or give \
         --insecure if that is meant"
    )]
    Insecure(Endpoint),
    #[error(transparent)]
    Twice(#[from] options::Twice),
}

fn check_endpoint(endpoint: &Endpoint, insecure: bool) -> Result<(), UsageError> {
    match endpoint {
        Endpoint::Tcp(_) if !insecure => Err(UsageError::Insecure(endpoint.clone())),
        _ => Ok(()),
    }
}
