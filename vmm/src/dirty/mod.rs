//! Dirty tracking: which pages of guest memory have changed, for everyone who wants to know.
//!
//! ```text
//!  vCPUs ───► back end ───┐            ┌─► pending of a migration  ──take──► Taken ──► commit
//!                         ├─ harvest ──┼─► pending of a snapshot               │
//!  monitor ─► bitmaps ────┘            └─► pending of statistics   ◄──put back─┘ (when dropped)
//! ```
//! The back end is KVM's bitmap ([`kvm_log`]), or what was asked for and is exact here ([`back_end`], [`probe`]): KVM's
//! rings ([`ring`]), or a scan of page tables ([`scan`]).
//!
//! Reading a source clears it, so there is one reader, the [`Tracker`], which adds what it finds to the pending set of
//! every [`Consumer`]. Each takes what changed since its own last take, whatever the others do. What was taken goes
//! back to the pending set unless it is committed: an attempt that fails, or is forgotten, loses nothing.
//!
//! While there is no consumer the sources are switched off and the guest writes at full speed.
//!
//! A set may have pages that did not change; it never lacks one that did. Take it, then read the pages: what is written
//! meanwhile is in the next set. After the vCPUs are paused and the devices stopped, one take has the rest.

mod back_end;
mod ioctl;
mod kvm_log;
mod monitor_writes;
pub(crate) mod page_set;
mod probe;
mod rate;
mod ring;
mod scan;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VcpuFd;

use self::kvm_log::KvmLog;
use self::monitor_writes::MonitorWrites;
use self::scan::Scan;
use crate::Error;
use crate::kvm::KvmVm;

pub use self::back_end::{BackEnd, DirtyLog, Unfit};
pub use self::page_set::{Layout, PAGE_SIZE, PageRange, PageSet};
pub use self::rate::{DirtyRate, RateMeter};
pub use self::ring::Rings;

/// What a source calls with the index of a word of a [`PageSet`] and the bits of pages written.
type Report<'a> = &'a mut dyn FnMut(usize, u64);

/// Somebody who notices writes to guest memory.
trait DirtySource: Send {
    /// From its return on, writes are noticed.
    fn start(&mut self) -> Result<(), Error>;
    /// Writes need not be noticed any more.
    fn stop(&mut self) -> Result<(), Error>;
    /// Reports at least the pages written since the last call. After an error, what was not reported is reported by the
    /// next call.
    fn collect(&mut self, report: Report<'_>) -> Result<(), Error>;
}

/// What is pending for a new consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// Nothing: it has, or does not need, the memory as it is now.
    Now,
    /// Every page: it has nothing yet. Cheaper to begin with.
    Nothing,
}

/// The one reader of all sources. Clones are the same tracker.
#[derive(Clone)]
pub struct Tracker {
    state: Arc<Mutex<State>>,
    /// The back end, if that is KVM's rings.
    rings: Option<Rings>,
}

struct State {
    layout: Arc<Layout>,
    sources: Vec<Box<dyn DirtySource>>,
    /// The sources are on while there is one.
    pending: BTreeMap<ConsumerId, PageSet>,
    next_id: ConsumerId,
}

type ConsumerId = u64;

impl Tracker {
    /// A tracker for the memory of `vm`, which has no vCPUs yet, switched off. `back_end` is to be known as exact here.
    ///
    /// # Errors
    /// KVM refused, or the back end is not to be had for this memory.
    pub fn new(vm: &KvmVm, back_end: BackEnd) -> Result<Self, Error> {
        let slots = &vm.memory_slots;
        let layout = Arc::new(Layout::of(&slots.memory));
        let mut rings = None;
        let vcpu_writes: Box<dyn DirtySource> = match back_end {
            BackEnd::Bitmap => Box::new(KvmLog::new(slots, &layout)?),
            BackEnd::Ring => Box::new(rings.insert(Rings::new(slots, &layout)?).clone()),
            BackEnd::Scan => Box::new(Scan::new(slots, &layout)?),
        };
        let monitor_writes = Box::new(MonitorWrites::new(&slots.memory, &layout));
        Ok(Self {
            rings,
            ..Self::of(layout, vec![vcpu_writes, monitor_writes])
        })
    }

    fn of(layout: Arc<Layout>, sources: Vec<Box<dyn DirtySource>>) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                layout,
                sources,
                pending: BTreeMap::new(),
                next_id: 0,
            })),
            rings: None,
        }
    }

    /// Notices what `vcpu` writes, which has not run yet. If KVM stops it because its ring is full, it goes on once all
    /// rings that are returned were drained.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<Option<Rings>, Error> {
        let rings = self.rings.clone();
        rings.iter().try_for_each(|rings| rings.add(vcpu))?;
        Ok(rings)
    }

    /// A new consumer, who is told of every change from now on.
    ///
    /// # Errors
    /// KVM refused to notice writes; nothing has changed.
    pub fn register(&self, baseline: Baseline) -> Result<Consumer, Error> {
        let id = self.state().register(baseline)?;
        Ok(Consumer {
            tracker: self.clone(),
            id,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn register(&mut self, baseline: Baseline) -> Result<ConsumerId, Error> {
        let outcome = self.begin(baseline);
        let pending = match outcome {
            Ok(pending) => pending,
            Err(error) => {
                self.stop_if_unused();
                return Err(error);
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        self.pending.insert(id, pending);
        Ok(id)
    }

    /// Makes sure that the sources are on, and returns what is pending for somebody who begins now.
    fn begin(&mut self, baseline: Baseline) -> Result<PageSet, Error> {
        if self.pending.is_empty() {
            self.sources.iter_mut().try_for_each(|source| source.start())?;
        }
        match baseline {
            Baseline::Nothing => Ok(PageSet::full(&self.layout)),
            Baseline::Now => {
                // What was written before is for those who were there.
                self.harvest()?;
                Ok(PageSet::empty(&self.layout))
            }
        }
    }

    fn unregister(&mut self, id: ConsumerId) {
        self.pending.remove(&id);
        self.stop_if_unused();
    }

    fn stop_if_unused(&mut self) {
        if self.pending.is_empty() {
            for source in &mut self.sources {
                if let Err(error) = source.stop() {
                    tracing::warn!(%error, "dirty tracking cannot be switched off: the guest goes on more slowly");
                }
            }
        }
    }

    /// Adds what the sources have noticed to every pending set.
    fn harvest(&mut self) -> Result<(), Error> {
        let pending = &mut self.pending;
        let mut report = |word, bits| pending.values_mut().for_each(|set| set.insert(word, bits));
        self.sources
            .iter_mut()
            .try_for_each(|source| source.collect(&mut report))
    }

    fn take(&mut self, id: ConsumerId) -> Result<PageSet, Error> {
        self.harvest()?;
        let nothing = PageSet::empty(&self.layout);
        let pending = self
            .pending
            .get_mut(&id)
            .expect("a consumer is registered until it is dropped");
        Ok(std::mem::replace(pending, nothing))
    }
}

/// Somebody who wants to know what changes; unregistered when dropped.
pub struct Consumer {
    tracker: Tracker,
    id: ConsumerId,
}

impl Consumer {
    /// Takes the pages that changed since the last take, and those put back since.
    ///
    /// # Errors
    /// KVM did not tell what was written. Nothing is lost: the next take has it.
    pub fn take(&self) -> Result<Taken, Error> {
        let pages = self.tracker.state().take(self.id)?;
        Ok(Taken {
            pages,
            owner: Some((self.tracker.clone(), self.id)),
        })
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.tracker.state().unregister(self.id);
    }
}

/// Pages a consumer took. There may be several of one consumer at a time, each for an attempt of its own.
///
/// Dropping it puts the pages back, for the consumer's next take.
#[must_use = "pages that are dropped without being committed are put back"]
pub struct Taken {
    pages: PageSet,
    /// Whose pages they are; nobody's any more once committed.
    owner: Option<(Tracker, ConsumerId)>,
}

impl Taken {
    /// The consumer has what it took the pages for, for good.
    pub fn commit(mut self) {
        self.owner = None;
    }
}

impl Deref for Taken {
    type Target = PageSet;

    fn deref(&self) -> &PageSet {
        &self.pages
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some((tracker, id)) = self.owner.take()
            // A consumer that is gone has no use for them.
            && let Some(pending) = tracker.state().pending.get_mut(&id)
        {
            pending.union(&self.pages);
        }
    }
}

#[cfg(test)]
mod tests;
