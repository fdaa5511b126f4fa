//! `cutover vm` and `cutover snapshot create` as scripts and people meet it, against made-up VMs on real sockets. Needs no KVM.

mod events;
mod fake;
mod operations;
mod questions;
mod snapshots;
