//! The metadata service (MMDS): what a host has to say to its guest, read by the guest over HTTP from an address that is
//! nowhere else.
//!
//! ```text
//!  the API ── put, patch ──► Metadata ◄─────────────────────┐
//!                            one for each VM, shared        │ looks up
//!  guest ── tx queue ──► frames for the address ──► Endpoint: TCP/IP (smoltcp) ── request ──► Service
//!        ◄── rx queue ──────────────────────────── one for each interface ◄───── answer ───── tokens
//! ```
//! An interface hands the frames over that are for the service's address, before they would leave through its gate; what
//! the service answers goes into its receive queue, before what waits on the tap. No other frame is touched. It all happens
//! on the event loop, and nothing waits.
//!
//! The guest is hostile: connections, their age, frames on their way, requests and tokens are bounded by the constants of
//! these modules, and what breaks a rule is refused or dropped.
//!
//! Output commit is not for the service: what it answers leaves the guest's host no more than what a disk of the guest
//! does, and tells nobody else of what a protected guest did. A guest that goes back to a checkpoint, or on elsewhere,
//! finds its connections reset and its tokens refused, and asks anew.

mod connection;
mod endpoint;
mod http;
mod metadata;
mod service;
#[cfg(test)]
mod tests;
mod tokens;
mod wire;

pub use self::endpoint::{CLAIM_LEN, Endpoint};
pub use self::metadata::{Metadata, MetadataError, MetadataState, SIZE_LIMIT};
pub use self::service::Service;
