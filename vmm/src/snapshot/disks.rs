//! Disks in snapshots: their contents at the moment of the snapshot, copied while the guest goes on writing, and filled
//! into new files while the guest goes on reading.
//!
//! ```text
//!  save     DiskTracks::hold ─► HeldDisks::start ─► DiskCopies::finish ─► CopiedDisks::commit
//!           guest stands        threads "disk-copy"   images complete       snapshot permanent
//!
//!  restore  DiskImages::open ─► create ─► NewDisks::fill ─► DiskFilling::wait
//!           all is verified     files     threads "disk-fill"   files have their names
//! ```
//! Both ways the block device's [gate](cutover_devices::virtio::block::gate) keeps the guest off what is not copied yet:
//! off writing it when it is copied out, off all of it when it is copied in. What the guest waits for is copied first,
//! so every disk has a thread of its own, which waits for nothing but files.
//!
//! A page of a disk's image is a chunk of the disk; the last one is filled up with zeroes, and the section
//! [`SavedDisks`] has the exact size. Disks that can only be read are not in the snapshot, nor are those of a snapshot
//! that refers to its disks: of these the spec has the path.

mod pieces;
mod restore;
mod save;
#[cfg(test)]
mod tests;
pub mod unfinished;

use cutover_devices::virtio::block::chunks::CHUNK_SIZE;
use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, Section};
use serde::{Deserialize, Serialize};

pub use self::restore::{DiskFilling, DiskImages, Existing, WhenFilled, target};
pub use self::save::{DiskTracks, HeldDisks, Watch};

/// Name of the section that says which disks the snapshot has.
const SECTION: &str = "disks";
/// Bytes of a page of a disk's image.
#[expect(clippy::cast_possible_truncation, reason = "64 KiB")]
pub const PAGE_BYTES: u32 = CHUNK_SIZE as u32;

/// The disks that a snapshot has images of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedDisks {
    /// In the order of the spec.
    disks: Vec<SavedDisk>,
}

/// A disk that a snapshot has an image of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedDisk {
    /// Its id, which makes the image's name.
    id: String,
    /// Its exact size.
    bytes: u64,
}

impl Section for SavedDisks {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

/// Name of the image of disk `id`.
pub fn image_name(id: &str) -> String {
    format!("disk-{id}")
}

/// Pages of the image of a disk of `bytes` bytes.
fn pages_of(bytes: u64) -> u64 {
    bytes.div_ceil(CHUNK_SIZE)
}
