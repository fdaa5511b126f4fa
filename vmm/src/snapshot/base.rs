//! What the next incremental snapshot is built on: the last one, and the consumers that know what changed since.
//!
//! Snapshots in a store and those in Firecracker's two files are built on different ones, so each kind has a base of its
//! own: what one of them has saved is still news to the other.

use std::sync::{Arc, Mutex, PoisonError};

use cutover_snapshot::manifest::Parent;

use super::disks::DiskTracks;
use super::request::{Kind, Source, Target};
use crate::Error;
use crate::dirty::{Baseline, Consumer};
use crate::machine::Machine;

/// See the module. Memory and disks are tracked for as long as it lives.
pub struct Base {
    /// Knows which pages changed.
    pub memory: Consumer,
    /// Knows which parts of the disks changed.
    pub disks: DiskTracks,
    /// The last snapshot, if that can be built on.
    last: Mutex<Option<Parent>>,
}

impl Base {
    /// Begins to track. With [`Baseline::Nothing`], all of memory is news.
    ///
    /// # Errors
    /// KVM refused to.
    pub fn begin(machine: &Machine, baseline: Baseline) -> Result<Self, Error> {
        Ok(Self {
            memory: machine.tracker.register(baseline)?,
            disks: DiskTracks::register(&machine.devices, baseline),
            last: Mutex::default(),
        })
    }

    /// From now on, snapshots are built on `last`.
    pub fn build_on(&self, last: Parent) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(last);
    }

    /// What a snapshot of `kind` that goes to `target` is built on.
    ///
    /// # Errors
    /// There is nothing that an incremental one could be built on.
    pub fn parent(&self, kind: Kind, target: &Target) -> Result<Option<Parent>, Error> {
        if kind == Kind::Full || matches!(target, Target::Files { .. }) {
            return Ok(None);
        }
        self.last().map(Some).ok_or(Error::NoBase)
    }

    /// The last snapshot, if that can be built on.
    pub fn last(&self) -> Option<Parent> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The bases of both kinds.
#[derive(Default)]
pub struct Bases {
    store: Option<Arc<Base>>,
    files: Option<Arc<Base>>,
}

impl Bases {
    /// The place for the base of snapshots that go to `target`.
    pub fn of(&mut self, target: &Target) -> &mut Option<Arc<Base>> {
        match target {
            Target::Store { .. } => &mut self.store,
            Target::Files { .. } => &mut self.files,
        }
    }

    /// The place for the base of snapshots like `source`, from which the VM was restored.
    pub fn of_source(&mut self, source: &Source) -> &mut Option<Arc<Base>> {
        match source {
            Source::Snapshot(_) => &mut self.store,
            Source::Files { .. } | Source::Served { .. } => &mut self.files,
        }
    }
}
