//! Live migration: what is said between two monitors while a running VM moves from one to the other.
//!
//! ```text
//!  source::migrate ─┬─ link: messages ══════════════════════════ link ─┬─ destination::receive
//!  policy, heat     ├─ streams: batches of encoded pages ═══ streams ──┤
//!  SourceVm ────────┘                                                  └──── DestinationHost, DestinationVm
//! ```
//! Replication is the same without an end: [`epoch`] has what a primary and its standby say, over the same links, with the
//! same batches of pages.
//!
//! Knows neither KVM nor devices: both ends are traits that the `vmm` crate implements. Blocking calls and threads, none
//! of which waits for ever.
#![forbid(unsafe_code)]

pub mod batch;
pub mod codec;
pub mod destination;
pub mod disk;
pub mod epoch;
pub mod error;
mod handshake;
pub mod heat;
pub mod limit;
mod link;
pub mod message;
pub mod options;
pub mod pages;
pub mod policy;
pub mod report;
pub mod source;
pub mod status;
pub mod streams;
pub mod transport;
pub mod vm;
pub mod wire;

pub use error::Error;

#[cfg(test)]
mod tests;
