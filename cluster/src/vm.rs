//! What a member's VM and a standby are to this crate: what the runtimes drive, and what they hear of.
//!
//! ```text
//!  MemberVm   seed ► block ► take ► validate ► permanent        an epoch that becomes permanent
//!                    block ► take ► invalidate                  one that does not: the next covers both
//!                    … ► roll_back ► resume ► unprotect         back to the last permanent cut
//!                    … ► fence ► resume                         nobody knows whether this VM is still the one
//!                    … ► unprotect                              on its own
//!             prepare_snapshot ► … ► snapshot_at ► block ► take  a cut that is stored as well
//!  StandbyVm  permanent ► permanent ► promote                   from there on a MemberVm, after its roll_back
//! ```
//! All calls of one object come from one thread, and each returns when what it says is done.

use std::error::Error as StdError;

use cutover_snapshot::spec::MacAddr;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointId, Order, StoredSnapshot};
use crate::id::Epoch;

/// What went wrong in the VM or its host; its message says in full what and where.
pub type VmError = Box<dyn StdError + Send + Sync>;

/// Where a standby listens for what it is to be a copy of: an
/// [endpoint](cutover_migration::transport::Endpoint) as text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StandbyAddress(pub String);

/// What it took to take a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CutReport {
    /// How long the guest stood still, in nanoseconds.
    pub pause_ns: u64,
    /// Pages that were written in the epoch.
    pub dirty_pages: u64,
    /// Bytes of disks that were written in the epoch.
    pub disk_bytes: u64,
}

/// How a member's VM is doing, as its group's status shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Frames that are held.
    pub held_frames: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// How long the guest stood still for the last cut, in nanoseconds.
    pub pause_ns: u64,
    /// Pages that were written in the last epoch.
    pub dirty_pages: u64,
    /// Epochs that were cut and that the standby does not hold yet.
    pub lag: u64,
    /// Bytes that were sent to the standby since the VM has one.
    pub shipped_bytes: u64,
    /// Bytes of the snapshot that is being stored that are copied.
    pub stored_bytes: u64,
    /// Bytes that it copies in all; 0 if there is none, or it is not known yet.
    pub to_store_bytes: u64,
}

/// A member's VM.
///
/// # Errors
/// Of all methods: what the VM or its host could not do. The VM is then as it was before the call, but for
/// [`roll_back`](Self::roll_back) and [`resume`](Self::resume), after which it is of no use any more.
pub trait MemberVm: Send {
    /// Addresses of its network devices: frames between those of a group stay in it.
    fn macs(&self) -> Vec<MacAddr>;

    /// Brings the standby `to` up to a state from which an epoch is small, while the guest runs. The cut of `epoch` is
    /// the first that may follow. Output is not held by that: the first [`block`](Self::block) afterwards begins to.
    fn seed(&mut self, to: &StandbyAddress, group: &[MacAddr], epoch: Epoch) -> Result<(), VmError>;

    /// From here on the guest sends nothing, not even to members: all is held.
    fn block(&mut self, epoch: Epoch) -> Result<(), VmError>;

    /// Takes the cut that ends `epoch`: the guest stands still for that, and then runs the next one.
    fn take(&mut self, epoch: Epoch) -> Result<CutReport, VmError>;

    /// All members have taken theirs: frames to members leave, and the epoch is sent to the standby in the background.
    /// [`Notice::Holds`] follows.
    fn validate(&mut self, epoch: Epoch) -> Result<(), VmError>;

    /// The cut, whether taken or not, does not count: the next will cover it too. Frames to members leave.
    fn invalidate(&mut self, epoch: Epoch) -> Result<(), VmError>;

    /// All standbys hold the epoch: what was held of it and of those before leaves, in order.
    fn permanent(&mut self, epoch: Epoch) -> Result<(), VmError>;

    /// Begins to prepare a snapshot that is to be of a cut, while the guest runs and others are taken. Returns when that has
    /// begun; [`Notice::SnapshotPrepared`] and [`Notice::SnapshotOver`] follow, or only that.
    fn prepare_snapshot(&mut self, order: &Order) -> Result<(), VmError>;

    /// The snapshot that is prepared is to be of the cut of `epoch`, which is taken next.
    fn snapshot_at(&mut self, epoch: Epoch) -> Result<(), VmError>;

    /// This snapshot is not wanted any more.
    fn no_snapshot(&mut self, id: CheckpointId) -> Result<(), VmError>;

    /// Goes back to what the VM was at `cut`, the last that was said to be permanent, and stands still there. What was held since is dropped, and
    /// so is what waits to be received: it is of a future that there will not be.
    fn roll_back(&mut self, cut: Epoch) -> Result<(), VmError>;

    /// Goes on, after a rollback, a promotion or a fence: tells the network where the VM is, and runs it. What waits to
    /// be received after a rollback or promotion is dropped first: it was sent before all stood still.
    fn resume(&mut self) -> Result<(), VmError>;

    /// The vCPUs stop, and what is held stays so.
    fn fence(&mut self) -> Result<(), VmError>;

    /// The VM is on its own: all that is held leaves in order, and nothing is kept for a rollback; the standby is let go of.
    /// May be called whenever it runs, or after it ended, and changes nothing if it is on its own already.
    fn unprotect(&mut self) -> Result<(), VmError>;

    /// How it is doing.
    fn status(&self) -> MemberStatus;
}

/// What a member's VM tells by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// The standby holds this epoch.
    Holds(Epoch),
    /// The standby is gone, or cannot be reached.
    StandbyLost(String),
    /// So much output is held that the guest will soon have to wait: a checkpoint would help.
    OutputWaits,
    /// The snapshot for this checkpoint can be of a cut now.
    SnapshotPrepared(CheckpointId),
    /// It is permanent; or there is none, and why.
    SnapshotOver(CheckpointId, Result<StoredSnapshot, String>),
    /// The guest ended by itself, such as that it was shut down: why.
    GuestEnded(String),
    /// The guest failed, such as by a panic, which its group wants to be taken for the failure of a host.
    GuestFailed(String),
}

/// A complete image of a member's VM, and a machine that waits to run it.
///
/// # Errors
/// Of all methods: what the host could not do. The standby is then of no use any more.
pub trait StandbyVm: Send {
    /// What it is after its promotion.
    type Member: MemberVm;

    /// The epochs it holds up to `epoch` are permanent: the image becomes what they say.
    fn permanent(&mut self, epoch: Epoch) -> Result<(), VmError>;

    /// Becomes the VM as it was at `cut`, which stands still until [`MemberVm::resume`]. What is held of later epochs is
    /// dropped.
    fn promote(self, cut: Epoch) -> Result<Self::Member, VmError>;
}

/// What a standby tells by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StandbyNotice {
    /// Its image is that of a VM, but for the next epoch.
    Seeded,
    /// It holds this epoch.
    Holds(Epoch),
    /// The VM it is a copy of is gone, or cannot be reached.
    PrimaryLost(String),
}
