//! Writing an image: pages in any order become chunks and an index.

use std::path::{Path, PathBuf};

use zstd::bulk::Compressor;

use super::index::{CHECKSUM_BYTES, CHUNK_BYTES_MAX, Chunk, Encoding, INDEX_BYTES_MAX, Index, Run};
use super::source::{PageSource, Progress};
use super::{PAGE_BYTES_MAX, PAGE_BYTES_MIN, check_shape};
use crate::checksum::Checksum;
use crate::error::Error;
use crate::files::{NewFile, NewFiles};
use crate::manifest::{Base, ImageEntry, IndexEntry, image_file};
use crate::section::Section;

/// Bytes of pages that are put into one chunk, or one page if it has more: larger chunks compress better. It is the least
/// where pages have checksums of their own.
const CHUNK_BYTES: u32 = 256 << 10;

/// Pages with fewer bytes have checksums of their own, unless they are compressed: whoever waits for a page of memory
/// after a restore need not wait for others to be read and verified.
const PAGED_BELOW: u32 = 64 << 10;

/// How many chunks of such pages there should be at most, unless they get larger than [`CHUNK_BYTES_MAX`]: a restore reads
/// the index before anything else.
const PAGED_CHUNKS: u64 = 1024;

/// What pages are compared with to find out whether they are zero.
static ZEROS: [u8; PAGE_BYTES_MAX as usize] = [0; PAGE_BYTES_MAX as usize];

/// What an image is, and how it is to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of a page, a power of two from [`PAGE_BYTES_MIN`] to [`PAGE_BYTES_MAX`].
    pub page_bytes: u32,
    /// Number of pages.
    pub pages: u64,
    /// What the pages hold that are not written.
    pub base: Base,
    /// How pages are laid out.
    pub layout: Layout,
}

impl Shape {
    /// Whether pages have checksums of their own.
    fn is_paged(&self) -> bool {
        self.page_bytes < PAGED_BELOW && matches!(self.layout, Layout::Flat | Layout::Packed)
    }

    /// Bytes of pages that are put into one chunk.
    fn chunk_bytes(&self) -> u32 {
        if !self.is_paged() {
            return CHUNK_BYTES;
        }
        let even = self.pages.saturating_mul(self.page_bytes.into()) / PAGED_CHUNKS;
        let most = even.min(CHUNK_BYTES_MAX.into()).next_power_of_two();
        u32::try_from(most).map_or(CHUNK_BYTES_MAX, |bytes| bytes.max(CHUNK_BYTES))
    }

    /// Bytes of a complete image where each page is at its own place, and of its tables behind it, each checksum being
    /// at its own place too.
    fn flat_bytes(&self) -> u64 {
        let bytes = if self.is_paged() { CHECKSUM_BYTES } else { 0 };
        self.pages * u64::from(self.page_bytes + bytes)
    }
}

/// How the pages of an image are laid out in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Each at its number times the size of a page, so that the file can be mapped as a whole; only for images that
    /// are complete. Where zero pages would be, the file has holes.
    Flat,
    /// One after the other.
    Packed,
    /// Compressed with zstd, one chunk after the other; chunks that do not get smaller are stored as they are.
    Compressed {
        /// zstd's level, 1 (fast) to 19.
        level: i32,
    },
}

/// Writes the file of an image. After an error the whole snapshot is to be dropped.
pub struct ImageWriter {
    name: String,
    path: PathBuf,
    file: Box<dyn NewFile>,
    shape: Shape,
    compressor: Option<Compressor<'static>>,
    index: Index,
    /// End of the last chunk.
    data_bytes: u64,
    /// Pages that do not yet make a chunk.
    pending: Vec<u8>,
    /// How many bytes of pages make one.
    chunk_bytes: u32,
    pending_runs: Vec<Run>,
    /// Zero pages, in an image whose parent may have others there.
    zero_runs: Vec<Run>,
}

impl ImageWriter {
    /// Begins the file of image `name` in directory `dir`.
    pub(crate) fn create(files: &dyn NewFiles, dir: &Path, name: &str, shape: Shape) -> Result<Self, Error> {
        let path = dir.join(image_file(name));
        check_shape(shape.page_bytes, shape.pages).map_err(|reason| Error::unwritable(&path, reason))?;
        if shape.layout == Layout::Flat && shape.base != Base::Zero {
            return Err(Error::unwritable(&path, "only a complete image can be flat"));
        }
        let compressor = match shape.layout {
            Layout::Compressed { level } => {
                Some(Compressor::new(level).map_err(Error::io("set up compression", &path))?)
            }
            Layout::Flat | Layout::Packed => None,
        };
        let chunk_bytes = shape.chunk_bytes();
        let file = files.create(&path).map_err(Error::io("create it", &path))?;
        Ok(Self {
            name: name.to_owned(),
            path,
            file,
            shape,
            compressor,
            index: Index::default(),
            data_bytes: 0,
            pending: Vec::with_capacity(chunk_bytes as usize),
            chunk_bytes,
            pending_runs: Vec::new(),
            zero_runs: Vec::new(),
        })
    }

    /// Writes the pages from number `first` on; `bytes` is a multiple of the size of a page. No page comes twice.
    ///
    /// # Errors
    /// There are no such pages, or the file cannot be written.
    pub fn put(&mut self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let page_bytes = self.shape.page_bytes as usize;
        let count = (bytes.len() / page_bytes) as u64;
        let within = first.checked_add(count).is_some_and(|end| end <= self.shape.pages);
        if !within || !bytes.len().is_multiple_of(page_bytes) {
            let reason = format!("{} bytes from page {first} of {}", bytes.len(), self.shape.pages);
            return Err(Error::unwritable(&self.path, reason));
        }
        for (number, page) in (first..).zip(bytes.chunks_exact(page_bytes)) {
            let zero = *page == ZEROS[..page_bytes];
            match self.shape.base {
                _ if !zero => self.append(number, page)?,
                Base::Zero => {}
                // The parent may have something else there.
                Base::Parent => extend_runs(&mut self.zero_runs, number),
            }
        }
        Ok(())
    }

    /// Writes all pages of `source`.
    ///
    /// # Errors
    /// They cannot be had, or not be written.
    pub fn copy_from(&mut self, source: &mut dyn PageSource, progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
        let total = source.bytes_total();
        let mut done = 0;
        while let Some(pages) = source.next_pages()? {
            self.put(pages.first, pages.bytes)?;
            done += pages.bytes.len() as u64;
            progress(Progress { done, total });
        }
        Ok(())
    }

    /// Name of the image.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Writes what is left and the index, and makes the file permanent.
    pub(crate) fn finish(mut self) -> Result<ImageEntry, Error> {
        self.flush()?;
        let zero_pages = self.put_zero_chunk()?;
        let Shape {
            page_bytes,
            pages,
            base,
            layout,
        } = self.shape;
        let data_bytes = match layout {
            Layout::Flat => self.shape.flat_bytes(),
            Layout::Packed | Layout::Compressed { .. } => self.data_bytes,
        };
        let encoded = postcard::to_stdvec(&self.index)
            .map_err(|error| Error::unwritable(&self.path, format!("the index: {error}")))?;
        if encoded.len() as u64 > INDEX_BYTES_MAX {
            return Err(Error::unwritable(
                &self.path,
                "its pages are too scattered for an index",
            ));
        }
        let stored: u64 = self.index.chunks.iter().map(|chunk| chunk.pages).sum();
        let entry = ImageEntry {
            name: self.name,
            page_bytes,
            pages,
            base,
            stored_pages: stored - zero_pages,
            zero_pages,
            data_bytes,
            index: IndexEntry {
                version: Index::VERSION,
                bytes: encoded.len() as u64,
                checksum: Checksum::of(&encoded),
            },
        };
        // What cannot be read is not written: this finds pages that came twice.
        self.index
            .extents(&entry, 0)
            .map_err(|reason| Error::unwritable(&self.path, reason))?;
        let written = self.file.write_all_at(&encoded, data_bytes);
        written.map_err(Error::io("write it", &self.path))?;
        self.file.sync().map_err(Error::io("sync it", &self.path))?;
        Ok(entry)
    }

    fn append(&mut self, number: u64, page: &[u8]) -> Result<(), Error> {
        let full = self.pending.len() + page.len() > self.chunk_bytes as usize;
        let apart = self
            .pending_runs
            .last()
            .is_some_and(|run| run.first + run.count != number);
        // Pages that are wanted together are of one chunk.
        let aligned = (number * page.len() as u64).is_multiple_of(u64::from(self.chunk_bytes));
        if full || ((apart || aligned) && self.shape.layout == Layout::Flat) {
            self.flush()?;
        }
        self.pending.extend_from_slice(page);
        extend_runs(&mut self.pending_runs, number);
        Ok(())
    }

    /// Makes a chunk of the pending pages.
    fn flush(&mut self) -> Result<(), Error> {
        let Some(first) = self.pending_runs.first().map(|run| run.first) else {
            return Ok(());
        };
        let page_bytes = u64::from(self.shape.page_bytes);
        let pages = self.pending.len() as u64 / page_bytes;
        let mut checksums = Vec::new();
        let (encoding, stored, offset, checksum) = match (self.compress()?, self.shape.layout) {
            (Some(compressed), _) => {
                let checksum = Checksum::of(&compressed);
                (Encoding::Zstd, compressed, self.data_bytes, checksum)
            }
            (None, layout) => {
                let offset = match layout {
                    Layout::Flat => first * page_bytes,
                    _ if self.shape.is_paged() => self.data_bytes,
                    _ => self.data_bytes.next_multiple_of(u64::from(PAGE_BYTES_MIN)),
                };
                let (encoding, checksum) = self.describe(first, offset, &mut checksums);
                (encoding, std::mem::take(&mut self.pending), offset, checksum)
            }
        };
        self.write(&stored, offset)?;
        if let Encoding::Paged { table } = encoding {
            self.write(&checksums, table)?;
        }
        let chunk = Chunk {
            encoding,
            offset,
            stored_bytes: u32::try_from(stored.len()).expect("the size of a chunk"),
            checksum,
            pages,
            runs: u32::try_from(self.pending_runs.len()).expect("at most the pages of a chunk"),
        };
        self.data_bytes = offset + stored.len() as u64 + chunk.table_bytes();
        self.index.chunks.push(chunk);
        self.index.runs.append(&mut self.pending_runs);
        if encoding != Encoding::Zstd {
            // The room is for the next chunk.
            self.pending = stored;
        }
        self.pending.clear();
        Ok(())
    }

    /// The pending pages, if they are to be compressed and get smaller.
    fn compress(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let Some(compressor) = &mut self.compressor else {
            return Ok(None);
        };
        let compressed = compressor.compress(&self.pending);
        let compressed = compressed.map_err(Error::io("compress pages for it", &self.path))?;
        Ok(Some(compressed).filter(|compressed| compressed.len() < self.pending.len()))
    }

    /// How the pending pages are stored at `offset`, the first of which is page `first`, and what verifies them: their
    /// own `checksums`, to which these are added, or one of all.
    fn describe(&self, first: u64, offset: u64, checksums: &mut Vec<u8>) -> (Encoding, Checksum) {
        if !self.shape.is_paged() {
            return (Encoding::Raw, Checksum::of(&self.pending));
        }
        let pages = self.pending.chunks_exact(self.shape.page_bytes as usize);
        checksums.extend(pages.flat_map(|page| Checksum::of(page).to_bytes()));
        let table = match self.shape.layout {
            Layout::Flat => self.shape.pages * u64::from(self.shape.page_bytes) + first * u64::from(CHECKSUM_BYTES),
            _ => offset + self.pending.len() as u64,
        };
        (Encoding::Paged { table }, Checksum::of(checksums))
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(Error::io("write it", &self.path))
    }

    /// Notes the zero pages; returns how many there are.
    fn put_zero_chunk(&mut self) -> Result<u64, Error> {
        if self.zero_runs.is_empty() {
            return Ok(0);
        }
        let pages = self.zero_runs.iter().map(|run| run.count).sum();
        let runs = u32::try_from(self.zero_runs.len())
            .map_err(|_| Error::unwritable(&self.path, "its zero pages are too scattered for an index"))?;
        self.index.chunks.push(Chunk {
            encoding: Encoding::Zero,
            offset: 0,
            stored_bytes: 0,
            checksum: Checksum::of(&[]),
            pages,
            runs,
        });
        self.index.runs.append(&mut self.zero_runs);
        Ok(pages)
    }
}

/// Notes page `number` as the next of `runs`.
fn extend_runs(runs: &mut Vec<Run>, number: u64) {
    match runs.last_mut() {
        Some(run) if run.first + run.count == number => run.count += 1,
        _ => runs.push(Run {
            first: number,
            count: 1,
        }),
    }
}
