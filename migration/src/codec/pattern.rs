//! Pages that have a pattern: page tables of consecutive frames, lists of free objects, tables that count.
//!
//! ```text
//!  word       5      5      5      9     13     17     21   …
//!  before it  0      5      5      5      9     13     17   …     the same, a word later
//!  pattern    step 5 × 1   kept × 2     step 4 × 4          …
//! ```
//! Their words differ by the same again and again, each from the one before. So the page makes a short delta
//! ([`super::delta`]) to itself, moved on by a word. A look at a few words tells nearly always whether it does.

use super::delta::{self, Malformed, Outcome, Part};
use super::{Page, varint};

/// Bytes of a word.
const WORD: usize = size_of::<u64>();
/// Longest pattern: what is longer is a case for a compressor, which finds more in it.
const BYTES_MAX: usize = 256;
/// Words that have to be even, in some places of the page, before a pattern is looked for in all of it.
const LOOK_WORDS: usize = 6;
/// Where that is.
const LOOK_AT: [usize; 3] = [32, 200, 400];

/// Appends `page` to `out` as a pattern, if it has one.
pub fn encode(page: &Page, out: &mut Vec<u8>) -> bool {
    let (words, _) = page.as_chunks::<WORD>();
    if !LOOK_AT.iter().all(|&at| is_even(&words[at..at + LOOK_WORDS])) {
        return false;
    }
    let start = out.len();
    // There is none before the first word: it differs from zero.
    varint::write(0, out);
    delta::write_step(1, u64::from_le_bytes(words[0]), out);
    let others = words.len() - 1;
    match delta::encode_words(&words[..others], &words[1..], BYTES_MAX, out) {
        Outcome::Written => true,
        Outcome::Same => {
            varint::write(others as u64, out);
            true
        }
        Outcome::TooLong => {
            out.truncate(start);
            false
        }
    }
}

/// Takes a pattern off the front of `bytes` and has `page` be what it says.
///
/// # Errors
/// It is malformed.
pub fn apply(bytes: &mut &[u8], page: &mut Page) -> Result<(), Malformed> {
    let mut last = 0u64;
    delta::each_part(bytes, page, |words, part| match part {
        Part::Kept => words.fill(last.to_le_bytes()),
        Part::Step(step) => {
            for word in words {
                last = last.wrapping_add(step);
                *word = last.to_le_bytes();
            }
        }
        Part::New(new) => {
            words.as_flattened_mut().copy_from_slice(new);
            last = words.last().map_or(last, |word| u64::from_le_bytes(*word));
        }
    })
}

/// Whether all words differ by the same from the one before.
fn is_even(words: &[[u8; WORD]]) -> bool {
    let mut steps = words.windows(2).map(|pair| difference(pair[0], pair[1]));
    let first = steps.next();
    steps.all(|step| Some(step) == first)
}

fn difference(from: [u8; WORD], to: [u8; WORD]) -> u64 {
    u64::from_le_bytes(to).wrapping_sub(u64::from_le_bytes(from))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::ZERO;

    fn page(word: impl Fn(u64) -> u64) -> Page {
        let mut page = ZERO;
        for (place, bytes) in (0..).zip(page.as_chunks_mut::<WORD>().0) {
            *bytes = word(place).to_le_bytes();
        }
        page
    }

    /// Bytes of the page's pattern, which was applied and found right.
    fn pattern_bytes(page: &Page) -> usize {
        let mut bytes = vec![7];
        assert!(encode(page, &mut bytes));
        let mut applied = [0xff; 4096];
        bytes.push(8);
        let mut rest = &bytes[1..];
        apply(&mut rest, &mut applied).unwrap();
        assert!(applied == *page);
        assert_eq!(rest, [8]);
        bytes.len() - 2
    }

    #[test]
    fn a_page_table_of_consecutive_frames_has_one() {
        let table = page(|entry| {
            if entry == 99 {
                0
            } else {
                0x8000_0001_2345_6067 + (entry << 12)
            }
        });
        assert!(pattern_bytes(&table) < 50);
    }

    #[test]
    fn a_filled_page_and_one_that_counts_have_one() {
        assert!(pattern_bytes(&[0x6b; 4096]) < 20);
        assert!(pattern_bytes(&page(|place| place.wrapping_mul(0x9e37_79b9_7f4a_7c15))) < 20);
        assert!(pattern_bytes(&page(|place| if place == 511 { 1 } else { 0 })) < 20);
    }

    #[test]
    fn other_pages_have_none_and_leave_nothing_behind() {
        let mut out = vec![7];
        assert!(!encode(&page(|place| place.wrapping_mul(place) << 5), &mut out));
        let even_where_it_is_looked = page(|place| match place % 64 {
            0..50 => 0,
            _ => place.wrapping_mul(place) << 40,
        });
        assert!(!encode(&even_where_it_is_looked, &mut out));
        assert_eq!(out, [7]);
    }

    proptest! {
        #[test]
        fn a_page_of_few_patterns_reads_back(
            parts in prop::collection::vec((any::<u64>(), any::<u64>(), 1..300usize), 1..6),
        ) {
            let mut words: Vec<u64> = parts
                .iter()
                .flat_map(|&(first, step, len)| (0..len as u64).map(move |place| first.wrapping_add(place.wrapping_mul(step))))
                .collect();
            words.resize(512, 3);
            let page = page(|place| words[usize::try_from(place).unwrap()]);
            let mut bytes = Vec::new();
            if encode(&page, &mut bytes) {
                prop_assert_eq!(pattern_bytes(&page), bytes.len());
            } else {
                prop_assert!(bytes.is_empty());
            }
        }

        #[test]
        fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = apply(&mut bytes.as_slice(), &mut ZERO.clone());
        }
    }
}
