//! What the programs inside a test guest and the harness outside it have in common.
//!
//! - [`frame`]: messages on a serial line that the guest's kernel prints on as well;
//! - [`agent`]: the messages of the agent, which runs shell commands for the harness;
//! - [`stream`]: reproducible pseudo-random bytes for transfers that are checked at both ends;
//! - [`pages`]: memory that notices when a page is not what was written last;
//! - [`parallel`]: jobs of several guests whose right result is known.
//!
//! Programs: `guest-init` (process 1 of the `micro` guest: marker, mounts, modules, agent), `tcp-stream`,
//! `page-writer` and `parallel-job`.
#![forbid(unsafe_code)]

pub mod agent;
pub mod frame;
pub mod pages;
pub mod parallel;
pub mod stream;

/// The line `guest-init` prints on the console as its first act.
pub const USER_SPACE_MARKER: &str = "guest: user space";
