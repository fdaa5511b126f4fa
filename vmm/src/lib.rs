//! The monitor: turns a [`VmSpec`](cutover_snapshot::spec::VmSpec) into a running guest. The only crate that opens
//! `/dev/kvm`.
//!
//! ```text
//!  Vmm::build ── memory ── KVM VM ── devices ── boot image, ACPI ── vCPUs (stopped)
//!  Vmm::run   ── the calling thread becomes the state driver: owns the VM until it ends, returns an Exit
//!  Controller ── everyone else's way to ask the state driver for something
//!  EventLog   ── what happened, for those who watch
//! ```

mod acpi;
mod bare_vm;
mod boot;
mod control;
mod cpu;
mod device_manager;
pub mod dirty;
mod driver;
mod error;
pub mod events;
mod generation;
pub mod host;
mod job;
mod kvm;
mod layout;
pub mod lifecycle;
mod machine;
mod memory;
pub mod migration;
mod overrides;
pub mod page_fault;
mod program_text;
pub mod protection;
mod reclaim;
pub mod seccomp;
pub mod snapshot;
mod state;
pub mod stats;
#[cfg(test)]
mod testing;

pub use bare_vm::begin as begin_vm;
pub use control::{COMMANDS_MAX, Command, Controller, Reply};
pub use device_manager::{BalloonUpdate, DeviceStats, DiskUpdate, NetUpdate};
pub use driver::{Options, Vmm};
pub use error::Error;
pub use events::EventLog;
pub use lifecycle::{Exit, Refusal, Request, State};
pub use stats::VmStats;
