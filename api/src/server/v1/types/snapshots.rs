//! What goes over the wire about snapshots.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Highest level of compression.
pub const COMPRESSION_MAX: i32 = 19;

/// Body of `POST /v1/snapshots`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotV1 {
    /// Directory of snapshots, which exists. A relative path is relative to the directory the monitor runs in.
    pub store: String,
    /// What the snapshot is to be called there.
    #[schema(pattern = "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")]
    pub name: String,
    /// How much of memory and disks it is to have.
    #[serde(default)]
    pub kind: SnapshotKindV1,
    /// What is to become of the disks.
    #[serde(default)]
    pub disks: SnapshotDisksV1,
    /// Compress pages with zstd at this level. Pages that are not compressed can be mapped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 19)]
    pub compress: Option<i32>,
}

/// How much of memory and disks a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKindV1 {
    /// All of it.
    #[default]
    Full,
    /// What has changed since the last snapshot of this VM, or since the one it was restored from; that has to be in
    /// the same store.
    Incremental,
}

/// What becomes of the disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotDisksV1 {
    /// Those that can be written are part of the snapshot.
    #[default]
    Copied,
    /// The snapshot has their paths: whoever restores it has to have them as they were.
    Referenced,
}

/// How memory was kept as it was while it was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotMethodV1 {
    /// Pages were write-protected and copied behind the running guest.
    CopyOnWrite,
    /// The guest stood still until all was copied.
    Paused,
}

/// Answer of `POST /v1/snapshots`: what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotReportV1 {
    /// The snapshot's directory; of one in two files, the file with the state.
    pub path: String,
    /// Its UUID, if it is in a store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of the snapshot it is built on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// How much it has.
    pub kind: SnapshotKindV1,
    /// How memory was copied.
    pub method: SnapshotMethodV1,
    /// Why it was not copied behind the running guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method_reason: Option<String>,
    /// How long the guest stood still; 0 if it was paused before.
    pub pause_ns: u64,
    /// From the request to the permanent snapshot.
    pub total_ns: u64,
    /// Bytes of guest memory that were saved, or found to be zero.
    pub memory_bytes: u64,
    /// Bytes of disks that were saved.
    pub disk_bytes: u64,
    /// Bytes of the files.
    pub file_bytes: u64,
}

/// Answer of `GET /v1/snapshots/current` and `GET /v1/restore`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProgressV1 {
    /// Whether there is anything left to do.
    pub under_way: bool,
    /// Bytes that are copied.
    pub done_bytes: u64,
    /// Bytes to copy; 0 before that is known.
    pub total_bytes: u64,
}

/// Body of `PUT /v1/restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreV1 {
    /// The snapshot: its directory in a store with all it is built on, a file it was exported to, or either of them in a
    /// bucket (`s3://BUCKET/PATH`), reached as `endpoints` and the environment of the monitor say.
    pub snapshot: String,
    /// For `s3://…`: servers to ask, as `http://` or `https://`; of several with the same content, the next one when one
    /// is lost. Those of the environment if there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<String>,
    /// How far its files are trusted.
    #[serde(default)]
    pub trust: TrustV1,
    /// What has become of the time for the guest.
    #[serde(default)]
    pub clock: ClockV1,
    /// What is different about network interfaces, by their ids.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nets: BTreeMap<String, NetOverrideV1>,
    /// Other files for disks, by their ids: the file that is created for a disk that is part of the snapshot, the file
    /// that is used for one that is not.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, String>,
    /// Another Unix socket for the vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_uds: Option<String>,
    /// Directory in which files are created, as `ID.img`, for disks that are part of the snapshot and not in `disks`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks_dir: Option<String>,
    /// Replace files that are already where disks of the snapshot are to be.
    #[serde(default)]
    pub replace_disks: bool,
    /// Back the guest's memory with the host's reserved huge pages, or not; as in the snapshot if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepages: Option<bool>,
    /// Note what changes from now on, so that incremental snapshots can be built on this one.
    #[serde(default)]
    pub track: bool,
    /// Leave the VM paused.
    #[serde(default)]
    pub paused: bool,
}

/// How far the files of a snapshot are trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrustV1 {
    /// Every chunk is verified before the guest gets a byte of it.
    #[default]
    VerifyOnRead,
    /// All is verified before the guest runs.
    VerifyFirst,
    /// Memory is mapped as it is, where the snapshot is one flat file; clones share clean pages then.
    Trusted,
}

/// What has become of the time between snapshot and restore for the guest. Its monotonic clock goes back in neither case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClockV1 {
    /// It has passed: the guest's wall clock is right again, as after a pause.
    #[default]
    Corrected,
    /// It has not: all clocks go on where they stopped.
    Stopped,
}

/// What is different about a network interface after a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetOverrideV1 {
    /// Another tap device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Another MAC address; the guest's driver learns of it when it next reads the device's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}
