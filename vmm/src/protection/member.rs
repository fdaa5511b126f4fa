//! A VM that somebody speaks for in a group, as its state driver sees it.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use cutover_devices::CheckpointSoon;
use cutover_devices::virtio::net::{Held, MacTable};

use super::disks::Disks;
use super::request::{CutReport, MemberStatus, Notice};
use super::shipping::{Seeded, SharedCuts, Shipping};
use crate::Error;
use crate::control::{JobStep, Mailbox};
use crate::dirty::Consumer;
use crate::driver::Options;
use crate::lifecycle::Exit;
use crate::machine::confined;
use crate::seccomp::ThreadKind;
use crate::snapshot::SnapshotProgress;
use crate::state::MachineState;

/// See the module. Dropping it ends its thread.
pub struct Member {
    notices: Sender<Notice>,
    /// Sends what its name says.
    pub shipping: Option<Shipping>,
    mailbox: Arc<Mailbox>,
    /// Whether a standby is being brought up to date.
    pub seeding: bool,
    /// How it is protected, if it is.
    pub guard: Option<Guard>,
    /// The last cut.
    pub last: CutReport,
    /// How many there were.
    pub cuts: u64,
    /// How its guest has ended, if it has while its group could still go back to before that.
    pub over: Option<Exit>,
}

/// How a VM is protected.
pub struct Guard {
    /// What changes in its memory.
    pub changes: Consumer,
    /// Its cuts.
    pub cuts: SharedCuts,
    /// How far the protection of its disks is.
    pub disks: Disks,
    /// Addresses of all members of its group.
    pub group: Arc<MacTable>,
    /// Where its standby is.
    pub to: String,
    /// What becomes of what it sends.
    pub output: Output,
    /// Whether there was a permanent cut.
    pub has_way_back: bool,
}

/// What becomes of what a protected VM sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// It leaves: the first cut is to come.
    Open,
    /// It waits until its epoch is permanent, unless it goes to a member.
    Held,
    /// It waits until it is decided about this cut.
    Blocked(u64),
}

/// A machine that is to be as it was at a cut.
pub struct WayBack {
    /// Which.
    pub cut: u64,
    /// vCPUs and devices, as they were there.
    pub state: MachineState,
    /// How much of the guest's time has passed since, in ns.
    pub passed_ns: u64,
}

impl Member {
    /// One that is not protected; what it tells by itself goes to `notices`.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn begin(mailbox: &Arc<Mailbox>, notices: Sender<Notice>, options: &Options) -> Result<Self, Error> {
        let on_thread = confined(options, ThreadKind::Checkpoint);
        Ok(Self {
            shipping: Some(Shipping::start(mailbox, notices.clone(), on_thread)?),
            notices,
            mailbox: mailbox.clone(),
            seeding: false,
            guard: None,
            last: CutReport::default(),
            cuts: 0,
            over: None,
        })
    }

    /// Whether it is protected, or about to be.
    pub fn is_protected(&self) -> bool {
        self.seeding || self.guard.is_some()
    }

    /// Whether it can go back to a cut.
    pub fn has_way_back(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| guard.has_way_back)
    }

    /// It is protected from here on.
    pub fn guard(&mut self, seeded: Seeded) {
        let Seeded {
            changes,
            cuts,
            disks,
            group,
            to,
        } = seeded;
        self.guard = Some(Guard {
            changes,
            cuts,
            disks,
            group,
            to,
            output: Output::Open,
            has_way_back: false,
        });
    }

    /// What is called when the next cut is wanted early.
    pub fn soon(&self) -> CheckpointSoon {
        let notices = self.notices.clone();
        Arc::new(move || {
            // As in `tell`.
            let _ = notices.send(Notice::OutputWaits);
        })
    }

    /// Tells whoever speaks for it.
    pub fn tell(&self, notice: Notice) {
        // Whoever does not listen any more ends it soon.
        let _ = self.notices.send(notice);
    }

    /// Where notices go.
    pub fn notices(&self) -> Sender<Notice> {
        self.notices.clone()
    }

    /// How it does, with this held of what it sends, and a snapshot this far.
    pub fn status(&self, held: Held, snapshot: SnapshotProgress) -> MemberStatus {
        let guard = self.guard.as_ref();
        let (permanent, lag) = guard.map_or((None, 0), |guard| {
            let cuts = guard.cuts.lock();
            (cuts.permanent(), cuts.lag())
        });
        MemberStatus {
            held_frames: held.frames as u64,
            held_bytes: held.bytes as u64,
            pause_ns: self.last.pause_ns,
            dirty_pages: self.last.dirty_pages,
            permanent: permanent.unwrap_or(0),
            lag: lag as u64,
            cuts: self.cuts,
            shipped_bytes: self.shipping.as_ref().map_or(0, |shipping| shipping.sent_bytes()),
            stored_bytes: snapshot.done,
            to_store_bytes: snapshot.total,
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shipping = None;
        // Whoever waits for a standby to be brought up to date learns that it is not.
        while self
            .mailbox
            .take_step(|step| matches!(step, JobStep::Protection(_)))
            .is_some()
        {}
    }
}
