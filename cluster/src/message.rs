//! What coordinator, members, standbys and agents say to each other.
//!
//! A group is formed, and protected from the first cut that is permanent:
//! ```text
//!  coordinator             agent of the VM's host     agent of a backup host       member            standby
//!  Join{seat, vm} ───────► has the VM join
//!                                                                  Hello{seat} ◄── (its runtime calls)
//!  Welcome ──────────────────────────────────────────────────────────────────────►
//!  StartStandby{seat} ──────────────────────────────► starts a process
//!                                                        Hello{seat} ◄────────────────────────────── (calls)
//!                     Started{address} ◄────────────
//!  SeedTo{address, epoch} ───────────────────────────────────────────────────────► ══ its image ══════►
//!                                                                       Seeded ◄──
//! ```
//! A cut, of all members at once. No member sends anything from when it answers `YesAck` until it hears `Validate` or
//! `Invalid`, so nothing is received before a cut that was sent after one; nothing leaves the group before the cut that
//! ends its epoch is `Permanent`:
//! ```text
//!  coordinator                              member                                  standby
//!  CheckpointRequest(n) ──────────────────► holds all output
//!                  ◄─────────────── YesAck(n)
//!  (all) TakeTentative(n) ────────────────► stops for it, runs on
//!                  ◄──────────── Tentative(n, report)
//!  (all) Validate(n) ─────────────────────► frames to members leave ══ epoch n ═══════► keeps it
//!                  ◄─────── CheckpointSuccess(n)                          ◄════ holds it
//!  (all) the journal says: n is permanent
//!  Permanent(n) ──────────────────────────► output of epochs ≤ n leaves
//!  Permanent(n) ────────────────────────────────────────────────────────────────────► applies what it holds ≤ n
//!
//!  Invalid(n), if anyone fails or is late before Validate(n) is said: all go on, and n+1 covers both
//! ```
//! A failure, after which the group is in generation g+1, which the journal says before anyone is told:
//! ```text
//!  coordinator                              survivor                    standby of the one that failed
//!  RollBack(n) ───────────────────────────► goes back to n
//!  Promote(n) ────────────────────────────────────────────────────────► becomes the VM as of n
//!                  ◄──────────────── AtCut(n) ◄─────────────── AtCut(n)
//!  (all) the journal says: they go on, unprotected, as one of them has no standby now
//!  Unprotect(m) ──────────────────────────► runs; its output leaves     runs
//!  End ───────────► the other standbys; new ones are started, and it goes on from there
//! ```
//! A checkpoint that is stored as well; it lives in one generation (see [`checkpoint`](crate::checkpoint)):
//! ```text
//!  PrepareSnapshot(id) ───────────────────► prepares it, runs on; other cuts are taken meanwhile
//!                  ◄──── SnapshotPrepared(id)
//!  (all) SnapshotAt(n), and cut n as above ► in the pause of cut n, keeps it; runs on, copies it
//!                  ◄─────── SnapshotOver(id)
//!  (all, and n is permanent) there is a checkpoint
//!  NoSnapshot(id), if anyone fails
//! ```
//! If a standby is lost, `Unprotect` comes without the rest, once the journal says so.
//!
//! Everything may come late, twice or never: the number of the cut and the generation say whether it still counts, doing
//! anything twice is doing it once, and each [`Heartbeat`](FromSeat::Heartbeat) tells where its sender stands, so that the
//! coordinator says again what was lost.

use std::path::PathBuf;

use cutover_snapshot::spec::MacAddr;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointId, Order, StoredSnapshot};
use crate::id::{Epoch, Generation, GroupId, Host, Seat};
use crate::spec::Timing;
use crate::vm::{CutReport, MemberStatus, StandbyAddress};

/// A message of a group, in a generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// Whose it is.
    pub group: GroupId,
    /// The generation of who says it. A lower one than the hearer's is not heard.
    pub generation: Generation,
    /// What is said.
    pub body: T,
}

/// What a link to the coordinator opens with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hello {
    /// A member or a standby calls, the first time or again.
    Seat(Envelope<SeatHello>),
    /// An agent calls.
    Agent(AgentHello),
}

/// What a member or a standby says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SeatHello {
    /// Who it is.
    pub seat: Seat,
    /// Where.
    pub host: Host,
    /// Addresses of its network devices; a standby need not know them.
    pub macs: Vec<MacAddr>,
    /// Where it stands.
    pub standing: Standing,
}

/// What an agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AgentHello {
    /// The host it is the agent of.
    pub host: Host,
    /// Processes of groups that run there.
    pub seats: Vec<(GroupId, Seat)>,
}

/// Where a member or a standby stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Standing {
    /// What it is at.
    pub stage: Stage,
    /// The highest cut it has heard of.
    pub cut: Epoch,
    /// The highest it has heard to be permanent.
    pub permanent: Epoch,
}

/// What a member or a standby is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stage {
    /// A member on its own: nothing of it is held, and it has no standby that counts.
    Open,
    /// Its image is on its way to a standby.
    Seeding,
    /// Between cuts.
    Ready,
    /// It is about to hold all its output, for a cut.
    Blocking,
    /// It holds all its output.
    Blocked,
    /// It is taking the cut.
    Taking,
    /// It has taken the cut.
    Tentative,
    /// The cut is on its way to the standby.
    Shipping,
    /// The standby holds the cut.
    Held,
    /// Its guest has ended by itself: at the cut, there is nothing to take.
    Ended,
    /// It is going back to the cut, or being promoted at it.
    GoingBack,
    /// It stands still at the cut.
    AtCut,
    /// A standby whose image is not whole.
    Empty,
    /// A standby whose image is whole.
    Whole,
}

/// What the coordinator says to a member or a standby.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ToSeat {
    /// It is one of the group.
    Welcome {
        /// How long everything may take.
        timing: Timing,
    },
    /// The answer to a heartbeat: the lease runs from when that was sent.
    Lease {
        /// The heartbeat's own time.
        sent: u64,
    },
    /// To a member: bring a standby up.
    SeedTo(Seeding),
    /// `CHKP_REQ`: hold all output.
    CheckpointRequest(Epoch),
    /// Take the cut.
    TakeTentative(Epoch),
    /// `VALIDATE`: all have taken it.
    Validate(Epoch),
    /// `INVALID`: not all have.
    Invalid(Epoch),
    /// All standbys hold it, and the journal says so.
    Permanent(Epoch),
    /// Go back to the cut.
    RollBack(Epoch),
    /// To a standby: be the member, as of the cut.
    Promote(Epoch),
    /// To a member: prepare a snapshot that is to be of a cut.
    PrepareSnapshot(Order),
    /// To a member: it is to be of this cut, which is asked for next.
    SnapshotAt(Epoch),
    /// To a member: nothing comes of this checkpoint.
    NoSnapshot(CheckpointId),
    /// To a member: it is on its own. It runs, also if it stood at a cut, and what it holds leaves. The number is one of a
    /// cut, that is none: whoever has heard of a higher one does not do so any more.
    Unprotect(Epoch),
    /// It is not of the group any more: another is in its place, or the group was dissolved.
    End(Ending),
}

/// How a standby comes to have its image.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Seeding {
    /// Which standby.
    pub standby: Seat,
    /// Where it is.
    pub address: StandbyAddress,
    /// Addresses of all members.
    pub macs: Vec<MacAddr>,
    /// The first cut that may follow.
    pub epoch: Epoch,
}

/// Why a process is not of its group any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Ending {
    /// The group was dissolved, or the member left it: a VM goes on, on its own; a standby ends.
    Released,
    /// Another incarnation is the member now, or the standby is not wanted: the process ends, and runs nothing meanwhile.
    Replaced,
}

/// What a member or a standby says to the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FromSeat {
    /// It is there.
    Heartbeat {
        /// When, by its own clock, in nanoseconds from a time of its own.
        sent: u64,
        /// Where it stands.
        standing: Standing,
        /// How its VM is doing; of a standby all zero.
        status: MemberStatus,
    },
    /// The standby has its image.
    Seeded {
        /// Which.
        standby: Seat,
    },
    /// All its output is held.
    YesAck(Epoch),
    /// What came of taking the cut.
    Tentative(Epoch, Taken),
    /// `CHKP_SUC`: its standby holds the epoch.
    CheckpointSuccess(Epoch),
    /// It stands at the cut.
    AtCut(Epoch),
    /// A member's standby is gone, or cannot be reached.
    StandbyLost {
        /// Which.
        standby: Seat,
        /// Why.
        reason: String,
    },
    /// Its snapshot for this checkpoint can be of a cut.
    SnapshotPrepared(CheckpointId),
    /// Its snapshot is permanent; or there is none, and why.
    SnapshotOver(CheckpointId, Result<StoredSnapshot, String>),
    /// A member holds so much output that a cut would help.
    OutputWaits,
    /// The guest ended by itself.
    GuestEnded {
        /// Why.
        reason: String,
    },
    /// It can do its part no longer: a VM that is to be taken for dead.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What came of taking a cut.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Taken {
    /// It is taken.
    Cut(CutReport),
    /// The guest had ended: if the cut becomes permanent, it is a member no more.
    Ended,
    /// It is not.
    Failed(String),
}

/// What the coordinator says to the agent of a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ToAgent {
    /// Have a VM of this host join.
    Join {
        /// As whom.
        seat: Seat,
        /// The VM's name.
        vm: String,
        /// Start it from this snapshot first, paused, if it does not run.
        restore: Option<PathBuf>,
    },
    /// Let a VM of this host run that was started paused.
    Resume {
        /// Whose it is.
        seat: Seat,
        /// The VM's name.
        vm: String,
    },
    /// Start a process that waits for an image.
    StartStandby {
        /// As whom.
        seat: Seat,
        /// Name of the VM it will be a standby of.
        vm: String,
    },
    /// End the process of this seat, if it is there, whatever it does.
    Kill {
        /// Which.
        seat: Seat,
    },
}

/// What an agent says to the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FromAgent {
    /// The standby waits.
    Started {
        /// Which.
        seat: Seat,
        /// Where.
        address: StandbyAddress,
    },
    /// The VM cannot join, or no standby be started.
    Refused {
        /// Who.
        seat: Seat,
        /// Why.
        reason: String,
    },
    /// The process is gone: certain, as its parent or its pidfd says so.
    Died {
        /// Which.
        seat: Seat,
        /// Why, as far as that is known.
        reason: String,
    },
}

impl ToSeat {
    /// The number of the cut it is about, or that it has instead.
    pub fn cut(&self) -> Option<Epoch> {
        match self {
            &(Self::CheckpointRequest(cut)
            | Self::TakeTentative(cut)
            | Self::Validate(cut)
            | Self::Invalid(cut)
            | Self::Permanent(cut)
            | Self::RollBack(cut)
            | Self::Promote(cut)
            | Self::Unprotect(cut)) => Some(cut),
            Self::SeedTo(seeding) => Some(seeding.epoch),
            Self::PrepareSnapshot(_) | Self::SnapshotAt(_) | Self::NoSnapshot(_) => None,
            Self::Welcome { .. } | Self::Lease { .. } | Self::End(_) => None,
        }
    }
}
