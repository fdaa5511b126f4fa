//! Reading pages: no byte leaves this module whose chunk does not have its checksum.

use std::collections::BTreeMap;
use std::path::Path;

use zstd::bulk::Decompressor;

use super::index::{CHECKSUM_BYTES, Chunk, Encoding};
use super::map::Place;
use super::{Image, Layer};
use crate::checksum::Checksum;
use crate::error::Error;

/// Chunks to keep for reading in order, besides one for each snapshot of the chain. A live snapshot has pages out of order
/// where the guest wrote before they were copied, so that reading in order goes back and forth between chunks.
pub const KEPT_CHUNKS: usize = 32;

/// Tables of checksums that are kept for the next pages of their chunks; they have at most 4 KiB each.
const KEPT_TABLES: usize = 128;

/// Reads pages of an image. The chunks used last are kept, so that reading in order reads most chunks once; of those whose
/// pages have checksums of their own, only the checksums.
pub struct Reader {
    image: Image,
    chunks: ChunkReader,
    kept: Vec<KeptChunk>,
    /// Most of these, besides one for each snapshot of the chain.
    most_kept: usize,
    /// Counts the uses of chunks.
    clock: u64,
    /// Verified tables, by layer and number of the chunk.
    tables: BTreeMap<(u32, u32), Vec<u8>>,
    /// Pages that were read by themselves.
    pages: Vec<u8>,
}

/// The pages of a chunk.
#[derive(Default)]
struct KeptChunk {
    /// Layer, and number of the chunk in it.
    key: Option<(u32, u32)>,
    bytes: Vec<u8>,
    /// When it was used last.
    used: u64,
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// How many.
    pub count: u64,
    /// Their content; without any they are zero.
    pub bytes: Option<&'a [u8]>,
}

impl Reader {
    pub(super) fn new(image: Image, most_kept: usize) -> Result<Self, Error> {
        let chunks = ChunkReader::new(image.layer(0).path())?;
        Ok(Self {
            image,
            chunks,
            kept: Vec::new(),
            most_kept,
            clock: 0,
            tables: BTreeMap::new(),
            pages: Vec::new(),
        })
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Page `page` and those after it that are stored with it; nothing past the image's end.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged there.
    pub fn at(&mut self, page: u64) -> Result<Option<Found<'_>>, Error> {
        self.at_most(page, u64::MAX)
    }

    /// The same, but at most `most` pages, which are not none.
    ///
    /// # Errors
    /// As [`at`](Self::at).
    pub fn at_most(&mut self, page: u64, most: u64) -> Result<Option<Found<'_>>, Error> {
        if page >= self.image.pages() {
            return Ok(None);
        }
        let (place, count) = self.image.find(page);
        let count = count.min(most);
        let Place::Stored { layer, chunk, slot } = place else {
            return Ok(Some(Found { count, bytes: None }));
        };
        let page_bytes = self.image.page_bytes() as usize;
        // A chunk is small, and the index was checked: the pages are within it.
        let pages = usize::try_from(count).expect("pages of a chunk");
        let bytes = if self.image.is_paged(place) {
            self.read_pages((layer, chunk), slot as usize, pages)?
        } else {
            let kept = self.chunk(layer, chunk)?;
            &kept.bytes[slot as usize * page_bytes..][..pages * page_bytes]
        };
        Ok(Some(Found {
            count,
            bytes: Some(bytes),
        }))
    }

    /// How many pages from page `page` on, itself included, cost no more than this one: those of its chunk, unless they can
    /// be read one by one, and that costs little.
    pub fn at_once(&self, page: u64) -> u64 {
        let (place, count) = self.image.find(page);
        if self.image.is_paged(place) && self.image.useful_readers() == 1 {
            1
        } else {
            count
        }
    }

    /// Reads and verifies `pages` pages of a chunk that has a table, from number `slot` of the chunk on.
    fn read_pages(&mut self, key: (u32, u32), slot: usize, pages: usize) -> Result<&[u8], Error> {
        let layer = self.image.layer(key.0);
        let chunk = &layer.chunks()[key.1 as usize];
        if !self.tables.contains_key(&key) {
            // Rather read a few again than keep record of who was used last.
            if self.tables.len() >= KEPT_TABLES {
                self.tables.clear();
            }
            self.tables.insert(key, read_table(layer, chunk)?);
        }
        let table = &self.tables[&key];
        let length = pages * layer.page_bytes as usize;
        if self.pages.len() < length {
            self.pages.resize(length, 0);
        }
        let bytes = &mut self.pages[..length];
        read_verified(layer, chunk, &table[slot * CHECKSUM_BYTES as usize..], slot, bytes)?;
        Ok(bytes)
    }

    /// Whether page `page` comes without reading anything, with how many that follow it in the same place, itself included.
    pub fn keeps(&self, page: u64) -> (bool, u64) {
        let (place, count) = self.image.find(page);
        let is_kept = match place {
            Place::Zero => true,
            // Nothing is kept of those that are read one by one.
            Place::Stored { layer, chunk, .. } => self.kept.iter().any(|kept| kept.key == Some((layer, chunk))),
        };
        (is_kept, count)
    }

    /// A chunk, read if it is not kept.
    fn chunk(&mut self, layer: u32, chunk: u32) -> Result<&KeptChunk, Error> {
        self.clock += 1;
        let key = Some((layer, chunk));
        let position = match self.kept.iter().position(|kept| kept.key == key) {
            Some(position) => position,
            None => self.read_chunk(layer, chunk)?,
        };
        let kept = &mut self.kept[position];
        kept.used = self.clock;
        Ok(kept)
    }

    /// Reads a chunk in place of the one that was not used for the longest time; returns its position.
    fn read_chunk(&mut self, layer: u32, chunk: u32) -> Result<usize, Error> {
        let position = if self.kept.len() < self.image.0.layers.len() + self.most_kept {
            self.kept.push(KeptChunk::default());
            self.kept.len() - 1
        } else {
            let oldest = (0..self.kept.len()).min_by_key(|position| self.kept[*position].used);
            oldest.expect("there are more than no chunks")
        };
        let kept = &mut self.kept[position];
        // What is there if reading fails is no chunk.
        kept.key = None;
        let source = self.image.layer(layer);
        self.chunks
            .read(source, &source.chunks()[chunk as usize], &mut kept.bytes)?;
        kept.key = Some((layer, chunk));
        Ok(position)
    }
}

/// Reads and verifies whole chunks.
pub(crate) struct ChunkReader {
    zstd: Decompressor<'static>,
    /// A compressed chunk as it is stored.
    stored: Vec<u8>,
}

impl ChunkReader {
    /// A reader for chunks of the file at `path`, among others.
    pub fn new(path: &Path) -> Result<Self, Error> {
        Ok(Self {
            zstd: Decompressor::new().map_err(Error::io("set up decompression", path))?,
            stored: Vec::new(),
        })
    }

    /// Puts the pages of `chunk` into `bytes`, whose content is unspecified if that fails.
    pub fn read(&mut self, layer: &Layer, chunk: &Chunk, bytes: &mut Vec<u8>) -> Result<(), Error> {
        let damaged = |what: &str| Error::damaged(layer.path(), chunk.offset, what);
        if chunk.encoding == Encoding::Zero {
            bytes.clear();
            return Ok(());
        }
        let length = usize::try_from(chunk.pages).expect("pages of a chunk") * layer.page_bytes as usize;
        bytes.resize(length, 0);
        if let Encoding::Paged { .. } = chunk.encoding {
            return read_verified(layer, chunk, &read_table(layer, chunk)?, 0, bytes);
        }
        let stored = match chunk.encoding {
            Encoding::Zstd => {
                self.stored.resize(chunk.stored_bytes as usize, 0);
                &mut self.stored
            }
            _ => &mut *bytes,
        };
        layer.read_at(stored, chunk.offset)?;
        if Checksum::of(stored) != chunk.checksum {
            return Err(damaged("a chunk of pages does not have its checksum"));
        }
        if chunk.encoding == Encoding::Zstd {
            match self.zstd.decompress_to_buffer(&self.stored, bytes.as_mut_slice()) {
                Ok(decompressed) if decompressed == length => {}
                _ => return Err(damaged("a chunk of pages cannot be decompressed")),
            }
        }
        Ok(())
    }
}

/// The checksums of the pages of `chunk`, which has a table.
fn read_table(layer: &Layer, chunk: &Chunk) -> Result<Vec<u8>, Error> {
    let Encoding::Paged { table } = chunk.encoding else {
        return Ok(Vec::new());
    };
    let mut checksums = vec![0; usize::try_from(chunk.table_bytes()).expect("a chunk has few pages")];
    layer.read_at(&mut checksums, table)?;
    if Checksum::of(&checksums) != chunk.checksum {
        let what = "the checksums of a chunk of pages do not have theirs";
        return Err(Error::damaged(layer.path(), table, what));
    }
    Ok(checksums)
}

/// Fills `bytes` with pages of `chunk` from number `slot` of it on, whose checksums `table` begins with.
fn read_verified(layer: &Layer, chunk: &Chunk, table: &[u8], slot: usize, bytes: &mut [u8]) -> Result<(), Error> {
    let page_bytes = layer.page_bytes as usize;
    let offset = chunk.offset + (slot * page_bytes) as u64;
    layer.read_at(bytes, offset)?;
    let mut checksums = table.chunks_exact(CHECKSUM_BYTES as usize);
    for (number, page) in bytes.chunks_exact(page_bytes).enumerate() {
        if checksums.next() != Some(&Checksum::of(page).to_bytes()) {
            let offset = offset + (number * page_bytes) as u64;
            return Err(Error::damaged(
                layer.path(),
                offset,
                "a page does not have its checksum",
            ));
        }
    }
    Ok(())
}
