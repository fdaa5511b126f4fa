//! What was sent of each page last: the old version of pages there is room for, a hash of the others.
//!
//! ```text
//!  table    a number for each page        never sent │ hash of what was sent │ place of what was sent
//!  places   old versions, 64 to a slab    up to a limit
//! ```
//! A page that comes again takes the place of one that has not come again for a whole round. If there is none, it is not
//! kept: pages that are rewritten in turns, more than there are places, would otherwise push each other out and none
//! would ever be found.
//!
//! The hash is XXH3 with 64 bits. A guest that looks for two contents with the same hash can have its own memory moved
//! wrongly, and nobody else's.

use twox_hash::XxHash3_64;

use super::Page;
use super::delta::{self, Outcome};
use crate::pages::{PAGE_BYTES, WORD_PAGES};

/// Most memory for old versions, of all streams together. The table takes 8 bytes for each page besides, a five
/// hundredth of the VM's memory.
pub const CACHE_BYTES_MAX: usize = 256 << 20;

/// Longest delta: beyond half a page little is gained.
const DELTA_BYTES_MAX: usize = PAGE_BYTES / 2;
/// Old versions of a slab: places are made when they are needed, this many at a time.
const SLAB_PAGES: usize = 64;
/// Most places that are looked at to find one for a page.
const LOOKS_MAX: usize = 64;

/// What a page is, compared to what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The same.
    Unchanged,
    /// Something else, and the delta was written.
    Delta,
    /// Not known, or too different.
    New,
}

/// What one of some streams has sent.
pub struct History {
    streams: u64,
    /// One for each page of the stream; made when something is remembered first.
    table: Vec<Entry>,
    pages: u64,
    slabs: Vec<Box<[Page]>>,
    places: Vec<Place>,
    free: Vec<usize>,
    places_max: usize,
    /// Where the search for a place goes on.
    hand: usize,
    round: u32,
}

/// What is known of a page: 0 for nothing, an odd number for a hash, an even one for a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry(u64);

/// What is at a place.
#[derive(Clone, Copy)]
struct Place {
    /// Index of its page in the table.
    owner: usize,
    /// When its page last came again; 0 if it never has.
    used: u32,
}

enum Known {
    Nothing,
    Hash(u64),
    Place(usize),
}

/// What `new` is, compared to `old`. Appends the delta to `deltas` if there is one.
pub fn compare(old: &Page, new: &Page, deltas: &mut Vec<u8>) -> Seen {
    match delta::encode(old, new, DELTA_BYTES_MAX, deltas) {
        Outcome::Same => Seen::Unchanged,
        Outcome::Written => Seen::Delta,
        Outcome::TooLong => Seen::New,
    }
}

impl Entry {
    const NOTHING: Self = Self(0);

    fn hash(hash: u64) -> Self {
        Self(hash | 1)
    }

    fn place(place: usize) -> Self {
        Self((place as u64 + 1) << 1)
    }

    fn known(self) -> Known {
        match self.0 {
            0 => Known::Nothing,
            hash if hash & 1 == 1 => Known::Hash(hash),
            place => Known::Place(usize::try_from((place >> 1) - 1).expect("it was made of one")),
        }
    }
}

impl History {
    /// The history of one of `streams` streams, of `pages` pages in all; nothing was sent.
    pub fn new(pages: u64, streams: u64) -> Self {
        let share = CACHE_BYTES_MAX / PAGE_BYTES / usize::try_from(streams).expect("a few");
        Self::with_places(pages, streams, share)
    }

    fn with_places(pages: u64, streams: u64, places_max: usize) -> Self {
        Self {
            streams,
            table: Vec::new(),
            pages,
            slabs: Vec::new(),
            places: Vec::new(),
            free: Vec::new(),
            places_max,
            hand: 0,
            round: 0,
        }
    }

    /// Round number `round`, from 1, begins.
    pub fn begin_round(&mut self, round: u32) {
        self.round = round;
    }

    /// `page` is about to be sent as `content`, and is remembered so. Appends the delta to `deltas` if there is one.
    pub fn look(&mut self, page: u64, content: &Page, deltas: &mut Vec<u8>) -> Seen {
        if self.table.is_empty() {
            let words = self.pages.div_ceil(WORD_PAGES).div_ceil(self.streams);
            let entries = usize::try_from(words * WORD_PAGES).expect("pages are fewer than addresses");
            self.table = vec![Entry::NOTHING; entries];
        }
        let index = self.index(page);
        match self.table[index].known() {
            Known::Nothing => {
                self.remember(index, content, 0);
                Seen::New
            }
            Known::Hash(hash) if Entry::hash(hash) == hash_of(content) => Seen::Unchanged,
            Known::Hash(_) => {
                self.remember(index, content, self.round);
                Seen::New
            }
            Known::Place(place) => {
                self.places[place].used = self.round;
                let old = &mut self.slabs[place / SLAB_PAGES][place % SLAB_PAGES];
                let seen = compare(old, content, deltas);
                if seen != Seen::Unchanged {
                    *old = *content;
                }
                seen
            }
        }
    }

    /// `page` is sent without being looked at: what is known of it is not true any more.
    pub fn forget(&mut self, page: u64) {
        if self.table.is_empty() {
            return;
        }
        let index = self.index(page);
        if let Known::Place(place) = self.table[index].known() {
            self.free.push(place);
        }
        self.table[index] = Entry::NOTHING;
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::with_places(self.pages, self.streams, self.places_max);
    }

    fn index(&self, page: u64) -> usize {
        debug_assert!(page < self.pages);
        let own_word = page / WORD_PAGES / self.streams;
        usize::try_from(own_word * WORD_PAGES + page % WORD_PAGES).expect("the table has it")
    }

    /// Remembers the page at `index`, which came again in round `used` if that is not 0.
    fn remember(&mut self, index: usize, content: &Page, used: u32) {
        let Some(place) = self.free_place().or_else(|| self.take_place(used)) else {
            self.table[index] = hash_of(content);
            return;
        };
        self.slabs[place / SLAB_PAGES][place % SLAB_PAGES] = *content;
        self.places[place] = Place { owner: index, used };
        self.table[index] = Entry::place(place);
    }

    /// A place where nothing is.
    fn free_place(&mut self) -> Option<usize> {
        if let Some(place) = self.free.pop() {
            return Some(place);
        }
        let place = self.places.len();
        if place >= self.places_max {
            return None;
        }
        if place.is_multiple_of(SLAB_PAGES) {
            self.slabs.push(vec![[0; PAGE_BYTES]; SLAB_PAGES].into_boxed_slice());
        }
        self.places.push(Place { owner: 0, used: 0 });
        Some(place)
    }

    /// A place whose page has not come again lately, for one that has come again in round `used`.
    fn take_place(&mut self, used: u32) -> Option<usize> {
        for _ in 0..LOOKS_MAX.min(self.places.len()) {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.places.len();
            if self.places[place].used + 1 < used {
                let old = &self.slabs[place / SLAB_PAGES][place % SLAB_PAGES];
                self.table[self.places[place].owner] = hash_of(old);
                return Some(place);
            }
        }
        None
    }
}

fn hash_of(content: &Page) -> Entry {
    Entry::hash(XxHash3_64::oneshot(content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::stream_of;

    fn page(value: u64) -> Page {
        let mut page = [1; PAGE_BYTES];
        page[..8].copy_from_slice(&value.to_le_bytes());
        page
    }

    fn history(places: usize) -> History {
        let mut history = History::with_places(1000, 1, places);
        history.begin_round(1);
        history
    }

    fn look(history: &mut History, page_number: u64, value: u64) -> Seen {
        history.look(page_number, &page(value), &mut Vec::new())
    }

    #[test]
    fn a_page_is_new_then_unchanged_then_a_delta_to_what_was_sent_last() {
        let mut history = history(2);
        assert_eq!(look(&mut history, 7, 1), Seen::New);
        assert_eq!(look(&mut history, 7, 1), Seen::Unchanged);
        assert_eq!(look(&mut history, 7, 2), Seen::Delta);
        let mut deltas = Vec::new();
        assert_eq!(history.look(7, &page(5), &mut deltas), Seen::Delta);
        let mut content = page(2);
        delta::apply(&mut deltas.as_slice(), &mut content).unwrap();
        assert!(content == page(5));
        let mut other = [0; PAGE_BYTES];
        for (place, byte) in (0u64..).zip(&mut other) {
            *byte = ((place * place * 31) >> 3).to_le_bytes()[0];
        }
        assert_eq!(history.look(7, &other, &mut deltas), Seen::New, "too different");
        assert_eq!(history.look(7, &other, &mut deltas), Seen::Unchanged);
    }

    #[test]
    fn a_page_without_a_place_is_known_by_its_hash() {
        let mut history = history(0);
        assert_eq!(look(&mut history, 7, 1), Seen::New);
        assert_eq!(look(&mut history, 7, 1), Seen::Unchanged);
        assert_eq!(look(&mut history, 7, 2), Seen::New);
        assert_eq!(look(&mut history, 7, 2), Seen::Unchanged);
    }

    #[test]
    fn what_is_forgotten_is_new_and_its_place_is_free() {
        let mut history = history(1);
        look(&mut history, 7, 1);
        history.forget(7);
        assert_eq!(look(&mut history, 8, 1), Seen::New);
        assert_eq!(look(&mut history, 8, 2), Seen::Delta, "it has the place");
        assert_eq!(look(&mut history, 7, 1), Seen::New);
        history.clear();
        assert_eq!(look(&mut history, 8, 2), Seen::New);
    }

    #[test]
    fn a_page_that_comes_again_takes_the_place_of_one_that_does_not() {
        let mut history = history(1);
        look(&mut history, 1, 10);
        look(&mut history, 2, 20);
        history.begin_round(2);
        assert_eq!(look(&mut history, 2, 21), Seen::New, "only its hash was known");
        assert_eq!(look(&mut history, 2, 22), Seen::Delta, "now it has the place");
        assert_eq!(look(&mut history, 1, 10), Seen::Unchanged, "by its hash");
    }

    #[test]
    fn pages_that_all_come_again_do_not_push_each_other_out() {
        let mut history = history(2);
        for round in 1..6 {
            history.begin_round(round);
            let seen = (0..4).map(|page| look(&mut history, page, page << 32 | u64::from(round)));
            let deltas = seen.filter(|seen| *seen == Seen::Delta).count();
            assert_eq!(deltas, if round == 1 { 0 } else { 2 }, "round {round}");
        }
    }

    #[test]
    fn a_page_that_stopped_coming_gives_its_place_up() {
        let mut history = history(1);
        look(&mut history, 1, 10);
        history.begin_round(2);
        look(&mut history, 1, 11);
        look(&mut history, 2, 20);
        history.begin_round(3);
        look(&mut history, 2, 21);
        assert_eq!(look(&mut history, 2, 22), Seen::New, "1 came a round ago");
        history.begin_round(4);
        look(&mut history, 2, 23);
        assert_eq!(look(&mut history, 2, 24), Seen::Delta);
    }

    #[test]
    fn streams_share_pages_by_words() {
        let mut histories: Vec<_> = (0..3).map(|_| History::with_places(1000, 3, 1000)).collect();
        for page_number in 0..1000 {
            let stream = usize::try_from(stream_of(page_number, 3)).unwrap();
            assert_eq!(look(&mut histories[stream], page_number, page_number), Seen::New);
        }
        for page_number in 0..1000 {
            let stream = usize::try_from(stream_of(page_number, 3)).unwrap();
            assert_eq!(look(&mut histories[stream], page_number, page_number), Seen::Unchanged);
        }
    }
}
