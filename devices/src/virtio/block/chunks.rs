//! Chunks: the pieces in which a disk is watched and copied, and sets of them.

use std::ops::Range;

/// Bytes of a chunk.
pub const CHUNK_SIZE: u64 = 64 << 10;
/// Chunks of a word of a set.
const WORD_CHUNKS: u64 = 64;

/// Some chunks of a disk. The last chunk of a disk may be shorter than the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkSet {
    /// Bytes of the disk.
    size: u64,
    words: Vec<u64>,
}

impl ChunkSet {
    /// No chunk of a disk of `size` bytes.
    pub fn none(size: u64) -> Self {
        let words = size.div_ceil(CHUNK_SIZE).div_ceil(WORD_CHUNKS);
        Self {
            size,
            words: vec![0; usize::try_from(words).expect("a disk has fewer chunks than there are addresses")],
        }
    }

    /// Every chunk of a disk of `size` bytes.
    pub fn all(size: u64) -> Self {
        let mut set = Self::none(size);
        set.insert(0..size);
        set
    }

    /// Bytes of the disk.
    pub fn disk_size(&self) -> u64 {
        self.size
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Number of chunks.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The bytes of the chunks, in order and as long as possible.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = self.find(next, true)?;
            let end = self.find(first, false).unwrap_or_else(|| self.chunks());
            next = end;
            Some(self.bytes_of(first..end))
        })
    }

    /// The bytes of the first chunks that begin at byte `start` or later and follow each other, `most` of them or fewer.
    pub fn run(&self, start: u64, most: u64) -> Option<Range<u64>> {
        let first = self.find(start.div_ceil(CHUNK_SIZE), true)?;
        let limit = self.chunks().min(first.saturating_add(most));
        let end = (first..limit).find(|&chunk| !self.has(chunk)).unwrap_or(limit);
        Some(self.bytes_of(first..end))
    }

    /// Where the first chunk begins that has some of `bytes`.
    pub fn first_of(&self, bytes: &Range<u64>) -> Option<u64> {
        let found = self.masks(bytes).find_map(|(word, mask)| {
            let common = self.words[word] & mask;
            let chunk = word as u64 * WORD_CHUNKS + u64::from(common.trailing_zeros());
            (common != 0).then_some(chunk)
        });
        found.map(|chunk| chunk * CHUNK_SIZE)
    }

    /// Adds the chunks that have some of `bytes`, as far as the disk goes.
    pub fn insert(&mut self, bytes: Range<u64>) {
        for (word, mask) in self.masks(&bytes) {
            self.words[word] |= mask;
        }
    }

    /// Takes the chunks out that have some of `bytes`; returns how many these were.
    pub fn remove(&mut self, bytes: &Range<u64>) -> u64 {
        let mut removed = 0;
        for (word, mask) in self.masks(bytes) {
            removed += u64::from((self.words[word] & mask).count_ones());
            self.words[word] &= !mask;
        }
        removed
    }

    /// Adds those of `other`, a set of a disk of the same size.
    pub(super) fn union(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Chunks of the disk.
    fn chunks(&self) -> u64 {
        self.size.div_ceil(CHUNK_SIZE)
    }

    fn bytes_of(&self, chunks: Range<u64>) -> Range<u64> {
        chunks.start * CHUNK_SIZE..(chunks.end * CHUNK_SIZE).min(self.size)
    }

    fn has(&self, chunk: u64) -> bool {
        let word = usize::try_from(chunk / WORD_CHUNKS).ok();
        let word = word.and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (chunk % WORD_CHUNKS) & 1 != 0)
    }

    /// The first chunk from `start` on that is in the set, or is not.
    fn find(&self, start: u64, present: bool) -> Option<u64> {
        let mut chunk = start;
        while chunk < self.chunks() {
            let word = self.words[usize::try_from(chunk / WORD_CHUNKS).ok()?];
            let wanted = if present { word } else { !word } >> (chunk % WORD_CHUNKS);
            if wanted != 0 {
                let found = chunk + u64::from(wanted.trailing_zeros());
                return (found < self.chunks()).then_some(found);
            }
            chunk = (chunk / WORD_CHUNKS + 1) * WORD_CHUNKS;
        }
        None
    }

    /// The words with chunks that have some of `bytes`, and which bits of theirs these are.
    fn masks(&self, bytes: &Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
        let end = bytes.end.min(self.size);
        let mut chunks = if bytes.start < end {
            bytes.start / CHUNK_SIZE..end.div_ceil(CHUNK_SIZE)
        } else {
            0..0
        };
        std::iter::from_fn(move || {
            let (word, bit) = (chunks.start / WORD_CHUNKS, chunks.start % WORD_CHUNKS);
            let bits = (chunks.end - chunks.start).min(WORD_CHUNKS - bit);
            if bits == 0 {
                return None;
            }
            chunks.start += bits;
            let word = usize::try_from(word).expect("as many words as chunks need");
            Some((word, u64::MAX >> (WORD_CHUNKS - bits) << bit))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 150 * CHUNK_SIZE + 512;

    fn ranges(set: &ChunkSet) -> Vec<Range<u64>> {
        set.ranges().collect()
    }

    #[test]
    fn neighbouring_chunks_make_one_range_that_ends_with_the_disk() {
        let mut set = ChunkSet::none(SIZE);
        set.insert(CHUNK_SIZE - 1..CHUNK_SIZE + 1);
        set.insert(63 * CHUNK_SIZE..66 * CHUNK_SIZE);
        set.insert(SIZE - 1..SIZE);
        set.insert(SIZE..u64::MAX);
        set.insert(5..5);
        let expected = [
            0..2 * CHUNK_SIZE,
            63 * CHUNK_SIZE..66 * CHUNK_SIZE,
            150 * CHUNK_SIZE..SIZE,
        ];
        assert_eq!((ranges(&set), set.len()), (expected.to_vec(), 6));
    }

    #[test]
    fn all_chunks_are_the_whole_disk_whatever_its_size() {
        for size in [
            1,
            CHUNK_SIZE,
            64 * CHUNK_SIZE - 1,
            64 * CHUNK_SIZE,
            64 * CHUNK_SIZE + 1,
            SIZE,
        ] {
            let all = ChunkSet::all(size);
            let whole: Vec<_> = std::iter::once(0..size).collect();
            assert_eq!((ranges(&all), all.len()), (whole, size.div_ceil(CHUNK_SIZE)));
        }
    }

    #[test]
    fn a_run_ends_at_its_limit_at_a_gap_and_with_the_disk() {
        let mut set = ChunkSet::all(SIZE);
        set.remove(&(70 * CHUNK_SIZE..70 * CHUNK_SIZE + 1));
        assert_eq!(set.run(0, 4), Some(0..4 * CHUNK_SIZE));
        assert_eq!(set.run(68 * CHUNK_SIZE, 4), Some(68 * CHUNK_SIZE..70 * CHUNK_SIZE));
        assert_eq!(set.run(70 * CHUNK_SIZE, 1), Some(71 * CHUNK_SIZE..72 * CHUNK_SIZE));
        assert_eq!(set.run(149 * CHUNK_SIZE, u64::MAX), Some(149 * CHUNK_SIZE..SIZE));
        assert_eq!(set.run(SIZE, 1), None);
    }

    proptest! {
        #[test]
        fn sets_do_what_sets_of_numbers_do(
            steps in prop::collection::vec((any::<bool>(), 0..SIZE + 9, 0..70 * CHUNK_SIZE), 0..24),
            probe in (0..SIZE, 0..9 * CHUNK_SIZE),
        ) {
            let mut set = ChunkSet::none(SIZE);
            let mut expected = BTreeSet::new();
            let chunks = |bytes: &Range<u64>| {
                let bytes = bytes.clone();
                (0..SIZE.div_ceil(CHUNK_SIZE)).filter(move |chunk| {
                    let (start, end) = (chunk * CHUNK_SIZE, ((chunk + 1) * CHUNK_SIZE).min(SIZE));
                    bytes.start.max(start) < bytes.end.min(end)
                })
            };
            for (insert, start, len) in steps {
                let bytes = start..start + len;
                if insert {
                    expected.extend(chunks(&bytes));
                    set.insert(bytes);
                } else {
                    let before = expected.len();
                    chunks(&bytes).for_each(|chunk| { expected.remove(&chunk); });
                    prop_assert_eq!(set.remove(&bytes), (before - expected.len()) as u64);
                }
            }
            let found = set.ranges().flat_map(|range| range.start / CHUNK_SIZE..range.end.div_ceil(CHUNK_SIZE));
            prop_assert_eq!(found.collect::<BTreeSet<_>>(), expected.clone());
            prop_assert_eq!((set.len(), set.is_empty()), (expected.len() as u64, expected.is_empty()));
            let probe = probe.0..probe.0 + probe.1;
            let first = chunks(&probe).find(|chunk| expected.contains(chunk));
            prop_assert_eq!(set.first_of(&probe), first.map(|chunk| chunk * CHUNK_SIZE));
        }
    }
}
