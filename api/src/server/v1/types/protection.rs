//! What goes over the wire about a VM that is a member of a group.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The group that a VM is to join. Coordinators ask for that, by the agent of the VM's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProtectionV1 {
    /// The group: a UUID.
    pub group: String,
    /// Which of its members the VM is to be.
    pub member: u16,
    /// Which of the processes that were ever to have that member's VM this is.
    pub incarnation: u32,
    /// What the coordinator calls this host.
    pub host: String,
    /// Where the coordinator listens: `tls://host:port`, `tcp://host:port`, or `unix:PATH`.
    pub coordinator: String,
    /// Allow `tcp://`, where anyone on the way can read and change what is sent.
    #[serde(default)]
    pub insecure: bool,
    /// Directory with this host's certificate, for `tls://`.
    #[serde(default)]
    pub tls_dir: Option<String>,
}

/// Whether a VM is a member of a group, and how it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProtectionStatusV1 {
    /// Of a member: how it does.
    pub member: Option<MembershipV1>,
}

/// How a member of a group does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MembershipV1 {
    /// The group: a UUID.
    pub group: String,
    /// Which of its members the VM is.
    pub member: u16,
    /// Which of the processes that were ever to have that member's VM this is.
    pub incarnation: u32,
    /// Where the coordinator listens.
    pub coordinator: String,
    /// Whether there is a link to it.
    pub connected: bool,
    /// The generation of the group, as far as it is known here.
    pub generation: u64,
    /// What it is at.
    pub stage: ProtectionStageV1,
    /// The last cut that it was told of.
    pub cut: u64,
    /// The last that it was told to be permanent.
    pub permanent: u64,
    /// Frames that wait to be sent until a cut is permanent.
    pub held_frames: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// How long the guest stood still for the last cut.
    pub pause_ns: u64,
    /// Pages that were written in the last epoch.
    pub dirty_pages: u64,
    /// Cuts that its standby does not hold yet.
    pub lag: u64,
    /// Bytes sent to its standby.
    pub shipped_bytes: u64,
}

/// What a member is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProtectionStageV1 {
    /// On its own: nothing of it is held, and no standby counts.
    Open,
    /// Its memory and disks are on their way to a standby.
    Seeding,
    /// Between two cuts.
    Ready,
    /// It is about to hold all it sends, for a cut.
    Blocking,
    /// It holds that.
    Blocked,
    /// It is taking the cut.
    Taking,
    /// The cut is taken.
    Tentative,
    /// The cut is on its way to the standby.
    Shipping,
    /// The standby has it.
    Held,
    /// Its guest has ended by itself.
    Ended,
    /// It goes back to the last permanent cut.
    GoingBack,
    /// It is as it was then, and stands still.
    AtCut,
    /// It is no member yet, but keeps the image of one.
    Standby,
}
