//! Snapshots of a cut: what a member keeps of the cut of its group for the store, in the same pause as for its standby.
//!
//! ```text
//!  thread "snapshot"   prepare ──► Prepared                                    ┌─► copy, behind the running guest
//!                                     │ the member is told                     │
//!  state driver                     waits ─ catch_up ─┤ the cut's pause: keep ├┘
//!                                            runs       stands still
//! ```
//! Preparing takes time that grows with memory, in which the group goes on taking other cuts; the cut itself takes hardly
//! longer than any. Such a snapshot continues the chain of the member's last one in the same place where that can be.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use cutover_snapshot::chain::{self, CHAIN_MAX};
use cutover_snapshot::error::Error as SnapshotError;
use uuid::Uuid;

use super::base::Base;
use super::create::Prepared;
use super::request::{Disks, Kind, SnapshotRequest, Target};
use crate::Error;

/// A snapshot to be made of a cut. It has the disks that the guest can write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutSnapshot {
    /// What it is called when there is something to tell of it.
    pub id: Uuid,
    /// A directory, which exists.
    pub root: PathBuf,
    /// Directory of the chain, in that one. It is made if there is none.
    pub chain: PathBuf,
    /// What the snapshot is called there.
    pub name: String,
    /// Save all, also if there is a snapshot it could be built on.
    pub full: bool,
    /// As in [`SnapshotRequest::compress`].
    pub compress: Option<i32>,
}

/// Where the chain is that a snapshot continues or begins.
pub struct Chain {
    root: PathBuf,
    path: PathBuf,
    full: bool,
}

/// A snapshot that waits for its cut.
pub struct AtCut {
    /// Which it is.
    pub id: Uuid,
    stage: Stage,
}

enum Stage {
    /// It is being prepared; then this is called.
    Preparing(Box<dyn FnOnce() + Send>),
    /// It is, and which cut it is to be of is not known yet, or this one.
    Prepared(Box<Prepared>, Option<u64>),
    /// The cut was taken, or is not wanted any more.
    Over,
}

impl CutSnapshot {
    /// Its directory.
    pub fn path(&self) -> PathBuf {
        self.root.join(&self.chain).join(&self.name)
    }

    /// How it is asked for.
    pub(super) fn request(&self) -> SnapshotRequest {
        SnapshotRequest {
            target: Target::Store {
                store: self.root.join(&self.chain),
                name: self.name.clone(),
            },
            // Until the chain was looked at.
            kind: Kind::Full,
            disks: Disks::Copied,
            compress: self.compress,
        }
    }

    /// Where its chain is.
    pub(super) fn chain(&self) -> Chain {
        Chain {
            root: self.root.clone(),
            path: self.root.join(&self.chain),
            full: self.full,
        }
    }
}

impl Chain {
    /// How much the next snapshot has to have, of a VM that knows what changed since `base`. Makes the directory.
    ///
    /// # Errors
    /// There is no directory for it, and none can be made.
    pub fn kind_of_next(&self, base: &Base) -> Result<Kind, Error> {
        self.make()?;
        let last = base.last().filter(|_| !self.full);
        let continues = last.is_some_and(|last| {
            // One that is damaged, deleted, or somewhere else is not built on.
            chain::Chain::open(&self.path.join(&last.name))
                .is_ok_and(|chain| chain.newest().id() == last.id && chain.snapshots().len() < CHAIN_MAX)
        });
        Ok(match continues {
            true => Kind::Incremental,
            false => Kind::Full,
        })
    }

    /// Makes the directory, permanently; but not the one all is in: if that is missing, something is not mounted.
    fn make(&self) -> Result<(), Error> {
        let opened = File::open(&self.root);
        opened.map_err(SnapshotError::io("open it as a directory of checkpoints", &self.root))?;
        let made = fs::create_dir_all(&self.path);
        made.map_err(SnapshotError::io("make it", &self.path))?;
        let above = self.path.ancestors().skip(1);
        for dir in above.take_while(|dir| dir.starts_with(&self.root)) {
            sync(dir)?;
        }
        Ok(())
    }
}

fn sync(dir: &Path) -> Result<(), SnapshotError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(SnapshotError::io("sync it", dir))
}

impl AtCut {
    /// Snapshot `id`, which is being prepared; then `told` is called.
    pub fn new(id: Uuid, told: Box<dyn FnOnce() + Send>) -> Self {
        Self {
            id,
            stage: Stage::Preparing(told),
        }
    }

    /// It is `prepared`.
    pub fn is_prepared(&mut self, prepared: Box<Prepared>) {
        if let Stage::Preparing(told) = std::mem::replace(&mut self.stage, Stage::Prepared(prepared, None)) {
            told();
        }
    }

    /// It is to be of cut `cut`, if it is prepared by then.
    pub fn expect(&mut self, cut: u64) {
        if let Stage::Prepared(_, expected) = &mut self.stage {
            *expected = Some(cut);
        }
    }

    /// Does what shortens the pause of cut `cut`, if it is to be of that.
    ///
    /// # Errors
    /// It cannot be of the cut any more.
    pub fn catch_up(&mut self, cut: u64) -> Result<(), Error> {
        match &mut self.stage {
            Stage::Prepared(prepared, Some(expected)) if *expected == cut => {
                prepared.catch_up().inspect_err(|_| self.stage = Stage::Over)
            }
            _ => Ok(()),
        }
    }

    /// What is to be kept in the pause of cut `cut`, if it is to be of that.
    pub fn take(&mut self, cut: u64) -> Option<Prepared> {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Prepared(prepared, Some(expected)) if expected == cut => Some(*prepared),
            other => {
                self.stage = other;
                None
            }
        }
    }

    /// It is not wanted any more; says whether it waited for its cut.
    pub fn give_up(&mut self) -> bool {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Prepared(..) => true,
            // When it is prepared, it is asked whether it is wanted.
            Stage::Preparing(_) | Stage::Over => false,
        }
    }
}
