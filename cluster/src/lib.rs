//! Groups of VMs that survive the loss of a host.
//!
//! ```text
//!                    ┌──────────── coordinator: engine, journal ───────────┐
//!                    │                         │                           │
//!              ToSeat, FromSeat          ToSeat, FromSeat          ToAgent, FromAgent
//!                    │                         │                           │
//!       member: a VM, MemberVm ══ epochs ═► standby: its image, StandbyVm   agent of a host: starts standbys
//! ```
//! What is decided is decided by pure state machines, which hear of events and say what to do; `runtime` does it. So all
//! of the protocol runs in a model checker and in a simulation as it runs between hosts.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod engine;
pub mod error;
pub mod id;
pub mod lease;
pub mod member;
pub mod message;
#[cfg(test)]
mod model;
pub mod runtime;
#[cfg(any(test, feature = "simulation"))]
pub mod sim;
pub mod spec;
pub mod standby;
pub mod vm;

pub use error::Error;
