//! The sending side: pages in, records of a batch out.

use std::hint::black_box;
use std::mem;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::choice::{Attempt, Choice, Width};
use super::compressor::{Compressor, Tool};
use super::history::{History, Seen, compare};
use super::zero::is_zero;
use super::{fill, pattern};
use crate::batch::{Batch, Encoding, Piece, Record};
use crate::options::Compression;
use crate::pages::PAGE_BYTES;
use crate::report::PageCounts;

/// Most pages that are compressed together: enough for a compressor to find what pages have in common, and few enough
/// that data that does not shrink is told from data that does.
const RUN_PAGES: usize = 32;

/// Most bytes that are copied to see how long that takes.
const SAMPLE_BYTES: usize = 64 * PAGE_BYTES;

/// The encoder of one stream.
pub struct Encoder {
    choice: Choice,
    /// One for each image.
    histories: Vec<History>,
    compressor: Compressor,
    /// Whether the destination's pages are as they were sent last.
    remembers: bool,
    /// The pages of the batch that is being made.
    found: Vec<Found>,
    /// Their deltas and patterns, one after the other.
    encoded: Vec<u8>,
}

/// A page, and what it is sent as.
#[derive(Clone, Copy)]
struct Found {
    page: u64,
    kind: Kind,
    /// Which of the pages as they were read.
    read: usize,
    /// Where its delta or pattern ends.
    encoded_end: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Unchanged,
    Delta,
    Fill(fill::Word),
    Pattern,
    Content,
}

impl Encoder {
    /// The encoder of one of `streams` streams for images of so many pages.
    pub fn new(images: &[u64], streams: u64, compression: Compression) -> Self {
        Self {
            choice: Choice::new(compression),
            histories: images.iter().map(|&pages| History::new(pages, streams)).collect(),
            compressor: Compressor::default(),
            remembers: true,
            found: Vec::new(),
            encoded: Vec::new(),
        }
    }

    /// Round number `round`, from 1, begins, in which the stream may send so many bytes per second, or as many as it can.
    pub fn begin_round(&mut self, round: u32, limit: Option<u64>) {
        self.choice.set_limit(limit);
        for history in &mut self.histories {
            history.begin_round(round);
        }
    }

    /// From here on pages of the destination are not as they were sent last (post-copy: those that changed since are
    /// missing there): no page is sent as a delta, or not at all because it is unchanged.
    pub fn stop_deltas(&mut self) {
        self.remembers = false;
        self.forget();
    }

    /// What was sent before is not what the destination has: each page is sent whole once more.
    pub fn forget(&mut self) {
        self.histories.iter_mut().for_each(History::clear);
    }

    /// `bytes` were given to the kernel, which took them after `took`; what was waited for a limit does not count.
    pub fn sent(&mut self, bytes: u64, took: Duration) {
        self.choice.sent(bytes, took);
    }

    /// Adds the pages of `ranges`, of image number `image` and of this stream, in ascending order, to `batch`; `content`
    /// has them as they were read, one after the other. Pages that are unchanged are not in the batch.
    pub fn encode(&mut self, image: usize, ranges: &[Range<u64>], content: &[u8], batch: &mut Batch) -> PageCounts {
        self.encode_against(None, image, ranges, content, batch)
    }

    /// As [`encode`](Self::encode), where the destination has `old` of these pages, if that is known; then it need not be
    /// remembered what was sent.
    pub fn encode_against(
        &mut self,
        old: Option<&[u8]>,
        image: usize,
        ranges: &[Range<u64>],
        content: &[u8],
        batch: &mut Batch,
    ) -> PageCounts {
        if self.choice.wants_sample() {
            let began = Instant::now();
            let sample = &content[..content.len().min(SAMPLE_BYTES)];
            let copy = black_box(sample.to_vec());
            self.choice.copied(copy.len() as u64, began.elapsed());
        }
        let width = self.choice.width();
        self.find(image, width, ranges, content, old);
        let found = mem::take(&mut self.found);
        let mut counts = PageCounts::default();
        let mut encoded = 0;
        for run in found.chunk_by(|one, next| one.kind == next.kind && one.page + 1 == next.page) {
            let pages = run.len() as u64;
            match run[0].kind {
                Kind::Zero => {
                    counts.zero += pages;
                    add(run, Encoding::Zero, None, 0, batch);
                }
                Kind::Unchanged => counts.unchanged += pages,
                Kind::Delta => {
                    counts.delta += pages;
                    let end = run[run.len() - 1].encoded_end;
                    add_encoded(run, Encoding::Delta, &self.encoded[encoded..end], batch);
                }
                Kind::Fill(word) => {
                    counts.compressed += pages;
                    add_encoded(run, Encoding::Fill, &word, batch);
                }
                Kind::Pattern => {
                    counts.compressed += pages;
                    let end = run[run.len() - 1].encoded_end;
                    add_encoded(run, Encoding::Pattern, &self.encoded[encoded..end], batch);
                }
                Kind::Content if width == Width::Wide => {
                    counts.raw += pages;
                    add_raw(run, batch);
                }
                Kind::Content => run.chunks(RUN_PAGES).for_each(|run| {
                    if self.add_compressed(run, content, batch) {
                        counts.compressed += run.len() as u64;
                    } else {
                        counts.raw += run.len() as u64;
                        add_raw(run, batch);
                    }
                }),
            }
            encoded = run[run.len() - 1].encoded_end;
        }
        self.found = found;
        counts
    }

    /// Finds out what each page is sent as.
    fn find(&mut self, image: usize, width: Width, ranges: &[Range<u64>], content: &[u8], old: Option<&[u8]>) {
        self.found.clear();
        self.encoded.clear();
        let history = &mut self.histories[image];
        let patterns = self.choice.wants_patterns();
        let (contents, rest) = content.as_chunks::<PAGE_BYTES>();
        debug_assert!(rest.is_empty());
        let old = old.map(|old| old.as_chunks::<PAGE_BYTES>().0);
        for ((read, content), page) in contents.iter().enumerate().zip(ranges.iter().cloned().flatten()) {
            let zero = is_zero(content);
            let seen = match old {
                Some(old) => {
                    history.forget(page);
                    match (zero, &old[read]) {
                        (true, old) if !is_zero(old) => Seen::New,
                        (_, old) => compare(old, content, &mut self.encoded),
                    }
                }
                None if zero || width == Width::Wide || !self.remembers => {
                    history.forget(page);
                    Seen::New
                }
                None => history.look(page, content, &mut self.encoded),
            };
            let kind = match seen {
                Seen::Unchanged => Kind::Unchanged,
                Seen::Delta => Kind::Delta,
                Seen::New if zero => Kind::Zero,
                Seen::New if !patterns => Kind::Content,
                Seen::New => match fill::word_of(content) {
                    Some(word) => Kind::Fill(word),
                    None if pattern::encode(content, &mut self.encoded) => Kind::Pattern,
                    None => Kind::Content,
                },
            };
            self.found.push(Found {
                page,
                kind,
                read,
                encoded_end: self.encoded.len(),
            });
        }
    }

    /// Adds a run as it is when compressed, unless it does not shrink; tells whether it does.
    fn add_compressed(&mut self, run: &[Found], content: &[u8], batch: &mut Batch) -> bool {
        let bytes = &content[bytes_of(run)];
        match self.choice.attempt() {
            Attempt::None => return false,
            Attempt::Look if !self.look(bytes) => return false,
            Attempt::Look | Attempt::Compress => {}
        }
        let tool = self.choice.tool();
        let began = Instant::now();
        let Some(packed) = self.compressor.compress(tool, bytes) else {
            return false;
        };
        self.choice.compressed(tool, bytes.len(), packed.len(), began.elapsed());
        let shrank = packed.len() < bytes.len();
        if shrank {
            add_encoded(run, tool.encoding(), packed, batch);
        }
        shrank
    }

    /// Whether it pays to compress a page in the middle of `bytes`.
    fn look(&mut self, bytes: &[u8]) -> bool {
        let (pages, _) = bytes.as_chunks::<PAGE_BYTES>();
        let page = &pages[pages.len() / 2];
        let began = Instant::now();
        let packed = self.compressor.compress(Tool::Lz4, page);
        let left = packed.map_or(page.len(), <[u8]>::len);
        self.choice.looked(page.len(), left, began.elapsed())
    }
}

impl Tool {
    fn encoding(self) -> Encoding {
        match self {
            Self::Lz4 => Encoding::Lz4,
            Self::Zstd => Encoding::Zstd,
        }
    }
}

/// Where the bytes of `run` are among those that were read.
fn bytes_of(run: &[Found]) -> Range<usize> {
    let first = run[0].read;
    first * PAGE_BYTES..(first + run.len()) * PAGE_BYTES
}

fn add_raw(run: &[Found], batch: &mut Batch) {
    let bytes = bytes_of(run);
    add(
        run,
        Encoding::Raw,
        Some(Piece::Content(bytes.clone())),
        bytes.len(),
        batch,
    );
}

fn add_encoded(run: &[Found], encoding: Encoding, bytes: &[u8], batch: &mut Batch) {
    let start = batch.encoded.len();
    batch.encoded.extend_from_slice(bytes);
    let piece = Piece::Encoded(start..batch.encoded.len());
    add(run, encoding, Some(piece), bytes.len(), batch);
}

fn add(run: &[Found], encoding: Encoding, piece: Option<Piece>, bytes: usize, batch: &mut Batch) {
    batch.records.push(Record {
        first: run[0].page,
        pages: u16::try_from(run.len()).expect("a batch has few pages"),
        encoding,
        bytes: u32::try_from(bytes).expect("a batch has few bytes"),
    });
    batch.pieces.extend(piece);
}

#[cfg(test)]
mod tests;
