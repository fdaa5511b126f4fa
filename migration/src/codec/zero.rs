//! Whether a page is zero.

use super::Page;

/// Bytes looked at together, with a few vector instructions. A page that is not zero shows it mostly in the first ones.
const STRIDE: usize = 128;

/// Whether all bytes of `page` are zero.
pub fn is_zero(page: &Page) -> bool {
    let (strides, _) = page.as_chunks::<STRIDE>();
    strides
        .iter()
        .all(|stride| stride.iter().fold(0, |all, byte| all | byte) == 0)
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
