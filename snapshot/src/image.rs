//! Images: arrays of pages (guest memory, a disk), of which each snapshot of a chain stores some.
//!
//! ```text
//!  file NAME.pages:   [ chunk ][ chunk ]  …  [ index ]        written by [`ImageWriter`]
//!                          ▲                     │
//!                          └── offset, checksum ─┘
//!  chain, newest first:  3 │   a           b     │
//!                        2 │         c     d     │  ── PageMap ──►  Image: every page's newest place
//!                        1 │ e f g h i j k l m n │                    └─ Reader: verified pages
//! ```
//!
//! A chunk is the unit of reading: a few pages, checksummed together, possibly compressed. Pages of memory that is not
//! compressed are read one by one: their chunk has a table of checksums, and the index the checksum of the table. Zero
//! pages are not stored.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::blob::Blob;
use crate::error::Error;
use crate::manifest::{Base, ImageEntry};
use crate::source::{Source, open_file};
use crate::store::Snapshot;
use index::{Chunk, Encoding, Index};
use map::{Extent, PageMap, Place};

mod index;
mod map;
mod reader;
mod source;
mod writer;

pub use index::{CHUNK_BYTES_MAX, INDEX_BYTES_MAX};
pub(crate) use reader::ChunkReader;
pub use reader::{Found, KEPT_CHUNKS, Reader};
pub use source::{PageSource, Pages, Progress, Scan};
pub use writer::{ImageWriter, Layout, Shape};

/// Least bytes of a page.
pub const PAGE_BYTES_MIN: u32 = 4 << 10;
/// Most bytes of a page.
pub const PAGE_BYTES_MAX: u32 = 256 << 10;
/// Most bytes of an image: 64 TiB, more than any guest's memory or disk here.
pub const IMAGE_BYTES_MAX: u64 = 64 << 40;
/// Most bytes of an image's file before the index: every page, and padding.
pub const DATA_BYTES_MAX: u64 = 2 * IMAGE_BYTES_MAX;

/// Checks the size of pages and image; the error is the reason.
pub(crate) fn check_shape(page_bytes: u32, pages: u64) -> Result<(), String> {
    if !page_bytes.is_power_of_two() || !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&page_bytes) {
        return Err(format!(
            "pages of {page_bytes} bytes: a page has a power of two from {PAGE_BYTES_MIN} to {PAGE_BYTES_MAX}"
        ));
    }
    if pages > IMAGE_BYTES_MAX / u64::from(page_bytes) {
        return Err(format!("{pages} pages are too many"));
    }
    Ok(())
}

/// An image as the newest snapshot of a chain sees it. Its pages come through [`Reader`]s, of which there can be several
/// at a time, in several threads. Clones are the same image.
#[derive(Clone, Debug)]
pub struct Image(Arc<Stack>);

/// The layers of an image, and what they amount to.
#[derive(Debug)]
struct Stack {
    page_bytes: u32,
    pages: u64,
    /// Newest first.
    layers: Vec<Layer>,
    map: PageMap,
}

impl Image {
    /// Puts together what the snapshots of `layers` (newest first, down to the one that is complete) store of an image.
    pub(crate) fn open(source: &dyn Source, layers: &[(&Snapshot, &ImageEntry)]) -> Result<Self, Error> {
        let mut map = PageMap::default();
        let mut opened = Vec::with_capacity(layers.len());
        let (newest_snapshot, newest) = layers.first().expect("a chain has a newest snapshot");
        let mut visible = newest.pages;
        for (number, (snapshot, entry)) in (0..).zip(layers) {
            if entry.page_bytes != newest.page_bytes {
                let reason = format!(
                    "has pages of {} bytes, but {} of {}",
                    entry.page_bytes,
                    newest_snapshot.path.join(newest.file()).display(),
                    newest.page_bytes
                );
                return Err(Error::invalid(&snapshot.path.join(entry.file()), reason));
            }
            let (layer, extents) = Layer::open(source, snapshot, entry, number)?;
            // What a shorter image once cut off does not come back when the image grows again.
            visible = visible.min(entry.pages);
            map.put_below(extents, visible);
            opened.push(layer);
        }
        Ok(Self(Arc::new(Stack {
            page_bytes: newest.page_bytes,
            pages: newest.pages,
            layers: opened,
            map,
        })))
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> u32 {
        self.0.page_bytes
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.0.pages
    }

    /// Number of pages that are stored; the others are zero.
    pub fn stored_pages(&self) -> u64 {
        self.0.map.stored_pages()
    }

    /// How many readers at a time make reading all of it fast: one for files, more where each waits for a network.
    pub fn useful_readers(&self) -> usize {
        let layers = self.0.layers.iter().map(|layer| layer.blob.useful_readers());
        layers.max().expect("an image has a newest layer")
    }

    /// Something to read pages in order with; each thread has its own.
    ///
    /// # Errors
    /// There is no memory for a decompressor.
    pub fn reader(&self) -> Result<Reader, Error> {
        self.reader_keeping(KEPT_CHUNKS)
    }

    /// The same that keeps at most so many chunks, besides one for each snapshot of the chain.
    ///
    /// # Errors
    /// There is no memory for a decompressor.
    pub fn reader_keeping(&self, chunks: usize) -> Result<Reader, Error> {
        Reader::new(self.clone(), chunks)
    }

    /// The file in which page *n* lies at *n* times the size of a page, pages that are not stored being holes: the
    /// local file of a snapshot that is complete in itself and was written flat. Who maps it forgoes the checksums.
    pub fn flat_file(&self) -> Option<&File> {
        match self.0.layers.as_slice() {
            [layer] if layer.flat => layer.blob.file(),
            _ => None,
        }
    }

    /// Pages, by their numbers, that the newest snapshot has behind such with higher ones. Of a live snapshot these are
    /// pages that the guest wrote right after the moment it shows, so that they were saved early. A guest that goes on
    /// from that moment will want them first.
    pub fn out_of_order(&self) -> &[Range<u64>] {
        &self.layer(0).out_of_order
    }

    /// Whether what is at `place` has a checksum for each page.
    fn is_paged(&self, place: Place) -> bool {
        match place {
            Place::Zero => false,
            Place::Stored { layer, chunk, .. } => {
                let chunk = &self.layer(layer).chunks[chunk as usize];
                matches!(chunk.encoding, Encoding::Paged { .. })
            }
        }
    }

    fn layer(&self, number: u32) -> &Layer {
        &self.0.layers[number as usize]
    }

    /// Where page `page`, one of the image's, is, and how many pages follow there, itself included.
    fn find(&self, page: u64) -> (Place, u64) {
        self.0.map.find(page, self.0.pages)
    }
}

/// What one snapshot stores of an image.
#[derive(Debug)]
pub(crate) struct Layer {
    blob: Arc<dyn Blob>,
    page_bytes: u32,
    chunks: Vec<Chunk>,
    /// Complete in itself, and each page at its own place.
    flat: bool,
    /// See [`Image::out_of_order`].
    out_of_order: Vec<Range<u64>>,
}

impl Layer {
    /// Opens the file of an image, the `number`th of its chain, reads and verifies the index; with it come the pages
    /// it stores, in order.
    pub(crate) fn open(
        source: &dyn Source,
        snapshot: &Snapshot,
        entry: &ImageEntry,
        number: u32,
    ) -> Result<(Self, Vec<Extent>), Error> {
        let blob = open_file(source, snapshot, &entry.file(), entry.file_bytes())?;
        let index = Index::read(&*blob, entry)?;
        let extents = index
            .extents(entry, number)
            .map_err(|what| Error::damaged(blob.path(), entry.data_bytes, format!("index: {what}")))?;
        let page_bytes = entry.page_bytes;
        let in_place = |extent: &Extent| match extent.place {
            Place::Zero => false,
            Place::Stored { chunk, .. } => index.chunks[chunk as usize].is_at(extent.first, page_bytes),
        };
        // The file is as long as the image even if the last pages are zero: what maps it finds them.
        let flat = entry.base == Base::Zero
            && entry.data_bytes >= entry.pages * u64::from(page_bytes)
            && extents.iter().all(in_place);
        let layer = Self {
            out_of_order: index.out_of_order(),
            blob,
            page_bytes,
            chunks: index.chunks,
            flat,
        };
        Ok((layer, extents))
    }

    /// Where the file has tables of checksums.
    pub(crate) fn tables(&self) -> impl Iterator<Item = Range<u64>> {
        self.chunks.iter().filter_map(|chunk| match chunk.encoding {
            Encoding::Paged { table } => Some(table..table + chunk.table_bytes()),
            _ => None,
        })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        self.blob.path()
    }

    /// The chunks, in the order of the index.
    pub(crate) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Whether each page is at its own place, see [`Image::flat_file`].
    pub(crate) fn is_flat(&self) -> bool {
        self.flat
    }

    /// Fills `buffer` from `offset` on.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        self.blob.read_at(buffer, offset)
    }
}
