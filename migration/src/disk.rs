//! Disks of which the destination has an older copy: what of it is still right is not sent.
//!
//! ```text
//!  source                                       destination
//!  Compare{image, chunk} ──────────────────────►  checksums of its chunks from there on
//!                         ◄───────────────────── Checksums{…}
//!  those that are its own chunks' too: left out of the first round
//! ```
//! A chunk is 64 KiB, as in the log of a disk's writes, and its checksum has 128 bits: also of all disks there are no two
//! chunks will have the same by accident. The source asks after it has begun to watch what the guest writes: a chunk
//! that is written while it is compared, or after that, is sent later.

use std::io;
use std::ops::Range;

use cutover_snapshot::checksum::Checksum;

use crate::pages::{PAGE_BYTES, PageBits};
use crate::vm::Image;

/// Pages of a chunk; the last one of an image may have fewer.
pub const CHUNK_PAGES: u64 = 16;
/// Chunks of one message: 64 MiB of the disk, which no side reads for long, and 16 KiB of checksums.
pub const CHUNKS_MAX: u64 = 1024;

/// How many chunks `image` has.
pub fn chunks(image: &dyn Image) -> u64 {
    image.pages().div_ceil(CHUNK_PAGES)
}

/// Checksums of the chunks of `image` from number `first` on, [`CHUNKS_MAX`] of them or as many as there are.
///
/// # Errors
/// They cannot be read.
pub fn checksums(image: &dyn Image, first: u64) -> io::Result<Vec<Checksum>> {
    let mut content = vec![0; usize::try_from(CHUNK_PAGES).map_err(io::Error::other)? * PAGE_BYTES];
    let end = chunks(image).min(first.saturating_add(CHUNKS_MAX));
    (first..end)
        .map(|chunk| {
            let pages = pages_of(image, chunk);
            let bytes = usize::try_from(pages.end - pages.start).map_err(io::Error::other)? * PAGE_BYTES;
            image.read(pages, &mut content[..bytes])?;
            Ok(Checksum::of(&content[..bytes]))
        })
        .collect()
}

/// Takes the chunks of `image` from number `first` on out of `pages` whose checksums are `theirs`.
///
/// # Errors
/// They cannot be read, or there are not as many checksums as there should be.
pub fn leave_out(image: &dyn Image, first: u64, theirs: &[Checksum], pages: &mut PageBits) -> io::Result<()> {
    let ours = checksums(image, first)?;
    if ours.len() != theirs.len() {
        let reason = format!("{} checksums came for {} chunks", theirs.len(), ours.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    for (chunk, (ours, theirs)) in (first..).zip(ours.iter().zip(theirs)) {
        if ours == theirs {
            pages.remove_range(pages_of(image, chunk));
        }
    }
    Ok(())
}

fn pages_of(image: &dyn Image, chunk: u64) -> Range<u64> {
    let first = chunk * CHUNK_PAGES;
    first..(first + CHUNK_PAGES).min(image.pages())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tests::made_up::Bytes;

    const PAGES: u64 = 5 * CHUNK_PAGES + 3;

    /// Whose pages have their numbers in them.
    fn image() -> Arc<Bytes> {
        let image = Bytes::new(PAGES);
        for page in 0..PAGES {
            image.poke(page, |content| content[..8].copy_from_slice(&(page + 1).to_le_bytes()));
        }
        image
    }

    fn left(ours: &Bytes, theirs: &Bytes) -> PageBits {
        let mut pages = PageBits::full(PAGES);
        leave_out(ours, 0, &checksums(theirs, 0).unwrap(), &mut pages).unwrap();
        pages
    }

    #[test]
    fn chunks_that_are_the_same_are_left_out_whole() {
        let (ours, theirs) = (image(), image());
        assert!(left(&ours, &theirs).is_empty());
        ours.poke(CHUNK_PAGES + 5, |content| content[77] = 1);
        theirs.poke(PAGES - 1, |content| content[77] = 1);
        let ranges: Vec<_> = left(&ours, &theirs).ranges().collect();
        assert_eq!(ranges, [CHUNK_PAGES..2 * CHUNK_PAGES, 5 * CHUNK_PAGES..PAGES]);
    }

    #[test]
    fn the_same_chunks_in_other_places_are_sent() {
        let (ours, theirs) = (image(), image());
        for page in 0..CHUNK_PAGES {
            ours.poke(page, |content| content.fill(1));
            theirs.poke(page + CHUNK_PAGES, |content| content.fill(1));
        }
        let ranges: Vec<_> = left(&ours, &theirs).ranges().collect();
        assert_eq!(ranges, std::iter::once(0..2 * CHUNK_PAGES).collect::<Vec<_>>());
    }

    #[test]
    fn a_part_is_as_long_as_a_message_may_be_or_ends_with_the_image() {
        let large = Bytes::new((CHUNKS_MAX + 2) * CHUNK_PAGES);
        assert_eq!(checksums(large.as_ref(), 0).unwrap().len() as u64, CHUNKS_MAX);
        assert_eq!(checksums(large.as_ref(), CHUNKS_MAX).unwrap().len(), 2);
        assert_eq!(checksums(large.as_ref(), u64::MAX).unwrap().len(), 0);
        assert_eq!(checksums(Bytes::new(0).as_ref(), 0).unwrap().len(), 0);
    }

    #[test]
    fn too_few_or_too_many_checksums_are_refused() {
        let image = image();
        let mut theirs = checksums(image.as_ref(), 0).unwrap();
        let mut pages = PageBits::full(PAGES);
        theirs.pop();
        assert!(leave_out(image.as_ref(), 0, &theirs, &mut pages).is_err());
        theirs.extend([Checksum::of(b""), Checksum::of(b"")]);
        assert!(leave_out(image.as_ref(), 0, &theirs, &mut pages).is_err());
        assert_eq!(pages, PageBits::full(PAGES));
    }
}
