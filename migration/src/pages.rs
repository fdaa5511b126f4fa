//! Sets of pages by number: one bit per page, 64 pages a word.
//!
//! Pages have the numbers of the memory image of a snapshot: the regions of guest memory one after the other, without
//! gaps. Most sets are mostly empty, or have long runs; so everything here goes by words, and passes over empty ones
//! several at a time.

use std::iter;
use std::ops::Range;

/// Bytes of a page: the unit of tracking and of sending, the smallest page of x86.
pub const PAGE_BYTES: usize = 4 << 10;

/// Pages of a word.
pub const WORD_PAGES: u64 = u64::BITS as u64;

/// A set of pages of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBits {
    /// The bits of the last word that stand for no page are zero.
    words: Vec<u64>,
    pages: u64,
}

impl PageBits {
    /// No page, of a VM that has `pages`.
    ///
    /// # Panics
    /// A bit for each does not fit in the address space.
    pub fn empty(pages: u64) -> Self {
        Self {
            words: vec![0; index(pages.div_ceil(WORD_PAGES))],
            pages,
        }
    }

    /// Every page of a VM that has `pages`.
    pub fn full(pages: u64) -> Self {
        let mut full = Self::empty(pages);
        full.insert_range(0..pages);
        full
    }

    /// The set that `words` are of, for a VM that has `pages`; none if the words are too many or too few, or have bits
    /// beyond the last page.
    pub fn from_words(pages: u64, words: Vec<u64>) -> Option<Self> {
        let set = Self { words, pages };
        let unused = unused_bits(pages);
        let is_whole = u64::try_from(set.words.len()) == Ok(pages.div_ceil(WORD_PAGES));
        let last_is_clean = set.words.last().is_none_or(|last| last & unused == 0);
        (is_whole && last_is_clean).then_some(set)
    }

    /// Its bits, page 0 the lowest of the first byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The set that [`to_bytes`](Self::to_bytes) made `bytes` of, for a VM that has `pages`; none if it was none.
    pub fn from_bytes(pages: u64, bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks();
        let words = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        Self::from_words(pages, words).filter(|_| rest.is_empty())
    }

    /// Its words; page 0 is the lowest bit of the first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages the VM has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in it.
    pub fn is_empty(&self) -> bool {
        set_words(&self.words).next().is_none()
    }

    /// Whether `page` is in it; a page the VM does not have is not.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[index(page / WORD_PAGES)] & bit(page) != 0
    }

    /// Adds `page`.
    ///
    /// # Panics
    /// The VM has no such page.
    pub fn insert(&mut self, page: u64) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[index(page / WORD_PAGES)] |= bit(page);
    }

    /// Removes `page`, if it is there.
    pub fn remove(&mut self, page: u64) {
        if page < self.pages {
            self.words[index(page / WORD_PAGES)] &= !bit(page);
        }
    }

    /// Adds `pages`.
    ///
    /// # Panics
    /// The VM does not have all of them.
    pub fn insert_range(&mut self, pages: Range<u64>) {
        assert!(pages.end <= self.pages, "pages {pages:?} of {}", self.pages);
        for (word, bits) in words_of(pages) {
            self.words[word] |= bits;
        }
    }

    /// Removes those of `pages` that are there.
    pub fn remove_range(&mut self, pages: Range<u64>) {
        for (word, bits) in words_of(pages.start..pages.end.min(self.pages)) {
            self.words[word] &= !bits;
        }
    }

    /// Adds the pages whose bits are set in `bits`, as word number `index`.
    ///
    /// # Panics
    /// The VM does not have all of them.
    pub fn insert_word(&mut self, index: usize, bits: u64) {
        self.words[index] |= bits;
        self.check_end();
    }

    /// Adds the pages whose bits are set in `words`, of which the lowest bit of the first stands for page `first`: a
    /// region's dirty log as it is.
    ///
    /// # Panics
    /// The VM does not have all of them.
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        let (start, shift) = (index(first / WORD_PAGES), first % WORD_PAGES);
        for (word, bits) in set_words(words) {
            self.words[start + word] |= bits << shift;
            // In two steps: a shift by all 64 bits is not a shift.
            let carried = bits >> 1 >> (WORD_PAGES - 1 - shift);
            if carried != 0 {
                self.words[start + word + 1] |= carried;
            }
        }
        self.check_end();
    }

    fn check_end(&self) {
        let last = self.words.last().copied().unwrap_or(0);
        assert!(
            last & unused_bits(self.pages) == 0,
            "pages beyond the last of {}",
            self.pages
        );
    }

    /// Adds the pages of `other`, which is of the same VM.
    pub fn union(&mut self, other: &Self) {
        self.combine(other, |word, bits| word | bits);
    }

    /// Removes the pages of `other`, which is of the same VM.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |word, bits| word & !bits);
    }

    /// Removes the pages that are not in `other`, which is of the same VM.
    pub fn intersect(&mut self, other: &Self) {
        self.combine(other, |word, bits| word & bits);
    }

    fn combine(&mut self, other: &Self, with: impl Fn(u64, u64) -> u64) {
        debug_assert_eq!(self.pages, other.pages, "sets of two VMs");
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word = with(*word, *bits);
        }
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.ranges().flatten()
    }

    /// The pages in ascending order, consecutive ones together.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        merged(set_words(&self.words))
    }

    /// Those of `pages` that are in the set, in ascending order, consecutive ones together.
    pub fn ranges_in(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let words = words_of(pages.start..pages.end.min(self.pages));
        merged(words.map(|(word, bits)| (word, self.words[word] & bits)))
    }
}

/// The words that are not zero, with their indices.
pub fn set_words(words: &[u64]) -> impl Iterator<Item = (usize, u64)> {
    /// Words looked at together, with a few vector instructions: 8 MiB of memory.
    const STRIDE: usize = 32;
    let (lines, rest) = words.as_chunks::<STRIDE>();
    let set_lines = (0..)
        .step_by(STRIDE)
        .zip(lines)
        .filter(|(_, line)| line.iter().fold(0, |all, word| all | word) != 0);
    let in_lines = set_lines.flat_map(|(first, line)| (first..).zip(line.iter().copied()));
    let in_rest = (lines.len() * STRIDE..).zip(rest.iter().copied());
    in_lines.chain(in_rest).filter(|&(_, word)| word != 0)
}

/// The runs of ones in `bits`: first bit and length.
pub fn runs(mut bits: u64) -> impl Iterator<Item = (u32, u32)> {
    iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let first = bits.trailing_zeros();
        let length = (bits >> first).trailing_ones();
        bits &= !(u64::MAX >> (u64::BITS - length) << first);
        Some((first, length))
    })
}

/// The pages of words in ascending order, consecutive ones together.
fn merged(words: impl Iterator<Item = (usize, u64)>) -> impl Iterator<Item = Range<u64>> {
    let pages = |word: usize, (first, length): (u32, u32)| {
        let start = word as u64 * WORD_PAGES + u64::from(first);
        start..start + u64::from(length)
    };
    let mut ranges = words
        .flat_map(move |(word, bits)| runs(bits).map(move |run| pages(word, run)))
        .peekable();
    iter::from_fn(move || {
        let mut range = ranges.next()?;
        while let Some(next) = ranges.next_if(|next| next.start == range.end) {
            range.end = next.end;
        }
        Some(range)
    })
}

/// The words that have bits of `pages`, with those bits.
fn words_of(pages: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let end_word = if pages.is_empty() {
        0
    } else {
        pages.end.div_ceil(WORD_PAGES)
    };
    (pages.start / WORD_PAGES..end_word).map(move |word| {
        let from = pages.start.saturating_sub(word * WORD_PAGES);
        let beyond = ((word + 1) * WORD_PAGES).saturating_sub(pages.end);
        (index(word), u64::MAX << from & u64::MAX >> beyond)
    })
}

/// The bits of the last word that stand for no page, of a VM with `pages`.
fn unused_bits(pages: u64) -> u64 {
    match pages % WORD_PAGES {
        0 => 0,
        used => u64::MAX << used,
    }
}

fn bit(page: u64) -> u64 {
    1 << (page % WORD_PAGES)
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("addresses have 64 bits, as in every x86-64 process")
}

#[cfg(test)]
mod tests;
