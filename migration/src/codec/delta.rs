//! The difference between two versions of a page, by words of 64 bits.
//!
//! ```text
//!  delta   kept │ change │ kept │ change │ … │ kept          until the words of a page are complete
//!
//!  kept    number of words that are the same (LEB128), maybe 0
//!  change  step:     (words - 1) << 1      │ by how much all these words grew, zigzag LEB128
//!          replace:  (words - 1) << 1 | 1  │ the new words, 8 bytes each, little-endian
//! ```
//! Words are compared by subtraction rather than bit by bit: memory that changes in many places at once has mostly
//! counted something up or moved pointers by the same distance everywhere, and a run of equal differences is as short
//! as one.

use super::{Page, varint};
use crate::pages::PAGE_BYTES;

/// Bytes of a word.
const WORD: usize = size_of::<u64>();
/// Words of a page.
const WORDS: usize = PAGE_BYTES / WORD;
/// What became of a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Both versions are the same; nothing was written.
    Same,
    /// It was written.
    Written,
    /// It would be longer than it may be; nothing was written.
    TooLong,
}

/// A delta that is none, or not for a whole page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Appends to `out` what makes `new` of `old`, if that takes at most `bytes_max` bytes.
pub fn encode(old: &Page, new: &Page, bytes_max: usize, out: &mut Vec<u8>) -> Outcome {
    encode_words(old.as_chunks().0, new.as_chunks().0, bytes_max, out)
}

/// As [`encode`], of words: as many old as new ones.
pub fn encode_words(old: &[[u8; WORD]], new: &[[u8; WORD]], bytes_max: usize, out: &mut Vec<u8>) -> Outcome {
    let start = out.len();
    let mut at = run(old, new, 0);
    if at == new.len() {
        return Outcome::Same;
    }
    let mut kept = at;
    loop {
        varint::write(kept as u64, out);
        if at < new.len() {
            at += write_change(&old[at..], &new[at..], out);
        }
        if out.len() - start > bytes_max {
            out.truncate(start);
            return Outcome::TooLong;
        }
        if at == new.len() {
            return Outcome::Written;
        }
        kept = run(&old[at..], &new[at..], 0);
        at += kept;
    }
}

/// Takes a delta off the front of `delta` and applies it to `page`, which is left half-way if the delta is malformed.
///
/// # Errors
/// It is malformed.
pub fn apply(delta: &mut &[u8], page: &mut Page) -> Result<(), Malformed> {
    each_part(delta, page, |words, part| match part {
        Part::Kept => {}
        Part::Step(step) => {
            for word in words {
                *word = u64::from_le_bytes(*word).wrapping_add(step).to_le_bytes();
            }
        }
        Part::New(new) => words.as_flattened_mut().copy_from_slice(new),
    })
}

/// Words of a page that are the same, have grown by as much, or are new: then these are their bytes.
pub enum Part<'a> {
    /// The same.
    Kept,
    /// Grown by this.
    Step(u64),
    /// New.
    New(&'a [u8]),
}

/// Takes a delta off the front of `delta`, and has `put` do for the words of `page`, in order, what each of its parts says.
///
/// # Errors
/// It is malformed.
pub fn each_part(
    delta: &mut &[u8],
    page: &mut Page,
    mut put: impl FnMut(&mut [[u8; WORD]], Part<'_>),
) -> Result<(), Malformed> {
    let (mut left, _) = page.as_chunks_mut::<WORD>();
    loop {
        let kept = varint::read_at_most(delta, left.len()).ok_or(Malformed)?;
        let (same, rest) = left.split_at_mut(kept);
        put(same, Part::Kept);
        if rest.is_empty() {
            return Ok(());
        }
        let change = varint::read_at_most(delta, 2 * WORDS).ok_or(Malformed)?;
        let (changed, rest) = rest.split_at_mut_checked((change >> 1) + 1).ok_or(Malformed)?;
        if change & 1 == 0 {
            let step = unzigzag(varint::read(delta).ok_or(Malformed)?);
            put(changed, Part::Step(step));
        } else {
            let (new, behind) = delta.split_at_checked(changed.len() * WORD).ok_or(Malformed)?;
            put(changed, Part::New(new));
            *delta = behind;
        }
        left = rest;
        if left.is_empty() {
            return Ok(());
        }
    }
}

/// Appends the change that begins with the first words, which differ; returns how many words it is of.
fn write_change(old: &[[u8; WORD]], new: &[[u8; WORD]], out: &mut Vec<u8>) -> usize {
    let step = difference(old[0], new[0]);
    let stepped = run(old, new, step);
    if stepped > 1 || is_short(step) {
        write_step(stepped, step, out);
        return stepped;
    }
    let mut steps = old
        .iter()
        .zip(new)
        .map(|(old, new)| difference(*old, *new))
        .skip(1)
        .peekable();
    let mut replaced = 1;
    while let Some(step) = steps.next_if(|&step| step != 0 && !is_short(step)) {
        // A run of equal differences is shorter as a step.
        if steps.peek() == Some(&step) {
            break;
        }
        replaced += 1;
    }
    varint::write((replaced as u64 - 1) << 1 | 1, out);
    out.extend_from_slice(new[..replaced].as_flattened());
    replaced
}

/// Appends that so many `words` grew by `step`.
pub fn write_step(words: usize, step: u64, out: &mut Vec<u8>) {
    varint::write((words as u64 - 1) << 1, out);
    varint::write(zigzag(step), out);
}

/// How many of the first words differ by `step`.
fn run(old: &[[u8; WORD]], new: &[[u8; WORD]], step: u64) -> usize {
    /// Words looked at together, with a few vector instructions.
    const STRIDE: usize = 16;
    /// Words looked at one by one before: of most runs there are not even so many.
    const FIRST: usize = 2;
    let mut first = old.iter().zip(new).take(FIRST);
    if let Some(end) = first.position(|(old, new)| difference(*old, *new) != step) {
        return end;
    }
    let strides = old.as_chunks::<STRIDE>().0.iter().zip(new.as_chunks::<STRIDE>().0);
    let differ = |(old, new): &(&[[u8; WORD]; STRIDE], &[[u8; WORD]; STRIDE])| {
        let words = old.iter().zip(new.iter());
        words.fold(0, |all, (old, new)| all | (difference(*old, *new) ^ step)) != 0
    };
    let whole = strides.take_while(|stride| !differ(stride)).count() * STRIDE;
    let words = old[whole..].iter().zip(&new[whole..]);
    whole + words.take_while(|(old, new)| difference(**old, **new) == step).count()
}

fn difference(old: [u8; WORD], new: [u8; WORD]) -> u64 {
    u64::from_le_bytes(new).wrapping_sub(u64::from_le_bytes(old))
}

/// Whether a step of one word is shorter than the word.
fn is_short(step: u64) -> bool {
    varint::len(zigzag(step)) < 8
}

/// Small numbers for small steps, up or down.
fn zigzag(step: u64) -> u64 {
    let sign = (step >> 63).wrapping_neg();
    step << 1 ^ sign
}

fn unzigzag(number: u64) -> u64 {
    number >> 1 ^ (number & 1).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ZERO: Page = [0; PAGE_BYTES];
    const BYTES_MAX: usize = PAGE_BYTES / 2;

    fn page(mut word: impl FnMut(u64) -> u64) -> Page {
        let mut page = ZERO;
        for (place, bytes) in (0..).zip(page.as_chunks_mut::<WORD>().0) {
            *bytes = word(place).to_le_bytes();
        }
        page
    }

    /// The delta, which was applied and found right.
    fn delta(old: &Page, new: &Page) -> Vec<u8> {
        let mut bytes = vec![9];
        assert_eq!(encode(old, new, BYTES_MAX, &mut bytes), Outcome::Written);
        bytes.extend([1, 2, 3]);
        let (mut rest, mut page) = (&bytes[1..], *old);
        apply(&mut rest, &mut page).unwrap();
        assert!(page == *new);
        assert_eq!(rest, [1, 2, 3], "it ends where it ends");
        bytes[1..bytes.len() - 3].to_vec()
    }

    #[test]
    fn versions_that_are_the_same_make_no_delta() {
        let page = page(|place| place * 77);
        let mut out = vec![1];
        assert_eq!(encode(&page, &page, 0, &mut out), Outcome::Same);
        assert_eq!(out, [1]);
    }

    #[test]
    fn a_counter_in_each_word_is_one_step() {
        let old = page(|place| (7u64 << 40).wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let counted = page(|place| (7u64 << 40).wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)) + 3);
        assert_eq!(delta(&old, &counted), [0, 0xfe, 7, 6]);
        assert_eq!(delta(&counted, &old), [0, 0xfe, 7, 5]);
    }

    #[test]
    fn single_words_are_steps_or_new_words_whichever_is_shorter() {
        let new = page(|place| match place {
            1 => 4,
            3 => u64::MAX / 2,
            4 => u64::MAX / 3,
            511 => 1,
            _ => 0,
        });
        let mut expected = vec![1, 0, 8, 1, 3];
        expected.extend((u64::MAX / 2).to_le_bytes());
        expected.extend((u64::MAX / 3).to_le_bytes());
        expected.extend([0xfa, 3, 0, 2]);
        assert_eq!(delta(&ZERO, &new), expected);
    }

    #[test]
    fn new_words_end_where_a_run_of_equal_steps_begins() {
        let new = page(|place| match place {
            0 => u64::MAX / 7,
            1 => u64::MAX / 5,
            2..500 => u64::MAX / 3,
            _ => 0,
        });
        let mut expected = vec![0, 3];
        expected.extend((u64::MAX / 7).to_le_bytes());
        expected.extend((u64::MAX / 5).to_le_bytes());
        assert!(delta(&ZERO, &new).starts_with(&expected));
        assert!(delta(&ZERO, &new).len() < 40);
    }

    #[test]
    fn what_has_nothing_in_common_makes_no_delta() {
        let new = page(|place| (place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) | 1 << 62);
        let mut out = vec![1];
        assert_eq!(encode(&ZERO, &new, BYTES_MAX, &mut out), Outcome::TooLong);
        assert_eq!(out, [1]);
    }

    #[test]
    fn a_delta_beyond_the_page_or_cut_short_is_malformed() {
        let malformed: [&[u8]; 8] = [
            &[],
            &[0x81, 4],
            &[5],
            &[5, 0],
            &[0x80, 4, 0, 2, 1][..1],
            &[0xff, 3, 2, 2],
            &[0, 0x81, 8],
            &[0, 3, 1, 2, 3],
        ];
        for bytes in malformed {
            let mut rest = bytes;
            assert_eq!(apply(&mut rest, &mut ZERO.clone()), Err(Malformed), "{bytes:?}");
        }
    }

    /// Pages that differ as pages do: here and there, in runs, by little and by much.
    fn versions() -> impl Strategy<Value = (Page, Page)> {
        let change = (
            0..512usize,
            1..200usize,
            prop_oneof![any::<u64>(), 0..300u64],
            any::<bool>(),
        );
        (any::<u64>(), prop::collection::vec(change, 0..12)).prop_map(|(seed, changes)| {
            let old = page(|place| seed.wrapping_mul(place + 1).rotate_left(23));
            let mut new = old;
            for (first, count, by, same) in changes {
                let words = new.as_chunks_mut::<WORD>().0.iter_mut().skip(first).take(count);
                for (place, word) in (1..).zip(words) {
                    let by = if same {
                        by
                    } else {
                        by.wrapping_mul(place).rotate_left(31)
                    };
                    *word = u64::from_le_bytes(*word).wrapping_add(by).to_le_bytes();
                }
            }
            (old, new)
        })
    }

    proptest! {
        #[test]
        fn a_delta_makes_the_new_version_of_the_old_one((old, new) in versions()) {
            let mut bytes = Vec::new();
            let outcome = encode(&old, &new, BYTES_MAX, &mut bytes);
            prop_assert_eq!(outcome == Outcome::Same, old == new);
            prop_assert!(bytes.len() <= BYTES_MAX);
            if outcome == Outcome::Written {
                prop_assert_eq!(delta(&old, &new), bytes);
            }
        }

        #[test]
        fn no_bytes_do_harm(bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0..4u8], 0..100)) {
            let mut rest = bytes.as_slice();
            let _ = apply(&mut rest, &mut ZERO.clone());
        }
    }
}
