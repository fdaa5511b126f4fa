//! Memory that knows what it should hold: pages that are rewritten pass by pass, each checked before it is written.
//!
//! ```text
//!  pass 7    ┌────────────┬──────────────┐      a page:  index │ generation │ filling … │ checksum
//!            │ generation │ generation   │
//!            │ 7          │ 6            │      What a page must hold follows from its index and the cursor alone,
//!            └────────────┴──────────────┘      so that a page of another moment than the cursor's is noticed.
//!                         ▲ cursor
//! ```
//! A snapshot that loses a write leaves a page *stale*; one that puts a page elsewhere leaves it *misplaced*; any other
//! damage shows in the checksum.

use std::fmt;
use std::str::FromStr;

/// Words of 8 bytes in a page.
const WORDS: usize = 512;
/// Place of the index in a page.
const INDEX: usize = 0;
/// Place of the generation.
const GENERATION: usize = 1;
/// Place of the checksum, over all words before it.
const CHECKSUM: usize = WORDS - 1;

/// Bytes of a page.
pub const PAGE_BYTES: usize = WORDS * 8;

/// A page, on a page of the machine.
#[derive(Clone)]
#[repr(align(4096))]
struct Page([u64; WORDS]);

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is whole, but of another generation: a write is missing, or one came back.
    Stale {
        /// The generation it should have.
        expected: u64,
        /// The one it has.
        found: u64,
    },
    /// It is whole, but belongs elsewhere.
    Misplaced {
        /// The page whose content it is.
        found: u64,
    },
    /// It is not whole.
    Damaged,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stale { expected, found } => write!(f, "stale: generation {found} instead of {expected}"),
            Self::Misplaced { found } => write!(f, "misplaced: the content of page {found}"),
            Self::Damaged => write!(f, "damaged"),
        }
    }
}

/// Pages that are rewritten over and over.
pub struct Pages {
    pages: Vec<Page>,
    /// Generation of the pages before the cursor; those from there on have the one before.
    pass: u64,
    cursor: usize,
}

impl Pages {
    /// This many pages, written once.
    pub fn new(count: usize) -> Self {
        let mut pages = vec![Page([0; WORDS]); count];
        for (index, page) in pages.iter_mut().enumerate() {
            page.write(word(index), 0);
        }
        Self {
            pages,
            pass: 1,
            cursor: 0,
        }
    }

    /// The pass that is under way, 1 for the first.
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// Checks the next page, then rewrites it; tells which it was if something was wrong.
    ///
    /// # Panics
    /// There are no pages.
    pub fn rewrite_next(&mut self) -> Result<(), (usize, Fault)> {
        let index = self.cursor;
        let checked = self.check(index);
        self.pages[index].write(word(index), self.pass);
        self.cursor += 1;
        if self.cursor == self.pages.len() {
            self.cursor = 0;
            self.pass += 1;
        }
        checked
    }

    /// What is wrong with any page now.
    pub fn faults(&self) -> impl Iterator<Item = (usize, Fault)> {
        (0..self.pages.len()).filter_map(|index| self.check(index).err())
    }

    fn check(&self, index: usize) -> Result<(), (usize, Fault)> {
        let generation = if index < self.cursor { self.pass } else { self.pass - 1 };
        self.pages[index]
            .check(word(index), generation)
            .map_err(|fault| (index, fault))
    }
}

impl Page {
    fn write(&mut self, index: u64, generation: u64) {
        self.0[INDEX] = index;
        self.0[GENERATION] = generation;
        for place in GENERATION + 1..CHECKSUM {
            self.0[place] = filling(index, generation, place);
        }
        self.0[CHECKSUM] = self.checksum();
    }

    fn check(&self, index: u64, generation: u64) -> Result<(), Fault> {
        if self.0[CHECKSUM] != self.checksum() {
            return Err(Fault::Damaged);
        }
        if self.0[INDEX] != index {
            return Err(Fault::Misplaced { found: self.0[INDEX] });
        }
        if self.0[GENERATION] != generation {
            return Err(Fault::Stale {
                expected: generation,
                found: self.0[GENERATION],
            });
        }
        let is_right = |place| self.0[place] == filling(index, generation, place);
        if (GENERATION + 1..CHECKSUM).all(is_right) {
            Ok(())
        } else {
            Err(Fault::Damaged)
        }
    }

    /// FNV-1a, a word at a time.
    fn checksum(&self) -> u64 {
        self.0[..CHECKSUM].iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| {
            (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }
}

/// What a page holds where nothing else is; different in each page and generation.
fn filling(index: u64, generation: u64, place: usize) -> u64 {
    (index << 32 ^ generation).wrapping_add(word(place).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn word(number: usize) -> u64 {
    u64::try_from(number).expect("this runs on machines of 64 bits")
}

/// What a writer has seen so far; written as `pass=1 pages=2 faults=0 …`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The pass that is under way.
    pub pass: u64,
    /// Pages rewritten.
    pub pages: u64,
    /// Pages that did not hold what they should.
    pub faults: u64,
    /// Times that a clock went back.
    pub clock_faults: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME`, in nanoseconds.
    pub realtime_ns: u64,
}

impl Verdict {
    /// Takes the time, and counts a clock that has gone back since the last time.
    pub fn take_time(&mut self, monotonic_ns: u64, realtime_ns: u64) {
        self.clock_faults += u64::from(monotonic_ns < self.monotonic_ns) + u64::from(realtime_ns < self.realtime_ns);
        self.monotonic_ns = monotonic_ns;
        self.realtime_ns = realtime_ns;
    }

    /// Whether nothing was wrong.
    pub fn is_good(&self) -> bool {
        self.faults == 0 && self.clock_faults == 0
    }

    fn fields(&mut self) -> [(&'static str, &mut u64); 6] {
        [
            ("pass", &mut self.pass),
            ("pages", &mut self.pages),
            ("faults", &mut self.faults),
            ("clock_faults", &mut self.clock_faults),
            ("monotonic_ns", &mut self.monotonic_ns),
            ("realtime_ns", &mut self.realtime_ns),
        ]
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut copy = *self;
        let words = copy.fields().map(|(name, value)| format!("{name}={value}"));
        f.write_str(&words.join(" "))
    }
}

impl FromStr for Verdict {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut verdict = Self::default();
        let mut words = text.split_whitespace();
        for (name, value) in verdict.fields() {
            let number = words.next().and_then(|word| word.strip_prefix(name)?.strip_prefix('='));
            *value = number
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| format!("no {name} in '{text}'"))?;
        }
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_nobody_touches_are_right_in_every_pass() {
        let mut pages = Pages::new(3);
        for written in 0..10 {
            assert_eq!(pages.pass(), 1 + written / 3);
            assert_eq!(pages.faults().next(), None);
            assert_eq!(pages.rewrite_next(), Ok(()));
        }
    }

    #[test]
    fn a_page_of_another_moment_is_stale_even_right_at_the_cursor() {
        let mut pages = Pages::new(4);
        let before = pages.pages.clone();
        for _ in 0..6 {
            pages.rewrite_next().expect("right");
        }
        pages.pages[1] = before[1].clone();
        pages.pages[2] = before[2].clone();
        let stale = |expected| Fault::Stale { expected, found: 0 };
        assert_eq!(pages.faults().collect::<Vec<_>>(), [(1, stale(2)), (2, stale(1))]);
        assert_eq!(pages.rewrite_next(), Err((2, stale(1))));
        assert_eq!(pages.faults().collect::<Vec<_>>(), [(1, stale(2))], "it was rewritten");
    }

    #[test]
    fn a_page_in_another_place_and_one_with_a_flipped_bit_are_told_apart() {
        let mut pages = Pages::new(3);
        pages.pages[0] = pages.pages[2].clone();
        for place in [INDEX, GENERATION, 2, CHECKSUM] {
            pages.pages[1].0[place] ^= 1 << 17;
            assert_eq!(pages.pages[1].check(1, 0), Err(Fault::Damaged), "word {place}");
            pages.pages[1].0[place] ^= 1 << 17;
        }
        let misplaced = Fault::Misplaced { found: 2 };
        assert_eq!(pages.faults().collect::<Vec<_>>(), [(0, misplaced)]);
    }

    #[test]
    fn a_verdict_reads_back_as_written() {
        let mut verdict = Verdict {
            pass: 1,
            pages: 2,
            faults: 3,
            ..Verdict::default()
        };
        verdict.take_time(5, 6);
        assert_eq!(verdict.to_string().parse(), Ok(verdict));
        assert!("pass=1".parse::<Verdict>().is_err());
        assert!("".parse::<Verdict>().is_err());
    }

    #[test]
    fn each_clock_that_goes_back_is_counted() {
        let mut verdict = Verdict::default();
        for (monotonic, realtime, faults) in [(5, 50, 0), (5, 50, 0), (4, 51, 1), (5, 49, 2), (1, 1, 4)] {
            verdict.take_time(monotonic, realtime);
            assert_eq!(verdict.clock_faults, faults);
        }
        assert!(!verdict.is_good());
    }
}
