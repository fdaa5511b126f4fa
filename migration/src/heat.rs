//! Which pages are written again and again: the guest's writable working set, which is sent in the stop phase alone.
//!
//! ```text
//!  rounds     …  5  6  7  8 │ 9          of the last four rounds
//!  page a        ·  ■  ■  ■ │  deferred      three or more: hot
//!  page b        ■  ·  ·  ■ │  sent          fewer: not
//! ```
//! A page that is dirtied in every round is sent in every round, and each time for nothing but the last. So hot pages
//! wait, as many as the downtime goal allows. What that saves is measured, not guessed: each page that waited and was
//! then dirtied would have been sent once more.
//!
//! The history is one set of pages a round, so that pages are looked at 64 at a time, four bits of memory for each.

use crate::pages::{PageBits, set_words};

/// Rounds that are remembered.
const ROUNDS: usize = 4;

/// The heat of all pages.
#[derive(Clone, Debug)]
pub struct Heat {
    /// What was dirtied in the last rounds, the oldest first to be overwritten at `next`.
    rounds: [PageBits; ROUNDS],
    next: usize,
    /// The pages that wait.
    deferred: PageBits,
    saved: u64,
}

impl Heat {
    /// Of a VM with `pages`, none of them hot.
    pub fn new(pages: u64) -> Self {
        Self {
            rounds: [(); ROUNDS].map(|()| PageBits::empty(pages)),
            next: 0,
            deferred: PageBits::empty(pages),
            saved: 0,
        }
    }

    /// `dirty` is what the guest dirtied in the last round.
    pub fn record(&mut self, dirty: &PageBits) {
        self.deferred.intersect(dirty);
        self.saved += self.deferred.len();
        self.deferred.clear();
        self.rounds[self.next].clone_from(dirty);
        self.next = (self.next + 1) % ROUNDS;
    }

    /// Takes hot pages out of `pages`, which are about to be sent, and returns them: `most` of them or fewer, and those
    /// first that were dirtied in every round.
    pub fn defer(&mut self, pages: &mut PageBits, most: u64) -> PageBits {
        self.deferred.clear();
        let mut left = most;
        for heat in [Self::always, Self::mostly] {
            for (index, bits) in set_words(pages.words()) {
                let hot = lowest(bits & heat(self, index) & !self.deferred.words()[index], left);
                self.deferred.insert_word(index, hot);
                left -= u64::from(hot.count_ones());
            }
        }
        pages.subtract(&self.deferred);
        self.deferred.clone()
    }

    /// How many pages were not sent because they waited: each would have been sent once more, for nothing.
    pub fn saved_pages(&self) -> u64 {
        self.saved
    }

    /// The pages of word `index` that were dirtied in every round.
    fn always(&self, index: usize) -> u64 {
        let [a, b, c, d] = self.words(index);
        a & b & c & d
    }

    /// Those that were dirtied in all rounds but one, or in every round.
    fn mostly(&self, index: usize) -> u64 {
        let [a, b, c, d] = self.words(index);
        a & b & (c | d) | c & d & (a | b)
    }

    fn words(&self, index: usize) -> [u64; ROUNDS] {
        self.rounds.each_ref().map(|round| round.words()[index])
    }
}

/// The lowest `most` ones of `bits`.
fn lowest(bits: u64, most: u64) -> u64 {
    if u64::from(bits.count_ones()) <= most {
        return bits;
    }
    let rest = (0..most).fold(bits, |bits, _| bits & bits.wrapping_sub(1));
    bits & !rest
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 200;

    fn bits(pages: impl IntoIterator<Item = u64>) -> PageBits {
        let mut bits = PageBits::empty(PAGES);
        pages.into_iter().for_each(|page| bits.insert(page));
        bits
    }

    fn pages(bits: &PageBits) -> Vec<u64> {
        bits.iter().collect()
    }

    /// After rounds that dirtied these.
    fn heat(rounds: &[&[u64]]) -> Heat {
        let mut heat = Heat::new(PAGES);
        for round in rounds {
            heat.record(&bits(round.iter().copied()));
        }
        heat
    }

    #[test]
    fn pages_that_are_dirtied_in_most_rounds_wait_and_others_are_sent() {
        let mut heat = heat(&[&[1, 2, 3, 150], &[1, 2, 150], &[1, 3, 150], &[1, 2, 4, 150]]);
        let mut left = bits([1, 2, 4, 150]);
        assert_eq!(pages(&heat.defer(&mut left, 100)), [1, 2, 150]);
        assert_eq!(pages(&left), [4]);
    }

    #[test]
    fn no_more_wait_than_may_and_the_hottest_do() {
        let mut heat = heat(&[&[1, 2, 3, 150], &[1, 2, 150], &[1, 3, 150], &[1, 2, 4, 150]]);
        let mut left = bits([1, 2, 4, 150]);
        assert_eq!(pages(&heat.defer(&mut left, 2)), [1, 150]);
        assert_eq!(pages(&left), [2, 4]);
        assert_eq!(pages(&heat.defer(&mut left, 0)), [0; 0]);
    }

    #[test]
    fn a_page_that_cools_down_is_sent() {
        let mut heat = heat(&[&[1], &[1], &[1], &[1], &[], &[]]);
        assert!(heat.defer(&mut bits([1]), 9).is_empty());
    }

    #[test]
    fn a_page_is_not_hot_before_its_third_time() {
        let mut heat = heat(&[&[1, 2], &[1]]);
        assert!(heat.defer(&mut bits([1, 2]), 9).is_empty());
        heat.record(&bits([1]));
        assert_eq!(pages(&heat.defer(&mut bits([1, 2]), 9)), [1]);
    }

    #[test]
    fn what_waiting_saves_are_pages_that_waited_and_were_dirtied() {
        let mut heat = heat(&[&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]]);
        heat.defer(&mut bits([1, 2, 3]), 2);
        heat.record(&bits([2, 3, 4]));
        assert_eq!(heat.saved_pages(), 1, "1 was not dirtied, 3 did not wait");
        heat.record(&bits([1, 2]));
        assert_eq!(heat.saved_pages(), 1, "nothing waited");
    }

    proptest! {
        #[test]
        fn pages_wait_or_are_sent_and_none_gets_lost(
            rounds in prop::collection::vec(prop::collection::btree_set(0..PAGES, 0..150), 0..8),
            left in prop::collection::btree_set(0..PAGES, 0..150),
            most in 0..100u64,
        ) {
            let mut heat = Heat::new(PAGES);
            for round in &rounds {
                heat.record(&bits(round.iter().copied()));
            }
            let times = |page: &u64| rounds.iter().rev().take(ROUNDS).filter(|round| round.contains(page)).count();
            let mut sent = bits(left.iter().copied());
            let waiting: BTreeSet<_> = heat.defer(&mut sent, most).iter().collect();
            let sent: BTreeSet<_> = sent.iter().collect();
            prop_assert!(waiting.is_disjoint(&sent));
            prop_assert_eq!(&waiting | &sent, left);
            prop_assert!(waiting.iter().all(|page| times(page) >= 3));
            let hot_but_sent = sent.iter().map(times).max().filter(|times| *times >= 3);
            if let Some(hottest_sent) = hot_but_sent {
                prop_assert_eq!(u64::try_from(waiting.len()).unwrap(), most);
                prop_assert!(waiting.iter().all(|page| times(page) >= hottest_sent));
            }
        }
    }
}
