//! `cutover vm`, `cutover snapshot create` and `cutover migrate` as scripts and people meet them, against made-up VMs on real sockets. Needs no KVM.

mod events;
mod fake;
mod interrupt;
mod migrations;
mod operations;
mod questions;
mod snapshots;
