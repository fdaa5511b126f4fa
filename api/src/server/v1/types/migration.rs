//! What goes over the wire about migrations.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Time for which a guest may stand still when the request does not say: 30 ms.
pub const DOWNTIME_DEFAULT_MS: u64 = 30;
/// Longest time that it may be given: a minute, in milliseconds.
pub const DOWNTIME_MAX_MS: u64 = 60_000;
/// Connections that pages are sent on when the request does not say: more pay where one processor cannot fill the link.
pub const STREAMS_DEFAULT: u8 = 1;

/// Body of `POST /v1/migration`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationV1 {
    /// Where the destination listens: `tls://host:port`, `tcp://host:port` or `unix:PATH`.
    pub to: String,
    /// How long the guest may stand still, in milliseconds. A goal: it is stopped when it is expected to be met.
    #[serde(default = "downtime_default")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub downtime_ms: u64,
    /// Most bytes sent in each second while the guest runs; no limit if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 65536)]
    pub bandwidth: Option<u64>,
    /// Connections that pages are sent on.
    #[serde(default = "streams_default")]
    #[schema(minimum = 1, maximum = 16)]
    pub streams: u8,
    /// Whether the guest may run at the destination before all of its memory is there.
    #[serde(default)]
    pub post_copy: PostCopyV1,
    /// How pages are encoded.
    #[serde(default)]
    pub compression: MigrationCompressionV1,
    /// Slow the vCPUs down if the guest writes faster than pages can be sent.
    #[serde(default = "yes")]
    pub throttle: bool,
    /// What becomes of the disks.
    #[serde(default)]
    pub disks: MigrationDisksV1,
    /// Allow `tcp://`: anyone on the way can read and change what is sent.
    #[serde(default)]
    pub insecure: bool,
    /// Directory of this host's certificate, which `tls://` takes, as `cutover tls init` makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
}

fn downtime_default() -> u64 {
    DOWNTIME_DEFAULT_MS
}

fn streams_default() -> u8 {
    STREAMS_DEFAULT
}

fn yes() -> bool {
    true
}

/// Body of `PUT /v1/migration/receive`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceptionV1 {
    /// Where to listen: `tls://host:port`, `tcp://host:port` or `unix:PATH`.
    pub listen: String,
    /// Other tap devices, by the ids of network interfaces.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub taps: BTreeMap<String, String>,
    /// Other files, by the ids of disks.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, String>,
    /// Another Unix socket for the vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_uds: Option<String>,
    /// Directory in which files are created, as `ID.img`, for disks that move and are not in `disks`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks_dir: Option<String>,
    /// Allow `tcp://`: anyone who can connect can put a VM here.
    #[serde(default)]
    pub insecure: bool,
    /// Directory of this host's certificate, which `tls://` takes, as `cutover tls init` makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
}

/// Whether the guest may run at the destination before all of its memory is there. From then on the VM is lost if either
/// side is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PostCopyV1 {
    /// It may not.
    #[default]
    Never,
    /// It may if nothing else has an end.
    Allow,
    /// It does after the first round.
    Now,
}

/// How pages are encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationCompressionV1 {
    /// As it is fastest on this link.
    #[default]
    Auto,
    /// Zero pages apart, not at all.
    Never,
    /// Always, also where that costs more than it gains.
    Always,
}

/// What becomes of the disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationDisksV1 {
    /// Both hosts see the same files; the destination opens them when the source has let go of them.
    #[default]
    Shared,
    /// They move with the VM.
    Move,
}

/// What a migration is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhaseV1 {
    /// Finding the other side, and out whether the two understand each other.
    Connecting,
    /// The destination builds the VM, or refuses.
    Reserving,
    /// Pages are sent while the guest runs.
    PreCopy,
    /// The guest stands still: the last pages and the state are sent.
    Stopping,
    /// The destination was told to run it.
    HandedOver,
    /// It runs there, and the rest of its memory follows.
    PostCopy,
    /// Over.
    Done,
    /// Something that this client is too old to know. No server sends it.
    #[serde(other)]
    Unknown,
}

/// How far a migration has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationProgressV1 {
    /// What it is doing.
    pub phase: MigrationPhaseV1,
    /// Which round of sending pages it is, from 1; 0 before.
    pub round: u32,
    /// Pages of 4 KiB sent in all rounds, again and again those that changed.
    pub pages_sent: u64,
    /// Pages that this round has yet to send.
    pub pages_left: u64,
    /// Bytes sent, all that is on the wire.
    pub bytes_sent: u64,
    /// Bytes sent in each second of this round.
    pub bytes_per_second: u64,
    /// Pages that the guest writes in each second, as seen in the last round.
    pub dirty_pages_per_second: u64,
    /// How long the guest would stand still if it were stopped now, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime_ns: Option<u64>,
    /// How much of the time the vCPUs are made to stand still, in percent.
    pub throttle_percent: u8,
}

/// Answer of `GET /v1/migration`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationStatusV1 {
    /// How far the migration is that is under way, away from here or to here; nothing if none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub under_way: Option<MigrationProgressV1>,
    /// What came of the last migration of this process that is over, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<MigrationEndV1>,
}

/// What came of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum MigrationEndV1 {
    /// The VM runs at the destination.
    Moved {
        /// How it went.
        report: MigrationReportV1,
    },
    /// It does not, and goes on at the source if it did not end there.
    Failed {
        /// Why.
        reason: String,
    },
}

/// How a migration went, as seen by the source: what `POST /v1/migration` answers. Times are by the source's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationReportV1 {
    /// From the start until the destination has everything that the VM needs and pages can be sent.
    pub preparation_ns: u64,
    /// How long the guest stood still.
    pub downtime: DowntimeV1,
    /// From the moment the guest runs at the destination until nothing of it is at the source any more.
    pub resume_ns: u64,
    /// From the start until then.
    pub total_ns: u64,
    /// All that went over the wire, in bytes, both ways and with everything that is not pages.
    pub wire_bytes: u64,
    /// Pages by what was sent of them, in all rounds together.
    pub pages: PageCountsV1,
    /// Of these, how many had been sent before.
    pub duplicate_pages: u64,
    /// Pages that would have been sent once more had they not waited for the stop phase.
    pub deferred_pages_saved: u64,
    /// Pages that the guest waited for after it ran at the destination (post-copy).
    pub pages_pulled: u64,
    /// The longest time that it waited for one of them.
    pub pull_ns_max: u64,
    /// Most that the guest was slowed down on purpose, in percent of its time.
    pub throttle_percent_max: u8,
    /// How long it ran slowed down so.
    pub throttled_ns: u64,
    /// The rounds, in order; the last one is that of the stop phase, and after it that of post-copy, if there is one.
    pub rounds: Vec<RoundV1>,
}

/// How long the guest stood still, and what for. The parts follow each other and make up the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DowntimeV1 {
    /// From the last vCPU's stop until the vCPUs at the destination are told to run; the way of the message that says so counts.
    pub total_ns: u64,
    /// Stopping: devices are quiesced, the last dirty pages are harvested, the state is saved.
    pub stop_ns: u64,
    /// Sending the last pages.
    pub pages_ns: u64,
    /// Sending the state, and the destination's restoring it.
    pub state_ns: u64,
    /// From the handing over until they are told to run.
    pub handoff_ns: u64,
}

/// A round of sending pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RoundV1 {
    /// How long it took.
    pub took_ns: u64,
    /// Pages by what was sent of them.
    pub pages: PageCountsV1,
    /// Bytes of these on the wire.
    pub wire_bytes: u64,
    /// Pages that waited for the stop phase instead.
    pub deferred_pages: u64,
    /// Pages that the guest dirtied during it.
    pub dirtied_pages: u64,
    /// How much the guest was slowed down, in percent of its time.
    pub throttle_percent: u8,
}

/// Numbers of pages of 4 KiB, by what was sent of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PageCountsV1 {
    /// Only zeroes.
    pub zero: u64,
    /// As sent before.
    pub unchanged: u64,
    /// Sent as what had changed since they were sent before.
    pub delta: u64,
    /// Compressed.
    pub compressed: u64,
    /// As they are.
    pub raw: u64,
}

impl PageCountsV1 {
    /// All of them.
    pub fn total(&self) -> u64 {
        [self.zero, self.unchanged, self.delta, self.compressed, self.raw]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}
