//! Sets of pages against sets of numbers.

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
