//! What is sent of pages: as little as pays on the link at hand.
//!
//! ```text
//!  pages ─► zero? ─► sent before? ─► History ─► unchanged: not sent │ delta ─────────────┐
//!             │      (narrow link)   what was sent last                                  ├─► records of a Batch
//!             └───── the rest ─► one word? a pattern? ─► does it shrink? ─► lz4 │ zstd │ as it is
//!                                                        (narrow link)
//! ```
//! A wide link gets pages as they are, but for those of [one word](fill) and those with a [pattern]: a look at a few words
//! tells them, which costs a hundredth of what it takes to bring a page over the fastest link, and what they become costs
//! less. On a narrow one what was sent is remembered, so that a page that is sent again is sent as the difference; what was
//! never sent is compressed as long as that brings it to the destination sooner. [`choice`] decides that by what it
//! measures of the link and of the compressors on this machine.
//!
//! An encoder is of one stream, and each page always goes through the same stream (see [`stream_of`]): so what an encoder
//! remembers of a page is what the destination has of it.

pub mod choice;
mod compressor;
mod decoder;
pub mod delta;
mod encoder;
mod fill;
pub mod history;
mod pattern;
mod varint;
mod zero;

use crate::pages::{PAGE_BYTES, WORD_PAGES};

pub use self::decoder::Decoder;
pub use self::encoder::Encoder;

/// A page's bytes.
type Page = [u8; PAGE_BYTES];
/// A page of zeroes.
const ZERO: Page = [0; PAGE_BYTES];

/// The stream, of `streams`, that `page` is sent on: the word of its bit in a [set of pages](crate::pages::PageBits)
/// decides.
pub fn stream_of(page: u64, streams: u64) -> u64 {
    page / WORD_PAGES % streams
}
