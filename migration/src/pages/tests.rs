//! Sets of pages against sets of numbers.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Not a multiple of a word, nor of the words looked at together.
const PAGES: u64 = 64 * 70 + 13;

/// Sets as they are in life: scattered pages and long runs.
fn sets() -> impl Strategy<Value = BTreeSet<u64>> {
    let runs = prop::collection::vec((0..PAGES, 1..300u64), 0..6);
    let pages = prop::collection::vec(0..PAGES, 0..40);
    (runs, pages).prop_map(|(runs, pages)| {
        let in_runs = runs
            .into_iter()
            .flat_map(|(first, length)| first..(first + length).min(PAGES));
        in_runs.chain(pages).collect()
    })
}

fn range() -> impl Strategy<Value = Range<u64>> {
    (0..=PAGES, 0..=PAGES).prop_map(|(one, other)| one.min(other)..one.max(other))
}

fn bits(set: &BTreeSet<u64>) -> PageBits {
    let mut bits = PageBits::empty(PAGES);
    for page in set {
        bits.insert(*page);
    }
    bits
}

fn set(bits: &PageBits) -> BTreeSet<u64> {
    bits.iter().collect()
}

proptest! {
    #[test]
    fn a_set_of_bits_is_a_set(model in sets(), other in sets(), range in range(), page in 0..PAGES) {
        let set_of_bits = bits(&model);
        prop_assert_eq!(&set(&set_of_bits), &model);
        prop_assert_eq!(set_of_bits.len(), u64::try_from(model.len()).unwrap());
        prop_assert_eq!(set_of_bits.is_empty(), model.is_empty());
        prop_assert_eq!(set_of_bits.contains(page), model.contains(&page));
        let in_range: Vec<_> = set_of_bits.ranges_in(range.clone()).flatten().collect();
        prop_assert_eq!(in_range, model.range(range).copied().collect::<Vec<_>>());

        let changed = |change: fn(&mut PageBits, &PageBits)| {
            let mut changed = set_of_bits.clone();
            change(&mut changed, &bits(&other));
            set(&changed)
        };
        prop_assert_eq!(changed(PageBits::union), &model | &other);
        prop_assert_eq!(changed(PageBits::subtract), &model - &other);
        prop_assert_eq!(changed(PageBits::intersect), &model & &other);
    }

    #[test]
    fn ranges_go_in_and_out_as_single_pages_do(model in sets(), range in range(), page in 0..PAGES) {
        let mut with = bits(&model);
        with.insert_range(range.clone());
        prop_assert_eq!(set(&with), &model | &range.clone().collect());
        let mut without = bits(&model);
        without.remove_range(range.clone());
        prop_assert_eq!(set(&without), &model - &range.collect());
        without.remove(page);
        prop_assert!(!without.contains(page));
    }

    #[test]
    fn ranges_are_as_long_as_can_be_and_in_order(model in sets()) {
        let ranges: Vec<_> = bits(&model).ranges().collect();
        prop_assert!(ranges.iter().all(|range| !range.is_empty()));
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
    }

    #[test]
    fn a_log_that_begins_anywhere_is_merged_where_it_belongs(model in sets(), log in sets(), first in 0..100u64) {
        let log: BTreeSet<_> = log.into_iter().filter(|page| page + first < PAGES).collect();
        let mut merged = bits(&model);
        merged.insert_words(first, bits(&log).words());
        prop_assert_eq!(set(&merged), &model | &log.iter().map(|page| page + first).collect());
    }

    #[test]
    fn words_read_back_as_the_set_they_are_of(model in sets()) {
        let set = bits(&model);
        prop_assert_eq!(PageBits::from_words(PAGES, set.words().to_vec()), Some(set));
    }
}

#[test]
fn a_full_set_has_every_page_and_no_more() {
    for pages in [0, 1, 63, 64, 65, 128, PAGES] {
        let full = PageBits::full(pages);
        assert_eq!(full.len(), pages);
        assert!(!full.contains(pages));
        assert_eq!(full.ranges().collect::<Vec<_>>().len(), usize::from(pages > 0));
        assert_eq!(full.pages(), pages);
    }
}

#[test]
fn words_that_do_not_fit_the_vm_are_refused() {
    assert_eq!(PageBits::from_words(65, vec![0]), None);
    assert_eq!(PageBits::from_words(65, vec![0; 3]), None);
    assert_eq!(PageBits::from_words(65, vec![0, 2]), None);
    assert!(PageBits::from_words(65, vec![u64::MAX, 1]).is_some());
    assert!(PageBits::from_words(0, vec![]).is_some());
}

#[test]
#[should_panic = "page 65 of 65"]
fn a_page_the_vm_does_not_have_cannot_be_added() {
    PageBits::empty(65).insert(65);
}

#[test]
fn a_cleared_set_is_empty() {
    let mut set = PageBits::full(PAGES);
    set.clear();
    assert!(set.is_empty());
}
