//! Live migration: a VM that goes on under another monitor, and one that comes from there.
//!
//! ```text
//!  source                                                            destination
//!  state driver ◄── stop, hand over ── thread "migration" ════════ Vmm::receive ──► a VM, its memory being filled, that
//!      │                                    │                          │            waits for its state, and then runs
//!   Machine ──── what changes ──────────────┘                          └──► Vmm::run
//! ```
//! What is said between the two, and when, is in the crate `cutover_migration`; here is what it means for a VM.

mod destination;
mod disks;
mod handed;
mod job;
mod memory;
mod request;
mod room;
mod source;

use std::path::Path;

use cutover_migration::transport::Security;
use cutover_migration::transport::tls::Identity;

use crate::Error;

pub use cutover_migration::report::Report as MigrationReport;
pub use cutover_migration::status::{Progress as MigrationProgress, Status as MigrationStatus};

pub(crate) use self::destination::{Host, Incoming, receive};
pub(crate) use self::disks::MovingDisks;
pub(crate) use self::job::{Migration, Step};
pub(crate) use self::memory::{MemoryImage, numbered};
pub use self::request::{MigrateRequest, MigratedDisks, ReceiveRequest};
pub(crate) use self::source::{MOMENT, Moment, Still, memory_shape, reservation};

/// What protects a link, for a host with its certificate in the directory `tls`. Whether an unprotected one will do was
/// for others to decide.
///
/// # Errors
/// There is no certificate.
pub(crate) fn security(tls: Option<&Path>) -> Result<Security, Error> {
    Ok(Security {
        insecure: true,
        identity: tls.map(Identity::read).transpose()?,
    })
}
