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
use std::ops::Range;
use std::sync::Arc;

use cutover_devices::GuestMemory;
use cutover_migration::pages::{runs, set_words};
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

    /// The block of at most `most` pages that the page at guest address `address` is of, and that begins at a multiple of
    /// that in its slot.
    pub fn block(&self, address: u64, most: u64) -> PageRange {
        let page = PageRange::page(address);
        self.slot_at(page.start).map_or(page, |slot| {
            let index = (page.start - slot.start) / PAGE_SIZE;
            let first = index - index % most;
            PageRange {
                start: slot.start + first * PAGE_SIZE,
                pages: most.min(slot.pages - first),
            }
        })
    }

    /// The pages with these `numbers`, as far as there are any, slot by slot.
    pub fn numbered(&self, numbers: Range<u64>) -> impl Iterator<Item = PageRange> {
        self.slots.iter().filter_map(move |slot| {
            let first = numbers.start.max(slot.first_number);
            let end = numbers.end.min(slot.first_number + slot.pages);
            (first < end).then(|| PageRange {
                start: slot.start + (first - slot.first_number) * PAGE_SIZE,
                pages: end - first,
            })
        })
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.slots.iter().map(|slot| slot.pages).sum()
    }

    /// The words that have bits of `range`, with those bits; `range` is within one slot, or none.
    pub(super) fn words_of(&self, range: PageRange) -> impl Iterator<Item = (usize, u64)> {
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

    /// What is before guest address `at`, one of a page of the range or its end, and the rest.
    pub fn split_at(self, at: u64) -> (Self, Self) {
        let pages = (at - self.start) / PAGE_SIZE;
        let rest = Self {
            start: at,
            pages: self.pages - pages,
        };
        (Self { pages, ..self }, rest)
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

    /// The bits of the pages of `slot`, the first page's first.
    pub fn words_of_slot(&self, slot: &Slot) -> &[u64] {
        &self.words[slot.first_word..slot.first_word + slot.words()]
    }

    /// The words that have pages, with these.
    pub fn words(&self) -> impl Iterator<Item = (usize, u64)> {
        set_words(&self.words)
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
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word &= !bits;
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
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word |= bits;
        }
    }

    /// How many pages.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words().next().is_none()
    }

    /// The pages in ascending order, consecutive ones together.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> {
        self.merged(self.words())
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

#[cfg(test)]
mod tests;
