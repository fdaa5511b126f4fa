//! What is still to come of a VM that was restored, or has moved here: its guest runs while memory and disks are filled
//! behind it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::disks::{DiskFilling, WhenFilled};
use super::request::SnapshotProgress;
use crate::events::{EventKind, EventLog};
use crate::page_fault::{Arriving, ExternalMemory, LazyMemory, end_process, with_sources};
use crate::reclaim::Kept;

/// See the module. What is dropped, with all clones, before it is complete is filled no further.
#[derive(Clone, Default)]
pub struct Filling {
    /// Memory, if it is filled lazily.
    pub memory: Option<Arc<LazyMemory>>,
    /// Memory, if the rest of it comes from the host that the VM moved away from.
    pub arriving: Option<Arc<Arriving>>,
    /// Memory, if another process fills it: how far, it does not tell.
    pub external: Option<Arc<ExternalMemory>>,
    /// Disks, if there are any in the snapshot.
    pub disks: Option<Arc<DiskFilling>>,
}

/// Tells when the last of those is done that fill something.
#[derive(Clone)]
pub struct Countdown(Arc<Shared>);

struct Shared {
    left: AtomicUsize,
    events: EventLog,
}

impl Filling {
    /// Waits until all is there that this process fills, or is no longer `wanted`: after that changed, whoever waits has
    /// to be [woken](Self::wake).
    pub fn wait(&self, wanted: &dyn Fn() -> bool) {
        if let Some(memory) = &self.memory {
            memory.wait(wanted);
        }
        if let Some(memory) = &self.arriving {
            memory.wait(wanted);
        }
        if let Some(disks) = &self.disks {
            disks.wait(wanted);
        }
    }

    /// Has nothing of memory be discarded while somebody fills it: who wants to know where it is gives `keep`.
    pub fn keep(&self, keep: impl Fn() -> Kept) {
        if let Some(memory) = &self.memory {
            memory.keep(keep());
        }
        if let Some(memory) = &self.external {
            memory.keep(keep());
        }
    }

    /// Has those who wait look again whether they want to.
    pub fn wake(&self) {
        if let Some(memory) = &self.memory {
            memory.wake();
        }
        if let Some(memory) = &self.arriving {
            memory.wake();
        }
        if let Some(disks) = &self.disks {
            disks.wake();
        }
    }

    /// How far it has come.
    pub fn progress(&self) -> SnapshotProgress {
        let memory = self.memory.as_ref().map(|memory| memory.progress());
        let arriving = self.arriving.as_ref().map(|memory| memory.progress());
        let disks = self.disks.as_ref().map(|disks| disks.progress());
        let parts = [memory, arriving, disks].into_iter().flatten();
        parts.fold(SnapshotProgress::default(), |all, part| SnapshotProgress {
            done: all.done + part.done,
            total: all.total + part.total,
        })
    }
}

impl Countdown {
    /// A countdown of one, who has it.
    pub fn new(events: &EventLog) -> Self {
        Self(Arc::new(Shared {
            left: AtomicUsize::new(1),
            events: events.clone(),
        }))
    }

    /// What another one calls, once, when it is done.
    pub fn one_more(&self) -> impl Fn() + Send + Sync + 'static {
        self.0.left.fetch_add(1, Ordering::Relaxed);
        let shared = self.clone();
        move || shared.done()
    }

    /// The same for disks; if one can never be filled, the process ends.
    pub fn when_filled(&self) -> WhenFilled {
        WhenFilled {
            done: Arc::new(self.one_more()),
            failed: Arc::new(|error| end_process(&with_sources(&error))),
        }
    }

    /// One of them is done.
    pub fn done(&self) {
        if self.0.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.events.push(EventKind::RestoreFinished);
        }
    }
}
