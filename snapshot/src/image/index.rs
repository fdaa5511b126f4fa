//! The index of an image's file: where each chunk lies, and which pages are in it. Bytes from a file, so hostile.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::map::{Extent, Place};
use crate::blob::Blob;
use crate::checksum::Checksum;
use crate::error::{Error, SectionError};
use crate::manifest::{ImageEntry, IndexEntry};
use crate::section::{Payload, Section};

/// Most bytes of a chunk's pages.
pub const CHUNK_BYTES_MAX: u32 = 1 << 20;
/// Most bytes of an index. One of a 4 TiB guest that is full of data has about 550 MiB.
pub const INDEX_BYTES_MAX: u64 = 1 << 30;

/// Bytes of a page's checksum in a [table](Encoding::Paged).
pub(crate) const CHECKSUM_BYTES: u32 = 16;

/// What an image's file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Index {
    /// In the order they were written.
    pub chunks: Vec<Chunk>,
    /// The pages of the chunks, those of the first chunk first.
    pub runs: Vec<Run>,
}

/// Pages that were written, checksummed and perhaps compressed together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Chunk {
    /// How the pages are stored.
    pub encoding: Encoding,
    /// Where in the file.
    pub offset: u64,
    /// How many bytes of the file.
    pub stored_bytes: u32,
    /// Of these bytes, or of the table with those of its pages.
    pub checksum: Checksum,
    /// Number of pages.
    pub pages: u64,
    /// Number of runs these pages make.
    pub runs: u32,
}

/// How the pages of a chunk are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Encoding {
    /// Not at all: they are zero.
    Zero,
    /// As they are.
    Raw,
    /// As one zstd frame.
    Zstd,
    /// As they are, each with a checksum of its own: one page can be read without the others. Since version 2.
    Paged {
        /// Where in the file the checksums are, one after the other.
        table: u64,
    },
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    /// Number of the first page.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Section for Index {
    const VERSION: u16 = 2;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            // What version 1 has not is refused by `Chunk::check`.
            1 | 2 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl Chunk {
    /// Whether this is plain data at the very place that page `first` has in an image without gaps.
    pub fn is_at(&self, first: u64, page_bytes: u32) -> bool {
        let plain = matches!(self.encoding, Encoding::Raw | Encoding::Paged { .. });
        plain && self.runs == 1 && self.offset == first * u64::from(page_bytes)
    }

    /// Bytes of its table, if it has one.
    pub fn table_bytes(&self) -> u64 {
        match self.encoding {
            Encoding::Paged { .. } => self.pages.saturating_mul(CHECKSUM_BYTES.into()),
            _ => 0,
        }
    }

    /// Checks that the chunk can be what it says.
    fn check(&self, entry: &ImageEntry) -> Result<(), String> {
        let Self { offset, pages, .. } = *self;
        let stored = u64::from(self.stored_bytes);
        if self.encoding == Encoding::Zero {
            return if stored == 0 {
                Ok(())
            } else {
                Err("zero pages that take room".to_owned())
            };
        }
        let bytes = pages
            .checked_mul(u64::from(entry.page_bytes))
            .filter(|bytes| *bytes > 0 && *bytes <= u64::from(CHUNK_BYTES_MAX))
            .ok_or_else(|| format!("a chunk of {pages} pages"))?;
        let fits = match self.encoding {
            Encoding::Raw => stored == bytes,
            Encoding::Paged { .. } if entry.index.version < 2 => false,
            Encoding::Paged { .. } => stored == bytes,
            _ => stored > 0 && stored < bytes,
        };
        if !fits {
            return Err(format!("a chunk of {pages} pages in {stored} bytes"));
        }
        check_end(offset, stored, entry)?;
        match self.encoding {
            Encoding::Paged { table } => check_end(table, self.table_bytes(), entry),
            _ => Ok(()),
        }
    }
}

impl Index {
    /// Reads and verifies the index at the end of `blob`.
    pub fn read(blob: &dyn Blob, entry: &ImageEntry) -> Result<Self, Error> {
        let IndexEntry {
            version,
            bytes,
            checksum,
        } = entry.index;
        let path = blob.path();
        // The manifest's check has bounded it, and it was compared with the file's length.
        let mut encoded = vec![0; usize::try_from(bytes).expect("at most INDEX_BYTES_MAX")];
        blob.read_at(&mut encoded, entry.data_bytes)?;
        if Checksum::of(&encoded) != checksum {
            return Err(Error::damaged(
                path,
                entry.data_bytes,
                "the index does not have its checksum",
            ));
        }
        Section::read(&Payload {
            version,
            bytes: &encoded,
        })
        .map_err(|source| Error::Section {
            path: path.to_owned(),
            name: "index".to_owned(),
            source,
        })
    }

    /// The pages of the image, in order, as layer `layer` of a chain; the error says what cannot be.
    pub fn extents(&self, entry: &ImageEntry, layer: u32) -> Result<Vec<Extent>, String> {
        let mut extents = Vec::with_capacity(self.runs.len());
        let mut runs = self.runs.iter();
        let (mut stored_pages, mut zero_pages) = (0, 0);
        for (number, chunk) in (0..).zip(&self.chunks) {
            chunk.check(entry)?;
            let mut slot = 0;
            for _ in 0..chunk.runs {
                let Run { first, count } = *runs.next().ok_or("fewer pages than the chunks have")?;
                let end = first.checked_add(count).filter(|end| count > 0 && *end <= entry.pages);
                if end.is_none() {
                    return Err(format!("{count} pages from {first} of an image of {}", entry.pages));
                }
                let place = match chunk.encoding {
                    Encoding::Zero => Place::Zero,
                    _ => Place::Stored {
                        layer,
                        chunk: number,
                        slot,
                    },
                };
                extents.push(Extent { first, count, place });
                // Each count is at most the pages of an image; so is each sum that the checks below let pass.
                slot = slot.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            }
            check_pages(chunk, &extents[extents.len() - chunk.runs as usize..])?;
            match chunk.encoding {
                Encoding::Zero => zero_pages = chunk.pages.saturating_add(zero_pages),
                _ => stored_pages = chunk.pages.saturating_add(stored_pages),
            }
        }
        if runs.next().is_some() {
            return Err("more pages than the chunks have".to_owned());
        }
        extents.sort_unstable_by_key(|extent| extent.first);
        for pair in extents.windows(2) {
            if pair[0].end() > pair[1].first {
                return Err(format!("page {} is there twice", pair[1].first));
            }
        }
        if (stored_pages, zero_pages) != (entry.stored_pages, entry.zero_pages) {
            return Err(format!(
                "{stored_pages} pages and {zero_pages} zero ones, which is not what the manifest says"
            ));
        }
        Ok(extents)
    }
}

impl Index {
    /// The pages with content that come behind such with higher numbers. To be asked when [`extents`](Self::extents) has
    /// found nothing wrong.
    pub fn out_of_order(&self) -> Vec<Range<u64>> {
        let mut runs = self.runs.iter();
        let (mut found, mut highest) = (Vec::new(), 0);
        for chunk in &self.chunks {
            for run in runs.by_ref().take(chunk.runs as usize) {
                if chunk.encoding != Encoding::Zero && run.first < highest {
                    found.push(run.first..run.first + run.count);
                }
                highest = highest.max(run.first);
            }
        }
        found
    }
}

/// Checks that `bytes` from `offset` on are before the index.
fn check_end(offset: u64, bytes: u64, entry: &ImageEntry) -> Result<(), String> {
    match offset.checked_add(bytes) {
        Some(end) if end <= entry.data_bytes => Ok(()),
        _ => Err(format!(
            "a chunk of {bytes} bytes at {offset}, past the end of all chunks"
        )),
    }
}

fn check_pages(chunk: &Chunk, extents: &[Extent]) -> Result<(), String> {
    let sum = extents
        .iter()
        .try_fold(0_u64, |sum, extent| sum.checked_add(extent.count));
    if sum != Some(chunk.pages) {
        return Err(format!("a chunk of {} pages with other ones than these", chunk.pages));
    }
    Ok(())
}
