//! Which parts of a disk have been written, for everyone who wants to know: a snapshot, a migration, a checkpoint.
//!
//! ```text
//!                        ┌─► pending of a snapshot   ──take──► Taken ──► commit
//!  completed writes ─────┤                                       │
//!                        └─► pending of a migration  ◄──put back─┘ (when dropped)
//! ```
//! Each [`Consumer`] takes what was written since its own last take, in chunks of [`CHUNK_SIZE`], whatever the others
//! do. What was taken goes back unless it is committed: an attempt that fails loses nothing.
//!
//! A chunk is marked when the host has finished with it, also if the host failed, never earlier: whoever takes the mark
//! and then reads the chunk has what was written, or will be told again. While there is no consumer a write costs one
//! look at a number.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a chunk.
pub const CHUNK_SIZE: u64 = 64 << 10;
/// Chunks of a word of a set.
const WORD_CHUNKS: u64 = 64;

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

/// Some chunks of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkSet {
    /// Bytes of the disk.
    size: u64,
    words: Vec<u64>,
}

/// Somebody who wants to know.
pub struct Consumer {
    tracker: WriteTracker,
    id: u64,
}

/// What a consumer took. Put back when dropped.
pub struct Taken<'a> {
    consumer: &'a Consumer,
    chunks: ChunkSet,
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
        let mut state = self.state();
        let id = state.next_id;
        state.next_id += 1;
        let none = ChunkSet::none(state.size);
        state.pending.insert(id, none);
        self.shared.consumers.store(state.pending.len(), Ordering::Release);
        Consumer {
            tracker: self.clone(),
            id,
        }
    }

    /// The host has finished with a write of these bytes, well or not.
    pub(super) fn record(&self, bytes: Range<u64>) {
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
            *pending = ChunkSet::none(size);
            pending.insert(0..size);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Consumer {
    /// What was written since the last take.
    pub fn take(&self) -> Taken<'_> {
        let mut state = self.tracker.state();
        let none = ChunkSet::none(state.size);
        let pending = state
            .pending
            .get_mut(&self.id)
            .expect("it is there as long as its consumer");
        Taken {
            consumer: self,
            chunks: std::mem::replace(pending, none),
        }
    }

    fn put_back(&self, chunks: &ChunkSet) {
        if let Some(pending) = self.tracker.state().pending.get_mut(&self.id) {
            pending.union(chunks);
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

impl Taken<'_> {
    /// What was taken.
    pub fn chunks(&self) -> &ChunkSet {
        &self.chunks
    }

    /// It is safe elsewhere: it need not be put back.
    pub fn commit(mut self) {
        self.chunks = ChunkSet::default();
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.consumer.put_back(&self.chunks);
    }
}

impl ChunkSet {
    fn none(size: u64) -> Self {
        let words = size.div_ceil(CHUNK_SIZE).div_ceil(WORD_CHUNKS);
        Self {
            size,
            words: vec![0; usize::try_from(words).expect("a disk has fewer chunks than there are addresses")],
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The bytes of the chunks, in order and as long as possible; the last chunk of a disk may be shorter.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = self.find(next, true)?;
            let end = self
                .find(first, false)
                .unwrap_or_else(|| self.size.div_ceil(CHUNK_SIZE));
            next = end;
            Some(first * CHUNK_SIZE..(end * CHUNK_SIZE).min(self.size))
        })
    }

    /// The first chunk from `start` on that is in the set, or is not.
    fn find(&self, start: u64, present: bool) -> Option<u64> {
        let mut chunk = start;
        while chunk * CHUNK_SIZE < self.size {
            let word = self.words[usize::try_from(chunk / WORD_CHUNKS).ok()?];
            let wanted = if present { word } else { !word } >> (chunk % WORD_CHUNKS);
            if wanted != 0 {
                let found = chunk + u64::from(wanted.trailing_zeros());
                return (found * CHUNK_SIZE < self.size).then_some(found);
            }
            chunk = (chunk / WORD_CHUNKS + 1) * WORD_CHUNKS;
        }
        None
    }

    /// Adds the chunks that have some of `bytes`, as far as the disk goes.
    fn insert(&mut self, bytes: Range<u64>) {
        let end = bytes.end.min(self.size);
        if bytes.start >= end {
            return;
        }
        for chunk in bytes.start / CHUNK_SIZE..end.div_ceil(CHUNK_SIZE) {
            let word = usize::try_from(chunk / WORD_CHUNKS).expect("as many words as chunks need");
            self.words[word] |= 1 << (chunk % WORD_CHUNKS);
        }
    }

    /// Adds those of `other`, unless that is of another image: then all are in the set already.
    fn union(&mut self, other: &Self) {
        if self.size == other.size {
            for (word, more) in self.words.iter_mut().zip(&other.words) {
                *word |= more;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

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
    fn neighbouring_chunks_make_one_range_that_ends_with_the_disk() {
        let tracker = WriteTracker::new(SIZE);
        let consumer = tracker.register();
        tracker.record(CHUNK_SIZE - 1..CHUNK_SIZE + 1);
        tracker.record(63 * CHUNK_SIZE..66 * CHUNK_SIZE);
        tracker.record(SIZE - 1..SIZE);
        tracker.record(SIZE..u64::MAX);
        tracker.record(5..5);
        let expected = [
            0..2 * CHUNK_SIZE,
            63 * CHUNK_SIZE..66 * CHUNK_SIZE,
            150 * CHUNK_SIZE..SIZE,
        ];
        assert_eq!(ranges(consumer.take().chunks()), expected);
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
