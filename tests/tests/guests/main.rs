//! Tests with real guests under a real monitor.
#![expect(clippy::unwrap_used, reason = "in a test, what cannot be unwrapped is a failure")]

mod api;
mod balloon;
mod boot;
mod client;
mod command_line;
mod console;
mod cpu;
mod debian;
mod dirty;
mod disk;
mod faults;
mod foreign_clients;
mod group;
mod jail;
mod lifecycle;
mod limits;
mod memory;
mod migration;
mod mmds;
mod net;
mod pause;
mod power;
mod reset;
mod rng;
mod seccomp;
mod snapshot;
mod vsock;
