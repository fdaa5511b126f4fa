//! Reading pages: no byte leaves this module whose chunk does not have its checksum.

use std::path::Path;

use zstd::bulk::Decompressor;

use super::index::{Chunk, Encoding};
use super::map::Place;
use super::{Image, Layer};
use crate::checksum::Checksum;
use crate::error::Error;

/// Reads pages of an image. Each layer's last chunk is kept, so that reading in order reads each chunk once.
pub struct Reader<'a> {
    image: &'a Image,
    chunks: ChunkReader,
    /// For each layer.
    kept: Vec<KeptChunk>,
}

/// The pages of a chunk.
#[derive(Default)]
struct KeptChunk {
    number: Option<u32>,
    bytes: Vec<u8>,
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// How many.
    pub count: u64,
    /// Their content; without any they are zero.
    pub bytes: Option<&'a [u8]>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(image: &'a Image) -> Result<Self, Error> {
        let newest = image.layer(0).path();
        Ok(Self {
            image,
            chunks: ChunkReader::new(newest)?,
            kept: image.layers.iter().map(|_| KeptChunk::default()).collect(),
        })
    }

    /// The image.
    pub fn image(&self) -> &'a Image {
        self.image
    }

    /// Page `page` and those after it that come with it at no cost; nothing past the image's end.
    ///
    /// # Errors
    /// The file cannot be read, or the chunk is damaged.
    pub fn at(&mut self, page: u64) -> Result<Option<Found<'_>>, Error> {
        let image = self.image;
        if page >= image.pages {
            return Ok(None);
        }
        let (place, count) = image.map.find(page, image.pages);
        let Place::Stored { layer, chunk, slot } = place else {
            return Ok(Some(Found { count, bytes: None }));
        };
        let kept = &mut self.kept[layer as usize];
        if kept.number != Some(chunk) {
            // What is there if reading fails is no chunk.
            kept.number = None;
            let layer = image.layer(layer);
            self.chunks
                .read(layer, &layer.chunks()[chunk as usize], &mut kept.bytes)?;
            kept.number = Some(chunk);
        }
        // A chunk is small, and the index was checked: the pages are within it.
        let page_bytes = image.page_bytes as usize;
        let pages = usize::try_from(count).expect("pages of a chunk");
        let bytes = &kept.bytes[slot as usize * page_bytes..][..pages * page_bytes];
        Ok(Some(Found {
            count,
            bytes: Some(bytes),
        }))
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
