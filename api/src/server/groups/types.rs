//! What goes over the wire about groups.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A group that is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupV1 {
    /// Its name: 1 to 64 letters, digits, '-', '_' or '.'.
    pub name: String,
    /// VMs that run, and are to be protected together.
    pub members: Vec<GroupMemberV1>,
    /// Endpoints of the agents of hosts that may keep standbys; the first are preferred.
    pub backups: Vec<String>,
    /// How often a cut is taken.
    #[serde(default)]
    pub interval: IntervalV1,
    /// How long everything may take.
    #[serde(default)]
    pub timing: GroupTimingV1,
}

/// A VM that is to be a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupMemberV1 {
    /// Name of the VM on its host.
    pub name: String,
    /// Endpoint of its host's agent.
    pub host: String,
    /// Directory of the snapshot that it is started from there, paused, if it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<String>,
}

/// How often a cut is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum IntervalV1 {
    /// From one to the next.
    Fixed {
        /// Milliseconds, 10 to 60000.
        #[schema(minimum = 10, maximum = 60000)]
        ms: u64,
    },
    /// As short as pays.
    Adaptive {
        /// The longest, in milliseconds, 10 to 60000.
        #[schema(minimum = 10, maximum = 60000)]
        max_ms: u64,
    },
}

impl Default for IntervalV1 {
    fn default() -> Self {
        Self::Adaptive { max_ms: 100 }
    }
}

/// How long everything may take, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GroupTimingV1 {
    /// From one heartbeat of a process to the next.
    pub heartbeat_ms: u64,
    /// How long a member may run after a heartbeat that was answered.
    pub lease_ms: u64,
    /// After what time without a heartbeat a process has failed; longer than the lease.
    pub suspicion_ms: u64,
    /// How long all members together may take for a cut.
    pub cut_ms: u64,
    /// How long it may take to send an epoch to a standby.
    pub ship_ms: u64,
    /// How long a member may take to go back.
    pub roll_back_ms: u64,
}

impl Default for GroupTimingV1 {
    fn default() -> Self {
        Self {
            heartbeat_ms: 50,
            lease_ms: 200,
            suspicion_ms: 250,
            cut_ms: 2_000,
            ship_ms: 10_000,
            roll_back_ms: 30_000,
        }
    }
}

/// A member that is to fail, so that it is seen that the group survives that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FailoverV1 {
    /// Its name.
    pub member: String,
}

/// How a group is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupStatusV1 {
    /// Its name.
    pub name: String,
    /// What it is at.
    pub state: GroupStateV1,
    /// Why it is not protected, if it is not.
    pub reason: Option<String>,
    /// Its generation: one more with each failure, and with each coordinator that takes the group over.
    pub generation: u64,
    /// The cut that all would go back to; none before the first.
    pub permanent_cut: Option<u64>,
    /// From one cut to the next, as it is now.
    pub interval_ms: u64,
    /// Cuts that became permanent, since this coordinator has the group.
    pub cuts: u64,
    /// Cuts that came to nothing.
    pub invalid_cuts: u64,
    /// Times that the group went back to a cut.
    pub recoveries: u64,
    /// The longest that a guest stood still for the last cut.
    pub pause_ns: u64,
    /// Its members, in the order they were given in.
    pub members: Vec<MemberStatusV1>,
    /// The last recovery.
    pub last_recovery: Option<RecoveryV1>,
}

/// What a group is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GroupStateV1 {
    /// It would not survive the loss of a host: VMs have not joined, or standbys do not have everything yet.
    Unprotected,
    /// All standbys have everything; the first cut is on its way.
    Protecting,
    /// It survives the loss of any one host.
    Protected,
    /// Something was lost, and what else was is being found out; or the coordinator is new.
    Judging,
    /// All members go back to the last permanent cut.
    Recovering,
    /// It is a group no more: it was stopped, or no member is left.
    Dissolved,
}

/// How a member is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemberStatusV1 {
    /// Name of the VM.
    pub name: String,
    /// What became of it.
    pub state: MemberStateV1,
    /// Why, of one that is lost.
    pub reason: Option<String>,
    /// Endpoint of the agent of the host that it runs on.
    pub host: Option<String>,
    /// Which of the processes that were ever to have it has it: 0 is the VM that joined.
    pub incarnation: Option<u32>,
    /// Whether it has a link to the coordinator.
    pub connected: bool,
    /// Its standby, if it has one.
    pub standby: Option<StandbyStatusV1>,
    /// How long the guest stood still for the last cut.
    pub pause_ns: u64,
    /// Pages that were written in the last epoch.
    pub dirty_pages: u64,
    /// Frames that wait to be sent until a cut is permanent.
    pub held_frames: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Cuts that its standby does not hold yet.
    pub lag: u64,
    /// Bytes sent to its standby.
    pub shipped_bytes: u64,
}

/// What became of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemberStateV1 {
    /// It has not joined yet.
    Expected,
    /// It is one.
    Member,
    /// Its guest ended by itself.
    Ended,
    /// It failed when nothing could take its place.
    Lost,
}

/// How a standby is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StandbyStatusV1 {
    /// Endpoint of the agent of its host.
    pub host: String,
    /// Which process it is.
    pub incarnation: u32,
    /// Whether it has a link to the coordinator.
    pub connected: bool,
}

/// How long a recovery took, in ns, from one step to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecoveryV1 {
    /// The cut that all went back to.
    pub cut: u64,
    /// Names of the members that failed.
    pub lost: Vec<String>,
    /// From the last that was heard of the first of them until it was taken for dead.
    pub detect_ns: u64,
    /// Until the journal said what is done.
    pub decide_ns: u64,
    /// Until all stood at the cut.
    pub restore_ns: Option<u64>,
    /// Until all ran.
    pub resume_ns: Option<u64>,
}

/// A checkpoint that is to be stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequestV1 {
    /// Directory of checkpoints, named from the root, which exists on the hosts of all members and of the coordinator.
    pub store: String,
    /// What it is to be called: 1 to 55 letters, digits, '-', '_' or '.', the first not a '.'.
    pub name: String,
    /// Save all, also if there is one in the same place that it could be built on.
    #[serde(default)]
    pub full: bool,
    /// Compress with zstd at this level, 1 (fast) to 19.
    #[serde(default)]
    pub compress: Option<i32>,
}

/// A checkpoint of a group that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointV1 {
    /// Name of the group.
    pub group: String,
    /// Name of the checkpoint.
    pub name: String,
    /// When it was complete: seconds since the beginning of 1970 (UTC).
    pub created_unix_s: u64,
    /// The cut that all of it is of.
    pub cut: u64,
    /// The generation that the group was in.
    pub generation: u64,
    /// Its members.
    pub members: Vec<CheckpointMemberV1>,
}

/// A member in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointMemberV1 {
    /// Name of its VM.
    pub vm: String,
    /// Name of its snapshot, in the directory `GROUP/vms/VM` of the store.
    pub snapshot: String,
    /// Id of that: a UUID.
    pub id: String,
    /// Name of the snapshot it is built on.
    pub parent: Option<String>,
    /// Bytes of its files.
    pub file_bytes: u64,
    /// How long the guest stood still for the cut.
    pub pause_ns: u64,
}
