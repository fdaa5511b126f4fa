//! Live migration: what is said between two monitors while a running VM moves from one to the other.
//!
//! Knows neither KVM nor devices: both ends are traits that the `vmm` crate implements.
#![forbid(unsafe_code)]

pub mod batch;
pub mod codec;
pub mod error;
pub mod heat;
pub mod limit;
pub mod options;
pub mod pages;
pub mod policy;
pub mod report;
pub mod status;
pub mod transport;
pub mod vm;

pub use error::Error;
