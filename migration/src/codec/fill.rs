//! Pages that are filled with one word: memory that the guest's kernel has poisoned when it was freed, or set to ones.
//!
//! A Linux guest overwrites what it was booted with when it is done with it: of one that has just booted, a third of the
//! pages that are not zero are filled so. To tell costs next to nothing, for in other pages one of the first words differs
//! from the next.

use super::Page;
use crate::pages::PAGE_BYTES;

/// A word.
pub type Word = [u8; 8];

/// The word that all of `page` consists of, if it is one.
pub fn word_of(page: &Page) -> Option<Word> {
    let word = *page.first_chunk::<{ size_of::<Word>() }>()?;
    // Every word is the same as the one before.
    let same = page[..page.len() - word.len()] == page[word.len()..];
    same.then_some(word)
}

/// Has all of `content`, whole pages, consist of `word`.
pub fn fill(content: &mut [u8], word: Word) {
    if let Some((first, others)) = content.as_chunks_mut::<PAGE_BYTES>().0.split_first_mut() {
        first.as_chunks_mut().0.fill(word);
        others.fill(*first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_makes_a_page_one_that_is_not_filled() {
        for word in [[0; 8], [0xcc; 8], *b"eight by"] {
            let mut page = [0; PAGE_BYTES];
            fill(&mut page, word);
            assert_eq!(word_of(&page), Some(word));
            for place in 0..PAGE_BYTES {
                page[place] ^= 0x10;
                assert_eq!(word_of(&page), None, "byte {place}");
                page[place] ^= 0x10;
            }
        }
    }
}
