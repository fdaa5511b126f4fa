//! Snapshots of a VM: made while its guest goes on running, and turned into running VMs again.
//!
//! ```text
//!  create   prepare   guest runs    store, first harvest, write protection          thread "snapshot"
//!           freeze    guest stands  last harvest, state of vCPUs and devices        state driver
//!           copy      guest runs    memory, disks, commit                           thread "snapshot"
//!
//!  restore  open      all that can be verified without pages is verified, before anything is created
//!           build     the machine of the spec with the saved state, memory and disks being filled behind it
//! ```
//! The pause does not depend on the size of the memory: pages to be saved are write-protected while the guest runs, so
//! that at the pause only those are left that it wrote meanwhile.

mod at_cut;
mod base;
mod copy;
mod create;
pub(crate) mod disks;
mod filling;
mod job;
mod memory;
mod output;
mod request;
mod restore;

use std::path::Path;

pub use self::at_cut::CutSnapshot;
pub(crate) use self::filling::Filling;
pub(crate) use self::job::{Snapshots, Step};
pub(crate) use self::memory::regions;
pub use self::request::{
    ClockPolicy, Disks, Kind, Method, NetOverride, RestoreRequest, SnapshotProgress, SnapshotReport, SnapshotRequest,
    Source, Target, Trust,
};
pub(crate) use self::restore::{Restored, restore};

/// The directory in which the file at `path` is.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}
