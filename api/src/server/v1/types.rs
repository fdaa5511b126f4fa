//! What goes over the wire under `/v1`, for the server and for clients alike.
//!
//! Kept apart from the monitor's own types, so that those can change without the API noticing. Clients accept fields
//! and event types that they do not know; servers refuse fields that they do not know.

mod migration;
mod protection;
mod snapshots;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use migration::{
    DOWNTIME_MAX_MS, DowntimeV1, MigrationCompressionV1, MigrationDisksV1, MigrationEndV1, MigrationPhaseV1,
    MigrationProgressV1, MigrationReportV1, MigrationStatusV1, MigrationV1, PageCountsV1, PostCopyV1, ReceptionV1,
    RoundV1, STREAMS_DEFAULT,
};
pub use protection::{MembershipV1, ProtectionStageV1, ProtectionStatusV1, ProtectionV1};
pub use snapshots::{
    COMPRESSION_MAX, ClockV1, NetOverrideV1, ProgressV1, RestoreV1, SnapshotDisksV1, SnapshotKindV1, SnapshotMethodV1,
    SnapshotReportV1, SnapshotV1, TrustV1,
};

/// Longest time that `shutdown` and `reboot` may give a guest: a day, in milliseconds.
pub const POWER_TIMEOUT_MAX_MS: u64 = 86_400_000;
/// Time that `shutdown` and `reboot` give a guest when the request does not say: 30 s.
pub const POWER_TIMEOUT_DEFAULT_MS: u64 = 30_000;

/// Why a request was not carried out: the body of every answer from 400 up, in Firecracker's form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// What is wrong, for people.
    pub fault_message: String,
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StateV1 {
    /// It is being described; nothing of it exists yet.
    NotStarted,
    /// It is waited for, or on its way here from another monitor.
    Arriving,
    /// Complete, never run.
    Built,
    /// vCPUs and devices run.
    Running,
    /// vCPUs stand still and devices are quiesced.
    Paused,
    /// The guest runs, and has been asked to power down.
    ShuttingDown,
    /// It stands still, and is about to be handed over to another monitor.
    HandingOver,
    /// It was handed over to another monitor, which has not said that it runs there: it does not run here any more.
    HandedOver,
    /// It stands still, as its group is not sure that it may run.
    Fenced,
    /// It stands still at a checkpoint to which its group has gone back.
    RolledBack,
    /// Over.
    Ended,
}

/// Answer of `GET /v1/info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InfoV1 {
    /// What `--id` or `--name` said.
    pub id: String,
    /// Version of Cutover.
    pub version: String,
    /// Process that runs the VM.
    pub pid: u32,
    /// What the VM is doing.
    pub state: StateV1,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// Kernel image, once one is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Initial RAM disk, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line as the guest sees it, once a kernel is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Disks, in the order the guest sees them.
    pub disks: Vec<DiskInfoV1>,
    /// Network interfaces, in the order the guest sees them.
    pub nets: Vec<NetInfoV1>,
    /// Whether the guest has an entropy device.
    pub rng: bool,
    /// The vsock device, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockInfoV1>,
    /// The balloon, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonInfoV1>,
    /// Where the guest's serial port goes.
    pub serial: SerialInfoV1,
    /// Number of the newest event, 0 before the first: who follows the events from there misses nothing.
    pub last_event: u64,
}

/// A disk, as `GET /v1/info` tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskInfoV1 {
    /// Name of the disk in this API.
    pub id: String,
    /// Image file or block device.
    pub path: String,
    /// The guest may not write.
    pub readonly: bool,
}

/// A network interface, as `GET /v1/info` tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetInfoV1 {
    /// Name of the interface in this API.
    pub id: String,
    /// Name of the host's tap device, if the description of the VM has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The guest's MAC address, if the description of the VM has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// The vsock device, as `GET /v1/info` tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VsockInfoV1 {
    /// The guest's address.
    pub cid: u32,
    /// Unix socket for connections to the guest; those of the guest go to it with `_PORT` appended.
    pub uds: String,
}

/// The balloon, as `GET /v1/info` tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonInfoV1 {
    /// How much memory the guest is asked for.
    pub amount_bytes: u64,
    /// Whether it also gives back what it does not use, without being asked.
    pub free_page_reporting: bool,
}

/// Where the guest's serial port goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SerialInfoV1 {
    /// Standard input and output of the monitor.
    Stdio,
    /// Output appended to a file.
    File {
        /// The file.
        path: String,
    },
    /// A listening Unix socket, one client at a time.
    Socket {
        /// The socket.
        path: String,
    },
    /// A pseudo-terminal.
    Pty,
    /// Output discarded.
    Null,
}

/// Body of `PUT /v1/power`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerRequest {
    /// What to do.
    pub action: PowerAction,
    /// For `shutdown` and `reboot`: how long the guest may take before it is ended by force, in milliseconds; 30
    /// seconds if not given. The other actions take none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 86_400_000)]
    pub timeout_ms: Option<u64>,
}

/// What can be done to a VM's power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PowerAction {
    /// Press the power button; end the VM when the guest is down, or by force after the time limit.
    Shutdown,
    /// As `shutdown`, then start the same VM anew in the same process.
    Reboot,
    /// End the guest by force, and start the same VM anew in the same process.
    Cycle,
    /// End the VM by force.
    Destroy,
}

/// Answer of `GET /v1/stats`: counters since the VM was built; they only grow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatsV1 {
    /// What the VM is doing.
    pub state: StateV1,
    /// How often it has been built: 1, and 1 more for each reboot or cycle. The other counters begin anew then.
    pub boots: u64,
    /// Time since the VM first ran, pauses included.
    pub uptime_ns: u64,
    /// vCPUs, by number.
    pub cpus: Vec<CpuStatsV1>,
    /// Guest memory.
    pub memory: MemoryStatsV1,
    /// Disks, in the order the guest sees them.
    pub disks: Vec<DiskStatsV1>,
    /// Network interfaces, in the order the guest sees them.
    pub nets: Vec<NetStatsV1>,
}

/// One vCPU's counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuStatsV1 {
    /// Number of the vCPU.
    pub cpu: u8,
    /// Host CPU time that its thread used, in the guest and for it.
    pub time_ns: u64,
    /// How often it left the guest, by reason.
    pub exits: BTreeMap<String, u64>,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryStatsV1 {
    /// What the guest was given.
    pub size_bytes: u64,
    /// How much of it the host holds in memory.
    pub resident_bytes: u64,
}

/// One disk's counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskStatsV1 {
    /// Which.
    pub id: String,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Discard and write-zeroes requests.
    pub discards: u64,
    /// Bytes read by the guest.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub written_bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Times that a rate limiter made requests wait.
    pub throttled: u64,
}

/// One network interface's counters; sent and received are seen from the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetStatsV1 {
    /// Which.
    pub id: String,
    /// Frames that the guest received.
    pub rx_frames: u64,
    /// Bytes that the guest received.
    pub rx_bytes: u64,
    /// Frames that the guest sent.
    pub tx_frames: u64,
    /// Bytes that the guest sent.
    pub tx_bytes: u64,
    /// Frames of the guest that the host would not take.
    pub tx_dropped: u64,
    /// Times that a rate limiter made received frames wait.
    pub rx_throttled: u64,
    /// Times that a rate limiter made sent frames wait.
    pub tx_throttled: u64,
}

/// Answer of `GET /v1/stats/dirty-rate`: what the guest, and devices for it, changed in its memory since this was last
/// asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirtyRateV1 {
    /// Time since this was last asked; 0 if nobody has asked for a minute, and then nothing has been measured.
    pub interval_ns: u64,
    /// Pages of 4 KiB that changed in that time, each counted once however often it was written.
    pub pages: u64,
    /// Such pages per second.
    pub pages_per_second: u64,
    /// Bytes of such pages per second: what a migration would have to keep up with.
    pub bytes_per_second: u64,
}

/// One event of `GET /v1/events`: the `data` of a server-sent event, whose `id` is `sequence` and whose `event` is
/// `kind`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventV1 {
    /// Number of the event: 1 for the first of this process, and one more for each after it.
    pub sequence: u64,
    /// When it happened, by the host's wall clock: nanoseconds since the beginning of 1970 (UTC).
    pub unix_time_ns: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKindV1,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EventKindV1 {
    /// The VM is in another state.
    VmState {
        /// The new one.
        state: StateV1,
    },
    /// The VM is over.
    VmEnded {
        /// How it came to its end.
        exit: ExitV1,
    },
    /// The VM is over because the monitor could not go on.
    VmFailed {
        /// Why.
        reason: String,
    },
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest asked for a reset.
    GuestReset,
    /// The guest's kernel panicked, or a vCPU met a triple fault.
    GuestPanic,
    /// The person at the guest's console asked for the end of the VM.
    ConsoleQuit,
    /// A device stopped serving its guest; the VM goes on without it.
    DeviceFailed {
        /// Which.
        device: String,
        /// Why.
        reason: String,
    },
    /// The dirty log that `auto` prefers is not exact on this host: KVM's bitmap notices what the guest writes.
    DirtyLogFallback {
        /// Why.
        reason: String,
    },
    /// A power operation was accepted and begins.
    OperationRequested {
        /// Which.
        operation: String,
    },
    /// The guest did not end in the time it was given, and is ended by force.
    OperationForced {
        /// The state that took too long.
        state: StateV1,
    },
    /// A disk has another file or other limits.
    DriveUpdated {
        /// Id of the disk.
        drive: String,
    },
    /// A network interface has other limits.
    NetworkInterfaceUpdated {
        /// Id of the interface.
        interface: String,
    },
    /// The balloon is asked for another amount of memory, or for statistics at another interval.
    BalloonUpdated,
    /// A snapshot is being made.
    SnapshotStarted {
        /// Where it goes: its directory, or the file with its state.
        path: String,
    },
    /// The snapshot is permanent.
    SnapshotFinished {
        /// What came of it.
        report: SnapshotReportV1,
    },
    /// There is no snapshot, and nothing is left of it.
    SnapshotFailed {
        /// Where it should have gone.
        path: String,
        /// Why.
        reason: String,
    },
    /// All memory and all disks of the restored VM are there: its snapshot is not needed any more.
    RestoreFinished,
    /// The VM is being migrated away.
    MigrationStarted {
        /// Where to.
        to: String,
    },
    /// A round of sending pages begins, or the migration comes to another phase.
    MigrationRound {
        /// How far it has come.
        progress: MigrationProgressV1,
    },
    /// The VM runs at the destination.
    MigrationFinished {
        /// Where it is.
        to: String,
        /// How it went.
        report: MigrationReportV1,
    },
    /// The VM goes on here; or if it is handed over, nobody knows where it is.
    MigrationFailed {
        /// Where it should have gone.
        to: String,
        /// Why.
        reason: String,
    },
    /// The VM came from another monitor, and goes on here.
    Migrated,
    /// From here on the VM can go back to a checkpoint, and be that elsewhere.
    Protected {
        /// Where its standby is.
        to: String,
    },
    /// There is no standby of the VM any more: what it sends leaves at once.
    Unprotected,
    /// A checkpoint of the VM could not be taken; the next one covers it.
    CheckpointFailed {
        /// Its number.
        epoch: u64,
        /// Why.
        reason: String,
    },
    /// The VM is again as it was at a checkpoint.
    RolledBack {
        /// Which.
        cut: u64,
    },
    /// The VM is here what it was elsewhere at a checkpoint.
    Promoted {
        /// Which.
        cut: u64,
    },
    /// The events before this one are lost: the client was too far behind, or saw the last one in another process.
    /// `sequence` is that of the last event lost.
    Gap,
    /// Something that this client is too old to know. No server sends it.
    #[serde(other)]
    Unknown,
}

/// How a VM came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExitV1 {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reboot,
    /// The guest's kernel panicked, or a vCPU met a triple fault.
    Panic,
    /// Somebody ended it by force.
    Ended,
    /// It goes on under another monitor.
    Migrated,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_object() {
        let event = EventV1 {
            sequence: 7,
            unix_time_ns: 1_700_000_000,
            kind: EventKindV1::VmState { state: StateV1::Paused },
        };
        let json = r#"{"sequence":7,"unix_time_ns":1700000000,"kind":"vm_state","state":"paused"}"#;
        assert_eq!(serde_json::to_string(&event).expect("JSON"), json);
        assert_eq!(serde_json::from_str::<EventV1>(json).expect("an event"), event);
    }

    #[test]
    fn an_event_of_a_newer_server_is_no_error() {
        let json = r#"{"sequence":8,"unix_time_ns":1,"kind":"checkpoint","epoch":5}"#;
        let event: EventV1 = serde_json::from_str(json).expect("an event");
        assert_eq!(event.kind, EventKindV1::Unknown);
    }

    #[test]
    fn a_power_request_needs_no_time_limit_but_takes_no_other_field() {
        let request: PowerRequest = serde_json::from_str(r#"{"action":"reboot"}"#).expect("valid");
        assert_eq!((request.action, request.timeout_ms), (PowerAction::Reboot, None));
        assert!(serde_json::from_str::<PowerRequest>(r#"{"action":"reboot","force":true}"#).is_err());
    }
}
