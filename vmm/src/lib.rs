//! The monitor: turns a [`VmSpec`](cutover_snapshot::spec::VmSpec) into a running guest. The only crate that opens
//! `/dev/kvm`.
//!
//! ```text
//!  Vmm::build ── memory ── KVM VM ── devices ── boot image, ACPI ── vCPUs (stopped)
//!  Vmm::run   ── the calling thread becomes the state driver: owns the VM until it ends, returns an Exit
//!  Controller ── everyone else's way to ask the state driver for something
//! ```

mod acpi;
mod boot;
mod cpu;
mod device_manager;
mod driver;
mod error;
pub mod host;
mod kvm;
mod layout;
pub mod lifecycle;
mod memory;
pub mod seccomp;

pub use driver::{Controller, Exit, Options, Vmm};
pub use error::Error;
