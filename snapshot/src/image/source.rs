//! Where pages to be saved come from.

use super::Reader;
use super::map::Place;
use crate::error::Error;

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages<'a> {
    /// Number of the first one.
    pub first: u64,
    /// Their content, a multiple of the size of a page.
    pub bytes: &'a [u8],
}

/// Something that hands over pages, in any order, each once: for example the memory of a guest that runs on, whose
/// pages are handed over as they are copied.
pub trait PageSource {
    /// Bytes of all pages that will be handed over, or a good guess: progress is measured against it.
    fn bytes_total(&self) -> u64;

    /// The next pages, or nothing after the last.
    ///
    /// # Errors
    /// They cannot be had; [`Error::Source`] is for those that do not come from a snapshot.
    fn next_pages(&mut self) -> Result<Option<Pages<'_>>, Error>;
}

/// How far something long has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are dealt with.
    pub done: u64,
    /// Bytes to deal with.
    pub total: u64,
}

/// All pages of an image that are not zero, in order.
pub struct Scan {
    reader: Reader,
    next: u64,
}

impl Scan {
    /// The pages that `reader` reads.
    pub fn new(reader: Reader) -> Self {
        Self { reader, next: 0 }
    }
}

impl PageSource for Scan {
    fn bytes_total(&self) -> u64 {
        let image = self.reader.image();
        image.stored_pages() * u64::from(image.page_bytes())
    }

    fn next_pages(&mut self) -> Result<Option<Pages<'_>>, Error> {
        let image = self.reader.image();
        while self.next < image.pages() {
            let (place, count) = image.find(self.next);
            if place != Place::Zero {
                break;
            }
            self.next += count;
        }
        let first = self.next;
        let Some(found) = self.reader.at(first)? else {
            return Ok(None);
        };
        self.next += found.count;
        Ok(found.bytes.map(|bytes| Pages { first, bytes }))
    }
}
