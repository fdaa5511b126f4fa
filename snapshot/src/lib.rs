//! What a VM is, written down: the specification a VM is built from (and, with the snapshot issue, its saved state).
//!
//! This crate knows no KVM and no devices: it holds plain data that enters from the command line, the API or a file,
//! and is checked here before anything is created from it.
#![forbid(unsafe_code)]

pub mod size;
pub mod spec;
