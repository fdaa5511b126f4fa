//! Live migration: what is said between two monitors while a running VM moves from one to the other.
//!
//! Knows neither KVM nor devices: both ends are traits that the `vmm` crate implements.
#![forbid(unsafe_code)]

pub mod pages;
