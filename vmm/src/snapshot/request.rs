//! What can be asked about snapshots, and what is told of them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cutover_snapshot::image::Progress;
use cutover_snapshot::spec::{MacAddr, SerialSpec};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A snapshot to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// Where it goes.
    pub target: Target,
    /// How much of memory and disks it has.
    pub kind: Kind,
    /// What becomes of the disks. [`Target::Files`] has no place for them.
    pub disks: Disks,
    /// Compress pages with zstd at this level, 1 (fast) to 19. Pages that are not compressed can be mapped.
    pub compress: Option<i32>,
}

/// Where a snapshot goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Into a directory of snapshots, which exists.
    Store {
        /// The directory.
        store: PathBuf,
        /// What the snapshot is called there.
        name: String,
    },
    /// Into two files, as Firecracker does: state, and memory as a plain image of it (an incremental one with holes for
    /// what is as in the snapshot before). Existing ones are replaced.
    Files {
        /// File for the state of devices and vCPUs.
        state: PathBuf,
        /// File for the memory.
        memory: PathBuf,
    },
}

impl Target {
    /// The snapshot's directory, or the file with its state.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Store { store, name } => store.join(name),
            Self::Files { state, .. } => state.clone(),
        }
    }
}

/// How much of memory and disks a snapshot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// All of it.
    Full,
    /// What has changed since the last snapshot of this VM, or since the one it was restored from; that has to be in
    /// the same store. Of a disk that this one only refers to, all of it.
    Incremental,
}

/// What becomes of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disks {
    /// Those that can be written are part of the snapshot.
    Copied,
    /// The snapshot has their paths: whoever restores it has to have them as they were.
    Referenced,
}

/// How memory was kept as it was while it was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Pages were write-protected and copied behind the running guest.
    CopyOnWrite,
    /// The guest stood still until all was copied.
    Paused,
}

/// What came of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The snapshot's directory, or the file with the state.
    pub path: PathBuf,
    /// Its id, if it is in a store.
    pub id: Option<Uuid>,
    /// Name of the snapshot it is built on.
    pub parent: Option<String>,
    /// How much it has.
    pub kind: Kind,
    /// How memory was copied.
    pub method: Method,
    /// Why it was not copied behind the running guest.
    pub method_reason: Option<String>,
    /// How long the guest stood still, in ns; 0 if it was paused before.
    pub pause_ns: u64,
    /// From the request to the permanent snapshot, in ns.
    pub total_ns: u64,
    /// Bytes of guest memory that were saved, or found to be zero.
    pub memory_bytes: u64,
    /// Bytes of disks that were saved.
    pub disk_bytes: u64,
    /// Bytes of the files.
    pub file_bytes: u64,
}

/// How far a snapshot has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// Bytes that are copied.
    pub done: u64,
    /// Bytes to copy; 0 before that is known.
    pub total: u64,
}

impl From<Progress> for SnapshotProgress {
    fn from(Progress { done, total }: Progress) -> Self {
        Self { done, total }
    }
}

/// A VM to be made of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreRequest {
    /// The snapshot.
    pub source: Source,
    /// If it is in a bucket: URLs of servers that all have it, instead of those that the environment names.
    pub endpoints: Vec<String>,
    /// How far its files are trusted.
    pub trust: Trust,
    /// What has become of the time for the guest.
    pub clock: ClockPolicy,
    /// Another name for the VM.
    pub name: Option<String>,
    /// Other taps and addresses, by the id of the network interface.
    pub nets: BTreeMap<String, NetOverride>,
    /// Other files, by the id of the disk: the file that is created for a disk that is part of the snapshot, the file
    /// that is used for one that is not.
    pub disks: BTreeMap<String, PathBuf>,
    /// Where files are created for disks that are part of the snapshot and not in `disks`: as `ID.img`.
    pub disks_dir: Option<PathBuf>,
    /// Another Unix socket for the vsock device.
    pub vsock: Option<PathBuf>,
    /// Replace files that are already where disks of the snapshot are to be.
    pub replace_disks: bool,
    /// Where the guest's console goes. That is a matter of the process that runs the VM, so the snapshot does not say.
    pub serial: SerialSpec,
    /// Back the guest's memory with the host's reserved huge pages, or not, whatever the snapshot's VM had.
    pub hugepages: Option<bool>,
    /// Note what changes from now on, so that incremental snapshots can be built on this one.
    pub track: bool,
    /// Leave the VM paused.
    pub paused: bool,
}

/// A snapshot to restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A snapshot of a store, with all it is built on: its directory, or a file it was exported to.
    Snapshot(PathBuf),
    /// Firecracker's two files.
    Files {
        /// State of devices and vCPUs.
        state: PathBuf,
        /// Memory.
        memory: PathBuf,
    },
    /// The state from a file, the memory from a process that serves page faults.
    Served {
        /// State of devices and vCPUs.
        state: PathBuf,
        /// The process's Unix socket.
        socket: PathBuf,
    },
}

/// How far the files of a snapshot are trusted. [`Source::Files`] and [`Source::Served`] have no checksums for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Every chunk is verified before the guest gets a byte of it.
    VerifyOnRead,
    /// All is verified before the guest runs; then as trusted.
    VerifyFirst,
    /// Memory is mapped as it is, where the snapshot is one flat file; clones share clean pages then.
    Trusted,
}

/// What has become of the time between snapshot and restore for the guest. Its monotonic clock goes back in neither case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClockPolicy {
    /// It has passed: the guest's wall clock is right again, as after a pause.
    #[default]
    Corrected,
    /// It has not: all clocks go on where they stopped.
    Stopped,
}

/// What is different about a network interface after a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetOverride {
    /// Another tap.
    pub tap: Option<String>,
    /// Another address; the guest's driver learns of it when it next reads the device's configuration.
    pub mac: Option<MacAddr>,
}
