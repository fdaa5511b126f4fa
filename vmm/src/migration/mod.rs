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
mod handed;
mod job;
mod memory;
mod request;
mod source;

pub use cutover_migration::report::Report as MigrationReport;
pub use cutover_migration::status::{Progress as MigrationProgress, Status as MigrationStatus};

pub(crate) use self::job::{Migration, Step};
pub use self::request::{MigrateRequest, MigratedDisks, ReceiveRequest};
pub(crate) use self::source::Still;
