//! Whether a page is zero.

use super::{Page, ZERO};

/// Whether all bytes of `page` are zero.
pub fn is_zero(page: &Page) -> bool {
    // The C library's comparison: wide, and over at the first difference.
    *page == ZERO
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PAGE_BYTES;

    #[test]
    fn one_bit_anywhere_makes_a_page_one_that_is_not_zero() {
        let mut page = [0; PAGE_BYTES];
        assert!(is_zero(&page));
        for place in 0..PAGE_BYTES {
            page[place] = 0x80;
            assert!(!is_zero(&page), "byte {place}");
            page[place] = 0;
        }
    }
}
