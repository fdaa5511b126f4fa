//! Which parts of a disk have been written, for everyone who wants to know: a snapshot, a migration, a checkpoint.
//!
//! ```text
//!                        ┌─► pending of a snapshot   ──take──► Taken ──► commit
//!  completed writes ─────┤                                       │
//!                        └─► pending of a migration  ◄──put back─┘ (when dropped)
//! ```
//! Each [`Consumer`] takes what was written since its own last take, in [chunks](super::chunks), whatever the others do. What was
//! taken goes back unless it is committed: an attempt that fails, or is forgotten, loses nothing.
//!
//! A chunk is marked when the host has finished with it, also if the host failed, never earlier: whoever takes the mark
//! and then reads the chunk has what was written, or will be told again. While there is no consumer a write costs one
//! look at a number.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chunks::ChunkSet;

/// Where a disk's writes are recorded. Clones are the same record.
#[derive(Clone, Default)]
pub struct WriteTracker {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Number of consumers, for the disk to look at before it takes the lock.
    consumers: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    size: u64,
    pending: BTreeMap<u64, ChunkSet>,
    next_id: u64,
}

/// Somebody who wants to know.
pub struct Consumer {
    tracker: WriteTracker,
    id: u64,
}

/// What a consumer took. There may be several of one consumer at a time, each for an attempt of its own.
///
/// Dropping it puts the chunks back, for the consumer's next take.
#[must_use = "chunks that are dropped without being committed are put back"]
pub struct Taken {
    chunks: ChunkSet,
    /// Whose chunks they are; nobody's any more once committed.
    owner: Option<(WriteTracker, u64)>,
}

impl WriteTracker {
    /// A tracker for a disk of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        let tracker = Self::default();
        tracker.state().size = size;
        tracker
    }

    /// A new consumer, who is told of every write that completes from now on.
    pub fn register(&self) -> Consumer {
        self.register_with(ChunkSet::none)
    }

    /// A new consumer, who has nothing of the disk yet: all of it is news.
    pub fn register_anew(&self) -> Consumer {
        self.register_with(ChunkSet::all)
    }

    /// A new consumer, for whom the chunks of a disk of this size that `pending` says are pending.
    fn register_with(&self, pending: impl FnOnce(u64) -> ChunkSet) -> Consumer {
        let mut state = self.state();
        let id = state.next_id;
        state.next_id += 1;
        let pending = pending(state.size);
        state.pending.insert(id, pending);
        self.shared.consumers.store(state.pending.len(), Ordering::Release);
        Consumer {
            tracker: self.clone(),
            id,
        }
    }

    /// The host has finished with a write of these bytes, well or not.
    pub fn record(&self, bytes: Range<u64>) {
        if self.shared.consumers.load(Ordering::Acquire) > 0 {
            for pending in self.state().pending.values_mut() {
                pending.insert(bytes.clone());
            }
        }
    }

    /// Another image of `size` bytes has taken the place of the disk's: all of it is new.
    pub(super) fn replace(&self, size: u64) {
        let mut state = self.state();
        state.size = size;
        for pending in state.pending.values_mut() {
            *pending = ChunkSet::all(size);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Consumer {
    /// What was written since the last take, and what was put back since.
    pub fn take(&self) -> Taken {
        let mut state = self.tracker.state();
        let none = ChunkSet::none(state.size);
        let pending = state
            .pending
            .get_mut(&self.id)
            .expect("it is there as long as its consumer");
        Taken {
            chunks: std::mem::replace(pending, none),
            owner: Some((self.tracker.clone(), self.id)),
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let mut state = self.tracker.state();
        state.pending.remove(&self.id);
        self.tracker
            .shared
            .consumers
            .store(state.pending.len(), Ordering::Release);
    }
}

impl Taken {
    /// What was taken.
    pub fn chunks(&self) -> &ChunkSet {
        &self.chunks
    }

    /// It is safe elsewhere: it need not be put back.
    pub fn commit(mut self) {
        self.owner = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some((tracker, id)) = self.owner.take()
            // A consumer that is gone has no use for them.
            && let Some(pending) = tracker.state().pending.get_mut(&id)
            // Of another image all is pending already.
            && pending.disk_size() == self.chunks.disk_size()
        {
            pending.union(&self.chunks);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::virtio::block::chunks::CHUNK_SIZE;

    const SIZE: u64 = 150 * CHUNK_SIZE + 512;

    fn chunks(set: &ChunkSet) -> BTreeSet<u64> {
        set.ranges()
            .flat_map(|range| range.start / CHUNK_SIZE..range.end.div_ceil(CHUNK_SIZE))
            .collect()
    }

    fn ranges(set: &ChunkSet) -> Vec<Range<u64>> {
        set.ranges().collect()
    }

    #[test]
    fn nothing_is_kept_for_nobody_and_nobody_hears_of_what_was_before() {
        let tracker = WriteTracker::new(SIZE);
        tracker.record(0..1);
        let consumer = tracker.register();
        assert!(consumer.take().chunks().is_empty());
        drop(consumer);
        assert!(tracker.state().pending.is_empty());
    }

    #[test]
    fn all_is_news_to_whoever_has_nothing_yet_until_it_is_committed() {
        let tracker = WriteTracker::new(SIZE);
        let consumer = tracker.register_anew();
        drop(consumer.take());
        let taken = consumer.take();
        assert_eq!(taken.chunks(), &ChunkSet::all(SIZE));
        taken.commit();
        assert!(consumer.take().chunks().is_empty());
    }

    #[test]
    fn what_was_taken_outlives_its_consumer_and_goes_nowhere_then() {
        let tracker = WriteTracker::new(SIZE);
        let (gone, other) = (tracker.register(), tracker.register());
        tracker.record(0..1);
        let taken = gone.take();
        other.take().commit();
        drop(gone);
        assert_eq!(chunks(taken.chunks()), BTreeSet::from([0]));
        drop(taken);
        assert!(other.take().chunks().is_empty());
    }

    #[test]
    fn another_image_is_new_to_everybody_in_all_its_size() {
        let tracker = WriteTracker::new(SIZE);
        let consumer = tracker.register();
        tracker.record(0..1);
        let taken = consumer.take();
        tracker.replace(3 * CHUNK_SIZE);
        drop(taken);
        let all: Vec<_> = std::iter::once(0..3 * CHUNK_SIZE).collect();
        assert_eq!(ranges(consumer.take().chunks()), all);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(Range<u64>),
        Take { consumer: usize, commit: bool },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..SIZE, 0..5 * CHUNK_SIZE).prop_map(|(start, len)| Step::Write(start..start + len)),
            1 => (0..3_usize, any::<bool>()).prop_map(|(consumer, commit)| Step::Take { consumer, commit }),
        ]
    }

    proptest! {
        #[test]
        fn each_consumer_is_told_of_every_write_since_its_last_commit(steps in prop::collection::vec(step(), 0..64)) {
            let tracker = WriteTracker::new(SIZE);
            let consumers = [(); 3].map(|()| tracker.register());
            let mut expected: [BTreeSet<u64>; 3] = Default::default();
            for step in steps {
                match step {
                    Step::Write(bytes) => {
                        tracker.record(bytes.clone());
                        let end = bytes.end.min(SIZE);
                        let written = (0..SIZE.div_ceil(CHUNK_SIZE))
                            .filter(|chunk| chunk * CHUNK_SIZE < end && bytes.start < (chunk + 1) * CHUNK_SIZE && bytes.start < end);
                        let written: Vec<u64> = written.collect();
                        expected.iter_mut().for_each(|set| set.extend(&written));
                    }
                    Step::Take { consumer, commit } => {
                        let taken = consumers[consumer].take();
                        prop_assert_eq!(&chunks(taken.chunks()), &expected[consumer]);
                        if commit {
                            taken.commit();
                            expected[consumer].clear();
                        }
                    }
                }
            }
            for (consumer, expected) in consumers.iter().zip(&expected) {
                prop_assert_eq!(&chunks(consumer.take().chunks()), expected);
            }
        }
    }
}
