//! What a process that runs a VM may reach, and how all else is taken from it.
//!
//! A guest that takes its monitor over can do what the monitor's process may. So that is made little before the monitor
//! reads the first byte that others wrote:
//!
//! ```text
//!  Jail::run        keeper ── fork ──► monitor: cgroup ─ namespaces ─ a root of its own ─ limits ─ user ─ no capabilities ─► program
//!  (root)             └ waits, passes signals on, and removes what it made
//!
//!  Sandbox::enter   limits ─ no capabilities ─ Landlock: only the files named ─► program
//!  (any user)
//! ```
//!
//! The program is not executed: it is what this very process does next. It is mapped already, with its libraries, so a
//! jail needs no copy of them, and nothing in it can be executed at all. What execution would have cleaned, environment
//! and descriptors, [`begin_anew`] cleans before.

mod background;
mod begin;
mod cgroup;
mod error;
mod files;
mod folder;
mod keeper;
mod limits;
mod monitor;
mod privileges;
mod root;
mod sandbox;
mod told;

pub use background::in_background;
pub use begin::begin_anew;
pub use cgroup::{CgroupSettings, Setting};
pub use error::Error;
pub use files::{Access, SharedFile};
pub use keeper::Ended;
pub use limits::Limits;
pub use monitor::{Jail, User};
pub use sandbox::Sandbox;
pub use told::Teller;
