//! What the destination of a post-copy lacks, and in which order it is pushed.
//!
//! ```text
//!  pushed ────────────►            ──────────────────────► … the end, then from the beginning
//!  pages  0 . . . . . 9 . . . . 17 18 . . .
//!                               wanted: the guest reads on from there
//! ```
//! What a guest waits for says where it works, and what it will wait for next lies mostly behind: so the push goes on there.

use std::ops::Range;

use crate::pages::PageBits;

/// See the module.
pub(super) struct Missing {
    pages: PageBits,
    /// Where the push goes on.
    next: u64,
}

impl Missing {
    pub(super) fn new(pages: PageBits) -> Self {
        Self { pages, next: 0 }
    }

    /// How many pages are left.
    pub(super) fn len(&self) -> u64 {
        self.pages.len()
    }

    /// How many pages the image has.
    pub(super) fn image_pages(&self) -> u64 {
        self.pages.pages()
    }

    /// The destination is sent `wanted` by itself.
    pub(super) fn want(&mut self, wanted: &PageBits) {
        for range in wanted.ranges() {
            self.next = range.end;
            self.pages.remove_range(range);
        }
    }

    /// Takes the next pages to be pushed, in ascending order and at most `most`; none if none are left.
    pub(super) fn take(&mut self, most: u64) -> Vec<Range<u64>> {
        let ahead = self.first_from(self.next, most);
        let ranges = if ahead.is_empty() {
            self.first_from(0, most)
        } else {
            ahead
        };
        for range in &ranges {
            self.next = range.end;
            self.pages.remove_range(range.clone());
        }
        ranges
    }

    fn first_from(&self, first: u64, most: u64) -> Vec<Range<u64>> {
        let mut room = most;
        let cut = |range: Range<u64>| {
            let taken = range.start..range.end.min(range.start + room);
            room -= taken.end - taken.start;
            taken
        };
        let ranges = self.pages.ranges_in(first..self.pages.pages()).map(cut);
        ranges.take_while(|range| !range.is_empty()).collect()
    }
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "what is taken is ranges, at times of one"
)]
mod tests {
    use super::*;

    fn missing(ranges: &[Range<u64>]) -> Missing {
        let mut pages = PageBits::empty(1000);
        ranges.iter().for_each(|range| pages.insert_range(range.clone()));
        Missing::new(pages)
    }

    fn pages(ranges: impl IntoIterator<Item = Range<u64>>) -> PageBits {
        let mut pages = PageBits::empty(1000);
        ranges.into_iter().for_each(|range| pages.insert_range(range));
        pages
    }

    #[test]
    fn all_is_pushed_once_in_order() {
        let mut missing = missing(&[3..5, 100..170, 999..1000]);
        assert_eq!(missing.take(64), [3..5, 100..162]);
        assert_eq!(missing.take(64), [162..170, 999..1000]);
        assert_eq!((missing.take(64), missing.len()), (vec![], 0));
    }

    #[test]
    fn the_push_goes_on_behind_what_was_wanted_and_comes_back_for_the_rest() {
        let mut missing = missing(&[0..500]);
        assert_eq!(missing.take(10), [0..10]);
        missing.want(&pages([300..302]));
        assert_eq!(missing.len(), 488);
        assert_eq!(missing.take(150), [302..452]);
        assert_eq!(missing.take(150), [452..500]);
        assert_eq!(missing.take(1000), [10..300]);
        assert_eq!(missing.len(), 0);
    }

    #[test]
    fn what_is_wanted_although_it_was_pushed_says_where_the_guest_is_as_well() {
        let mut missing = missing(&[0..20, 600..700]);
        assert_eq!(missing.take(64), [0..20, 600..644]);
        missing.want(&pages([5..6]));
        assert_eq!(missing.take(64), [644..700]);
    }
}
