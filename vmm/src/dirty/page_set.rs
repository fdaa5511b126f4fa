//! Sets of guest pages: one bit per page, 64 pages a word, the words of all memory slots one after the other.
//!
//! ```text
//!  slot 0, 130 pages                     slot 1, 70 pages
//!  ┌──────────┬──────────┬──────────┐    ┌──────────┬──────────┐
//!  │ word 0   │ word 1   │ word 2   │    │ word 3   │ word 4   │
//!  └──────────┴──────────┴──────────┘    └──────────┴──────────┘
//!    64 pages   64 pages   2 pages         64 pages   6 pages
//! ```
//! That is the form KVM's dirty log has, so what is found there is merged word by word. Memory is mostly clean: whoever
//! goes through words does so by [`set_words`], which passes over clean ones several at a time.

use std::iter;
use std::sync::Arc;

use cutover_devices::GuestMemory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Bytes of a page: the unit of tracking, the smallest page of x86.
pub const PAGE_SIZE: u64 = 4 << 10;

/// Pages of a word.
pub const WORD_PAGES: u64 = u64::BITS as u64;

/// Where a VM's pages are, and where their bits.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    slots: Vec<Slot>,
    words: usize,
}

/// A memory slot: one region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First guest address.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
    /// Index of the word with the bit of the first page.
    pub first_word: usize,
}

impl Slot {
    /// Number of words.
    pub fn words(&self) -> usize {
        usize::try_from(self.pages.div_ceil(WORD_PAGES))
            .expect("a slot is mapped, and its words are fewer than its bytes")
    }
}

impl Layout {
    /// The layout of `memory`: one slot per region, in the order of their addresses.
    pub fn of(memory: &GuestMemory) -> Self {
        let mut words = 0;
        let slots = memory.iter().map(|region| {
            let slot = Slot {
                start: region.start_addr().raw_value(),
                pages: region.len() / PAGE_SIZE,
                first_word: words,
            };
            words += slot.words();
            slot
        });
        let slots = slots.collect();
        Self { slots, words }
    }

    /// The slots, in the order of their numbers and addresses.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The slot that `word` is of.
    fn slot_of(&self, word: usize) -> &Slot {
        let following = self.slots.partition_point(|slot| slot.first_word <= word);
        &self.slots[following - 1]
    }
}

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// Guest address of the first.
    pub start: u64,
    /// How many.
    pub pages: u64,
}

impl PageRange {
    /// The address behind the last page.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE_SIZE
    }
}

/// A set of pages of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    layout: Arc<Layout>,
    words: Vec<u64>,
}

impl PageSet {
    /// No page.
    pub fn empty(layout: &Arc<Layout>) -> Self {
        Self {
            layout: layout.clone(),
            words: vec![0; layout.words],
        }
    }

    /// Every page there is.
    pub fn full(layout: &Arc<Layout>) -> Self {
        let mut words = vec![u64::MAX; layout.words];
        for slot in &layout.slots {
            let unused = slot.words() as u64 * WORD_PAGES - slot.pages;
            words[slot.first_word + slot.words() - 1] >>= unused;
        }
        Self {
            layout: layout.clone(),
            words,
        }
    }

    /// Adds the pages whose bits are set in `bits`, as word number `word`.
    pub fn insert(&mut self, word: usize, bits: u64) {
        self.words[word] |= bits;
    }

    /// Adds the pages of `other`, which is of the same VM.
    pub fn union(&mut self, other: &PageSet) {
        for (word, bits) in set_words(&other.words) {
            self.insert(word, bits);
        }
    }

    /// How many pages.
    pub fn len(&self) -> u64 {
        set_words(&self.words)
            .map(|(_, bits)| u64::from(bits.count_ones()))
            .sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        set_words(&self.words).next().is_none()
    }

    /// The pages in ascending order, consecutive ones together.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> {
        let mut runs = set_words(&self.words)
            .flat_map(move |(word, bits)| runs(bits).map(move |(first, pages)| self.range(word, first, pages)))
            .peekable();
        iter::from_fn(move || {
            let mut range = runs.next()?;
            while let Some(next) = runs.next_if(|next| next.start == range.end()) {
                range.pages += next.pages;
            }
            Some(range)
        })
    }

    /// `pages` pages from that of bit `first` of `word` on.
    fn range(&self, word: usize, first: u32, pages: u32) -> PageRange {
        let slot = self.layout.slot_of(word);
        let page = (word - slot.first_word) as u64 * WORD_PAGES + u64::from(first);
        PageRange {
            start: slot.start + page * PAGE_SIZE,
            pages: pages.into(),
        }
    }
}

/// The words that are not zero, with their indices.
pub fn set_words(words: &[u64]) -> impl Iterator<Item = (usize, u64)> {
    /// Words looked at together, with a few vector instructions: 8 MiB of memory.
    const STRIDE: usize = 32;
    let (lines, rest) = words.as_chunks::<STRIDE>();
    let dirty_lines = (0..)
        .step_by(STRIDE)
        .zip(lines)
        .filter(|(_, line)| line.iter().fold(0, |all, word| all | word) != 0);
    let in_lines = dirty_lines.flat_map(|(first, line)| (first..).zip(line.iter().copied()));
    let in_rest = (lines.len() * STRIDE..).zip(rest.iter().copied());
    in_lines.chain(in_rest).filter(|&(_, word)| word != 0)
}

/// The runs of ones in `bits`: first bit and length.
fn runs(mut bits: u64) -> impl Iterator<Item = (u32, u32)> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    const SLOT_1: u64 = 0x1000_0000;

    /// 130 pages from address 0 on, 70 from [`SLOT_1`] on.
    fn layout() -> Arc<Layout> {
        let ranges = [(GuestAddress(0), 130 << 12), (GuestAddress(SLOT_1), 70 << 12)];
        Arc::new(Layout::of(&GuestMemory::from_ranges(&ranges).expect("memory")))
    }

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange { start, pages }
    }

    #[test]
    fn the_full_set_has_every_page_and_nothing_behind_the_end_of_a_slot() {
        let full = PageSet::full(&layout());
        assert_eq!(full.len(), 200);
        assert!(full.ranges().eq([range(0, 130), range(SLOT_1, 70)]));
        assert!(PageSet::empty(&layout()).is_empty() && !full.is_empty());
    }

    #[test]
    fn a_run_across_words_is_one_range_and_a_slot_begins_another() {
        let mut set = PageSet::empty(&layout());
        set.insert(0, 1 << 63 | 0b101);
        set.insert(1, 0b11);
        set.insert(3, 0b1);
        let expected = [range(0, 1), range(0x2000, 1), range(0x3f000, 3), range(SLOT_1, 1)];
        assert!(set.ranges().eq(expected));
    }

    proptest! {
        #[test]
        fn ranges_hold_exactly_the_pages_of_the_set(words in prop::collection::vec(any::<u64>(), 5)) {
            let layout = layout();
            let mut set = PageSet::full(&layout);
            set.words.iter_mut().zip(&words).for_each(|(word, &bits)| *word &= bits);
            let in_ranges: Vec<u64> = set
                .ranges()
                .flat_map(|range| (range.start..range.end()).step_by(4096))
                .collect();
            let pages = (0..130).map(|page| (page, 0)).chain((0..70).map(|page| (page, 3)));
            let in_words: Vec<u64> = pages
                .filter(|(page, first_word)| words[first_word + page / 64] >> (page % 64) & 1 == 1)
                .map(|(page, first_word)| if first_word == 0 { 0 } else { SLOT_1 } + page as u64 * 4096)
                .collect();
            prop_assert_eq!(&in_ranges, &in_words);
            prop_assert_eq!(set.len(), in_ranges.len() as u64);
        }

        #[test]
        fn clean_words_are_passed_over_wherever_they_are(words in prop::collection::vec(prop_oneof![Just(0), any::<u64>()], 0..40)) {
            let expected: Vec<_> = words.iter().copied().enumerate().filter(|&(_, word)| word != 0).collect();
            prop_assert_eq!(set_words(&words).collect::<Vec<_>>(), expected);
        }
    }
}
