//! What a VM is, written down: the specification a VM is built from, and its saved state.
//!
//! ```text
//!  save:     Store::create ─► SnapshotWriter ─┬─ section, section, …
//!                                             ├─ ImageWriter ◄── PageSource (memory, disks)
//!                                             └─ commit ──────► Snapshot, a directory in the store
//!  restore:  Chain::open ─┬─ manifest: spec, CPU needs
//!                         ├─ State: sections
//!                         └─ Image ─► Reader: pages, verified as they are read
//!  care:     verify   merge   prune   export
//! ```
//!
//! `docs/snapshot-format.md` describes the files.
//!
//! This crate knows no KVM and no devices: it holds plain data that enters from the command line, the API or a file,
//! and is checked here before anything is created from it.
#![forbid(unsafe_code)]

pub mod archive;
mod blob;
pub mod chain;
pub mod checksum;
mod compose;
pub mod early;
pub mod error;
pub mod files;
pub mod image;
pub mod manifest;
pub mod merge;
pub mod prune;
pub mod remote;
pub mod section;
pub mod size;
mod source;
pub mod spec;
pub mod state_file;
pub mod store;
pub mod verify;
pub mod writer;

pub use error::Error;
