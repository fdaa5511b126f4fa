//! What is sent of pages: as little as pays on the link at hand.
//!
//! ```text
//!  pages ─► zero, or one word? ─────────────────────────────────────────────────────────┐
//!             │ no                                                                      │
//!             ├─ wide link ─────────────────────────────────────► as it is ─────────────┤
//!             │                                                                         ├─► records of a Batch
//!             └─ narrow link ─► sent before? ─► History ─► unchanged: not sent │ delta ─┤
//!                                 │ no          what was sent last                      │
//!                                 └─► a pattern? ─► does it shrink? ─► lz4 │ zstd │ as it is
//! ```
//! A wide link gets pages as they are, and nothing else is done to them than to look whether they are [one word](fill)
//! again and again, which costs a hundredth of what it saves. On a narrow one what was sent is remembered, so that a page
//! that is sent again is sent as the difference; what was never sent is compressed as long as that brings it to the
//! destination sooner. [`choice`] decides that by what it measures of the link and of the compressors on this machine.
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
