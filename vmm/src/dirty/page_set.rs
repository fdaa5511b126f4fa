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
//!
//! Pages have guest addresses, and numbers: those of the memory image of a snapshot, which has no gaps between slots.

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
    /// Number of the first page.
    pub first_number: u64,
}

impl Slot {
    /// The guest address behind its last page.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE_SIZE
    }

    /// All its pages.
    pub fn range(&self) -> PageRange {
        PageRange {
            start: self.start,
            pages: self.pages,
        }
    }

    /// Number of words.
    pub fn words(&self) -> usize {
        usize::try_from(self.pages.div_ceil(WORD_PAGES))
            .expect("a slot is mapped, and its words are fewer than its bytes")
    }
}

impl Layout {
    /// The layout of `memory`: one slot per region, in the order of their addresses.
    pub fn of(memory: &GuestMemory) -> Self {
        let (mut words, mut pages) = (0, 0);
        let slots = memory.iter().map(|region| {
            let slot = Slot {
                start: region.start_addr().raw_value(),
                pages: region.len() / PAGE_SIZE,
                first_word: words,
                first_number: pages,
            };
            words += slot.words();
            pages += slot.pages;
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

    /// The slot with guest address `address`.
    fn slot_at(&self, address: u64) -> Option<&Slot> {
        let next = self.slots.partition_point(|slot| slot.end() <= address);
        self.slots.get(next).filter(|slot| slot.start <= address)
    }

    /// Number of the page at guest address `address`, if there is one.
    pub fn number(&self, address: u64) -> Option<u64> {
        let slot = self.slot_at(address)?;
        Some(slot.first_number + (address - slot.start) / PAGE_SIZE)
    }

    /// The pages from that at guest address `address` on, at most `most`, up to the next multiple of that in their slot.
    pub fn range_from(&self, address: u64, most: u64) -> PageRange {
        let range = PageRange::page(address);
        let pages = self.slot_at(range.start).map_or(0, |slot| {
            let page = (range.start - slot.start) / PAGE_SIZE;
            (most - page % most).min(slot.pages - page)
        });
        PageRange { pages, ..range }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.slots.iter().map(|slot| slot.pages).sum()
    }

    /// The words that have bits of `range`, with those bits; `range` is within one slot, or none.
    fn words_of(&self, range: PageRange) -> impl Iterator<Item = (usize, u64)> {
        let slot = self.slot_at(range.start).copied();
        slot.into_iter().flat_map(move |slot| {
            let first = (range.start - slot.start) / PAGE_SIZE;
            let end = slot.pages.min(first + range.pages);
            let words = first / WORD_PAGES..end.div_ceil(WORD_PAGES);
            let first_index = usize::try_from(words.start).expect("a word of the slot");
            (slot.first_word + first_index..).zip(words).map(move |(index, word)| {
                let from = first.saturating_sub(word * WORD_PAGES);
                let beyond = ((word + 1) * WORD_PAGES).saturating_sub(end);
                (index, u64::MAX << from & u64::MAX >> beyond)
            })
        })
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

    /// The same pages as ranges of at most `most` each.
    pub fn parts(self, most: u64) -> impl Iterator<Item = Self> {
        (0..self.pages.div_ceil(most)).map(move |part| Self {
            start: self.start + part * most * PAGE_SIZE,
            pages: most.min(self.pages - part * most),
        })
    }

    /// The page at guest address `address`.
    pub fn page(address: u64) -> Self {
        Self {
            start: address & !(PAGE_SIZE - 1),
            pages: 1,
        }
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
        let mut full = Self::empty(layout);
        full.fill();
        full
    }

    /// Where the VM's pages are.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Adds every page there is.
    pub fn fill(&mut self) {
        self.words.fill(u64::MAX);
        for slot in &self.layout.slots {
            let unused = slot.words() as u64 * WORD_PAGES - slot.pages;
            self.words[slot.first_word + slot.words() - 1] >>= unused;
        }
    }

    /// Whether it has the page at guest address `address`.
    pub fn contains(&self, address: u64) -> bool {
        let mut words = self.layout.words_of(PageRange::page(address));
        words.any(|(word, bits)| self.words[word] & bits != 0)
    }

    /// Adds the pages of `range`, which are of one slot.
    pub fn insert_range(&mut self, range: PageRange) {
        for (word, bits) in self.layout.words_of(range) {
            self.words[word] |= bits;
        }
    }

    /// Removes the pages of `range`, which are of one slot.
    pub fn remove_range(&mut self, range: PageRange) {
        for (word, bits) in self.layout.words_of(range) {
            self.words[word] &= !bits;
        }
    }

    /// Removes the pages of `other`, which is of the same VM.
    pub fn subtract(&mut self, other: &PageSet) {
        for (word, bits) in set_words(&other.words) {
            self.words[word] &= !bits;
        }
    }

    /// Takes out the first pages, at most `most`, consecutive ones together. `from` is the word to begin with, before
    /// which there are none, and becomes that for the next time.
    pub fn take_first(&mut self, from: &mut usize, most: u64) -> Vec<PageRange> {
        let mut taken = Vec::<PageRange>::new();
        let mut left = most;
        while left > 0 {
            let first_word = set_words(&self.words[*from..]).next();
            let Some((word, bits)) = first_word.map(|(word, bits)| (*from + word, bits)) else {
                break;
            };
            let rest = (0..left.min(WORD_PAGES)).fold(bits, |bits, _| bits & bits.wrapping_sub(1));
            for (first, pages) in runs(bits & !rest) {
                let range = self.range(word, first, pages);
                match taken.last_mut() {
                    Some(last) if last.end() == range.start => last.pages += range.pages,
                    _ => taken.push(range),
                }
            }
            left -= u64::from((bits & !rest).count_ones());
            self.words[word] = rest;
            *from = word;
        }
        taken
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
        self.merged(set_words(&self.words))
    }

    /// Those of the pages of `range`, which are of one slot, that are in the set, consecutive ones together.
    pub fn ranges_in(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        let words = self.layout.words_of(range);
        self.merged(words.map(|(word, bits)| (word, self.words[word] & bits)))
    }

    /// Those of the pages of `range`, which are of one slot, that are not in the set, consecutive ones together.
    pub fn gaps_in(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        let words = self.layout.words_of(range);
        self.merged(words.map(|(word, bits)| (word, !self.words[word] & bits)))
    }

    /// The pages of words in ascending order, consecutive ones together.
    fn merged(&self, words: impl Iterator<Item = (usize, u64)>) -> impl Iterator<Item = PageRange> {
        let mut runs = words
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
    use std::collections::BTreeSet;

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

    #[test]
    fn the_parts_of_a_range_are_the_range() {
        assert!(
            range(0x3000, 5)
                .parts(2)
                .eq([range(0x3000, 2), range(0x5000, 2), range(0x7000, 1)])
        );
        assert!(range(0x3000, 4).parts(4).eq([range(0x3000, 4)]));
        assert_eq!(range(0x3000, 0).parts(4).count(), 0);
    }

    #[test]
    fn numbers_go_on_from_slot_to_slot() {
        let layout = layout();
        let addresses = [0, 0xfff, 0x1000, 129 << 12, SLOT_1, SLOT_1 + (69 << 12)];
        let numbers = addresses.map(|address| layout.number(address));
        assert_eq!(numbers, [0, 0, 1, 129, 130, 199].map(Some));
        assert_eq!(
            [130 << 12, SLOT_1 - 1, SLOT_1 + (70 << 12)].map(|address| layout.number(address)),
            [None; 3]
        );
        assert_eq!(layout.pages(), 200);
    }

    /// A page of [`layout`] by its number.
    fn numbered(number: u64) -> PageRange {
        PageRange::page(if number < 130 {
            number << 12
        } else {
            SLOT_1 + ((number - 130) << 12)
        })
    }

    fn set_of(numbers: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::empty(&layout());
        numbers.iter().for_each(|&number| set.insert_range(numbered(number)));
        set
    }

    fn numbers_of(ranges: impl IntoIterator<Item = PageRange>) -> Vec<u64> {
        let layout = layout();
        let pages = ranges
            .into_iter()
            .flat_map(|range| (range.start..range.end()).step_by(4096));
        pages.map(|address| layout.number(address).expect("a page")).collect()
    }

    fn some_pages() -> impl Strategy<Value = BTreeSet<u64>> {
        prop_oneof![
            prop::collection::btree_set(0_u64..200, 0..200),
            (0_u64..200, 0_u64..200).prop_map(|(a, b)| (a.min(b)..a.max(b)).collect()),
        ]
    }

    proptest! {
        #[test]
        fn sets_follow_the_algebra_of_sets(a in some_pages(), b in some_pages()) {
            let (set_a, set_b) = (set_of(&a), set_of(&b));
            prop_assert_eq!(numbers_of(set_a.ranges()), a.iter().copied().collect::<Vec<_>>());
            for number in 0..200 {
                prop_assert_eq!(set_a.contains(numbered(number).start), a.contains(&number));
            }
            let (mut union, mut difference) = (set_a.clone(), set_a.clone());
            union.union(&set_b);
            difference.subtract(&set_b);
            prop_assert_eq!(numbers_of(union.ranges()), a.union(&b).copied().collect::<Vec<_>>());
            prop_assert_eq!(numbers_of(difference.ranges()), a.difference(&b).copied().collect::<Vec<_>>());
        }

        #[test]
        fn ranges_are_added_and_removed_as_their_pages_one_by_one(
            a in some_pages(), slot in 0_u64..2, first in 0_u64..70, pages in 0_u64..140
        ) {
            let range = PageRange { start: numbered(slot * 130 + first).start, pages };
            let end = if slot == 0 { 130 } else { 200 };
            let within: BTreeSet<_> = (slot * 130 + first..end.min(slot * 130 + first + pages)).collect();
            let (mut with, mut without) = (set_of(&a), set_of(&a));
            let common: Vec<_> = a.intersection(&within).copied().collect();
            prop_assert_eq!(numbers_of(with.ranges_in(range)), common);
            let missing: Vec<_> = within.difference(&a).copied().collect();
            prop_assert_eq!(numbers_of(with.gaps_in(range)), missing);
            with.insert_range(range);
            without.remove_range(range);
            prop_assert_eq!(numbers_of(with.ranges()), a.union(&within).copied().collect::<Vec<_>>());
            prop_assert_eq!(numbers_of(without.ranges()), a.difference(&within).copied().collect::<Vec<_>>());
        }

        #[test]
        fn pages_are_taken_out_in_order_and_each_once(a in some_pages(), most in 1_u64..150) {
            let (mut set, mut from, mut all) = (set_of(&a), 0, Vec::new());
            loop {
                let taken = numbers_of(set.take_first(&mut from, most));
                if taken.is_empty() {
                    break;
                }
                prop_assert!(taken.len() as u64 <= most);
                all.extend(taken);
            }
            prop_assert!(set.is_empty());
            prop_assert_eq!(all, a.into_iter().collect::<Vec<_>>());
        }

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
