//! What can be asked of a protected VM, and what it tells.

use std::path::PathBuf;

use cutover_migration::epoch::Options;
use cutover_migration::transport::Endpoint;
use cutover_snapshot::spec::MacAddr;
use serde::Serialize;
use uuid::Uuid;

use crate::lifecycle::Exit;
use crate::snapshot::{CutSnapshot, SnapshotReport};

/// Where a standby listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbyAddress {
    /// Its endpoint. That a link is not protected (`tcp://`) is for whoever asks to allow.
    pub endpoint: Endpoint,
    /// Directory with this host's [certificate](cutover_migration::transport::tls). Endpoints with TLS need it.
    pub tls: Option<PathBuf>,
    /// How the link is to be.
    pub link: Options,
}

/// What a protected VM tells by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The standby holds all of this epoch.
    Holds(u64),
    /// The standby, or the link to it, is gone: why.
    StandbyLost(String),
    /// What waits to be sent, or to be undone, is near its limit: the next cut is wanted early.
    OutputWaits,
    /// This snapshot can be of a cut now.
    SnapshotPrepared(Uuid),
    /// This one is permanent, or there is nothing of it, and why.
    SnapshotOver(Uuid, Result<Box<SnapshotReport>, String>),
    /// The guest has come to its end in order: how.
    GuestEnded(String),
    /// The guest, or its monitor, failed.
    GuestFailed(String),
}

impl Notice {
    /// What there is to tell of a VM that ended like this.
    pub(crate) fn of_exit(exit: Exit) -> Self {
        match exit {
            Exit::Shutdown => Self::GuestEnded("the guest powered itself off".to_owned()),
            Exit::Reboot => Self::GuestEnded("the guest asked for a reset".to_owned()),
            Exit::Ended => Self::GuestEnded("the VM was ended by force".to_owned()),
            Exit::Migrated => Self::GuestEnded("the VM goes on under another monitor".to_owned()),
            Exit::Panic => Self::GuestFailed("the guest's kernel panicked".to_owned()),
        }
    }
}

/// What there is to tell of a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CutReport {
    /// How long the guest stood still, in ns.
    pub pause_ns: u64,
    /// Pages of memory in it.
    pub dirty_pages: u64,
    /// Bytes of disks in it.
    pub disk_bytes: u64,
}

/// How the protection of a VM does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemberStatus {
    /// Frames that wait to be sent.
    pub held_frames: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// How long the guest stood still for the last cut, in ns.
    pub pause_ns: u64,
    /// Pages of memory in the last cut.
    pub dirty_pages: u64,
    /// The last permanent cut; 0 before the first.
    pub permanent: u64,
    /// Cuts that are valid or tentative, and not permanent.
    pub lag: u64,
    /// Cuts taken so far.
    pub cuts: u64,
    /// Bytes sent to standbys so far.
    pub shipped_bytes: u64,
    /// Bytes of the snapshot that is being made that are copied.
    pub stored_bytes: u64,
    /// Bytes that it copies in all; 0 if there is none, or it is not known yet.
    pub to_store_bytes: u64,
}

/// What the state driver does for a protected VM, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Bring the standby up to date while the guest runs. Until the first cut is permanent, there is no way back.
    Seed {
        /// Where it is.
        to: StandbyAddress,
        /// Addresses of all members of the group: frames between them are held only while [blocked](Self::Block).
        group: Vec<MacAddr>,
    },
    /// Hold all the guest sends, in this epoch.
    Block(u64),
    /// The cut with this number is valid: frames between members may leave, and the standby gets it.
    Validate(u64),
    /// Nothing comes of the cut with this number: the next one covers it.
    Invalidate(u64),
    /// All may rely on the cut with this number.
    Permanent(u64),
    /// Prepare a snapshot that is to be of a cut.
    PrepareSnapshot(CutSnapshot),
    /// It is to be of the cut with this number.
    SnapshotAt(u64),
    /// This one is not wanted.
    NoSnapshot(Uuid),
    /// Stand still: it is not certain that this VM may run.
    Fence,
    /// Be again as at the cut with this number, and stand still.
    RollBack(u64),
    /// Go on, after a fence, a way back, or a promotion.
    Resume,
    /// Protect it no more: all that is held is sent.
    Leave,
    /// Nobody speaks for the VM any more: if it is protected, nobody can say whether it may run.
    End,
}
