//! Batches: what page streams consist of.
//!
//! ```text
//!  header (40 bytes)                                                   records (16 each)                     payload
//!  ┌───────┬──────┬───────┬─────────┬───────┬─────────┬──────────┬─────┬─────┐┌───────┬───────┬──────────┬───────┐┌─────────
//!  │ magic │ kind │ image │ records │ round │ payload │ sequence │ sum │ sum ││ first │ pages │ encoding │ bytes ││ bytes of
//!  │ u32   │ u8   │ u8    │ u16     │ u32   │ u32     │ u64      │ u64 │ u64 ││ u64   │ u16   │ u16      │ u32   ││ each …
//!  └───────┴──────┴───────┴─────────┴───────┴─────────┴──────────┴──│──┴──│──┘└───────┴───────┴──────────┴───────┘└─────────
//!   ◄──────────────────── of all this ────────────────────────────────────┘    ◄──────── the first sum is of this ────────►
//! ```
//! Little-endian; sums are XXH3-64. The header has its own, so that a damaged length is not believed. Pages are not
//! touched before all of their batch is known to be what was sent. Batches of a stream count up from 0, so that none is
//! missing.

use std::hash::Hasher as _;
use std::io::IoSlice;
use std::ops::Range;

use twox_hash::XxHash3_64 as Hasher;

use crate::error::Error;
use crate::pages::PAGE_BYTES;
use crate::wire;

/// Most pages of a batch: 1 MiB of them.
pub const BATCH_PAGES: usize = 256;
/// Most records of a batch: each has at least one page.
pub const RECORDS_MAX: usize = BATCH_PAGES;
/// Most bytes of a payload: no encoding of a page is longer than the page.
pub const PAYLOAD_BYTES_MAX: usize = BATCH_PAGES * PAGE_BYTES;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 40;
/// Bytes of a record.
pub const RECORD_BYTES: usize = 16;

const MAGIC: u32 = u32::from_le_bytes(*b"CoPg");
/// Bytes of the header that its own checksum covers: all but itself.
const SUMMED_BYTES: usize = HEADER_BYTES - 8;

/// How the content of pages is written. The numbers are those on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// They are zero; no bytes.
    Zero = 0,
    /// As they are.
    Raw = 1,
    /// What differs from what was last sent of them.
    Delta = 2,
    /// Compressed with LZ4.
    Lz4 = 3,
    /// Compressed with Zstandard.
    Zstd = 4,
    /// How each word differs from the one before.
    Pattern = 5,
    /// The one word that all of them consist of.
    Fill = 6,
}

/// Consecutive pages of a batch that are encoded as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// First of the pages.
    pub first: u64,
    /// How many there are.
    pub pages: u16,
    /// How they are encoded.
    pub encoding: Encoding,
    /// Bytes that they have in the payload.
    pub bytes: u32,
}

/// A part of a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// These bytes of the pages as they were read.
    Content(Range<usize>),
    /// These bytes of what was encoded.
    Encoded(Range<usize>),
}

/// A batch while it is put together: records, and where their bytes are, in order.
#[derive(Debug, Default)]
pub struct Batch {
    /// Its records.
    pub records: Vec<Record>,
    /// Its payload.
    pub pieces: Vec<Piece>,
    /// What the [encoded](Piece::Encoded) pieces are part of.
    pub encoded: Vec<u8>,
}

/// What a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pages.
    Pages,
    /// No more pages of this round come on this stream.
    RoundEnd,
}

/// The header of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Which image the pages are of.
    pub image: u8,
    /// How many records follow, at most [`RECORDS_MAX`].
    pub records: u16,
    /// Which round it belongs to.
    pub round: u32,
    /// Bytes after the records, at most [`PAYLOAD_BYTES_MAX`].
    pub payload: u32,
    /// Which batch of its stream it is.
    pub sequence: u64,
    /// Of what follows.
    pub checksum: u64,
}

impl Encoding {
    fn from_wire(number: u16) -> Option<Self> {
        [
            Self::Zero,
            Self::Raw,
            Self::Delta,
            Self::Lz4,
            Self::Zstd,
            Self::Pattern,
            Self::Fill,
        ]
        .into_iter()
        .find(|&encoding| encoding as u16 == number)
    }
}

impl Record {
    /// Its pages.
    pub fn range(&self) -> Range<u64> {
        self.first..self.first.saturating_add(u64::from(self.pages))
    }

    fn to_wire(self) -> [u8; RECORD_BYTES] {
        let mut wire = [0; RECORD_BYTES];
        wire[..8].copy_from_slice(&self.first.to_le_bytes());
        wire[8..10].copy_from_slice(&self.pages.to_le_bytes());
        wire[10..12].copy_from_slice(&(self.encoding as u16).to_le_bytes());
        wire[12..].copy_from_slice(&self.bytes.to_le_bytes());
        wire
    }

    fn from_wire(wire: &[u8; RECORD_BYTES]) -> Result<Self, Error> {
        let number = u16_at(wire, 10);
        let encoding = Encoding::from_wire(number);
        Ok(Self {
            first: u64_at(wire, 0),
            pages: u16_at(wire, 8),
            encoding: encoding.ok_or_else(|| invalid(format!("a record has the unknown encoding {number}")))?,
            bytes: u32_at(wire, 12),
        })
    }
}

impl Batch {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.records.clear();
        self.pieces.clear();
        self.encoded.clear();
    }

    /// Its payload, where `content` are the pages as they were read.
    pub fn payload<'a>(&'a self, content: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        self.pieces.iter().map(move |piece| match piece {
            Piece::Content(bytes) => &content[bytes.clone()],
            Piece::Encoded(bytes) => &self.encoded[bytes.clone()],
        })
    }

    /// Writes records to `wire`, which they replace.
    pub fn records_to_wire(&self, wire: &mut Vec<u8>) {
        wire.clear();
        wire.extend(self.records.iter().flat_map(|record| record.to_wire()));
    }
}

impl Header {
    /// The header as bytes.
    pub fn to_wire(self) -> [u8; HEADER_BYTES] {
        let mut wire = [0; HEADER_BYTES];
        wire[..4].copy_from_slice(&MAGIC.to_le_bytes());
        wire[4] = match self.kind {
            Kind::Pages => 0,
            Kind::RoundEnd => 1,
        };
        wire[5] = self.image;
        wire[6..8].copy_from_slice(&self.records.to_le_bytes());
        wire[8..12].copy_from_slice(&self.round.to_le_bytes());
        wire[12..16].copy_from_slice(&self.payload.to_le_bytes());
        wire[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        wire[24..32].copy_from_slice(&self.checksum.to_le_bytes());
        let sum = Hasher::oneshot(&wire[..SUMMED_BYTES]);
        wire[SUMMED_BYTES..].copy_from_slice(&sum.to_le_bytes());
        wire
    }

    /// Reads a header.
    ///
    /// # Errors
    /// It is not one, not what was sent, or what it tells of is too large.
    pub fn from_wire(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        let magic = u32_at(bytes, 0);
        if magic == wire::MAGIC {
            // The only message that may come here.
            return Err(Error::Aborted("in the middle of a round".to_owned()));
        }
        if magic != MAGIC {
            return Err(invalid(format!("it begins with {magic:08x}, not with {MAGIC:08x}")));
        }
        let (found, expected) = (Hasher::oneshot(&bytes[..SUMMED_BYTES]), u64_at(bytes, SUMMED_BYTES));
        if found != expected {
            return Err(Error::Damaged {
                what: "the header of a batch of pages".to_owned(),
                expected,
                found,
            });
        }
        let header = Self {
            kind: match bytes[4] {
                0 => Kind::Pages,
                1 => Kind::RoundEnd,
                other => return Err(invalid(format!("its kind is {other}"))),
            },
            image: bytes[5],
            records: u16_at(bytes, 6),
            round: u32_at(bytes, 8),
            payload: u32_at(bytes, 12),
            sequence: u64_at(bytes, 16),
            checksum: u64_at(bytes, 24),
        };
        if usize::from(header.records) > RECORDS_MAX {
            return Err(invalid(format!(
                "{} records are more than {RECORDS_MAX}",
                header.records
            )));
        }
        if header.payload as usize > PAYLOAD_BYTES_MAX {
            return Err(invalid(format!(
                "{} bytes are more than {PAYLOAD_BYTES_MAX}",
                header.payload
            )));
        }
        Ok(header)
    }

    /// Bytes that follow.
    pub fn rest_bytes(&self) -> usize {
        usize::from(self.records) * RECORD_BYTES + self.payload as usize
    }
}

/// The checksum of what follows a header.
pub fn checksum(pieces: &[IoSlice<'_>]) -> u64 {
    let mut sum = Hasher::new();
    pieces.iter().for_each(|piece| sum.write(piece));
    sum.finish()
}

/// Checks what has arrived after `header`.
///
/// # Errors
/// It is not what was sent.
pub fn verify(header: &Header, rest: &[u8]) -> Result<(), Error> {
    let (found, expected) = (Hasher::oneshot(rest), header.checksum);
    if found != expected {
        return Err(Error::Damaged {
            what: format!("batch {} of pages, of round {},", header.sequence, header.round),
            expected,
            found,
        });
    }
    Ok(())
}

/// Takes apart what follows `header`, which was [verified](verify): each record with its bytes.
///
/// # Errors
/// Its records do not account for its bytes.
pub fn records<'a>(
    header: &Header,
    rest: &'a [u8],
) -> Result<impl Iterator<Item = (Record, &'a [u8])> + use<'a>, Error> {
    let (table, mut payload) = rest.split_at(usize::from(header.records) * RECORD_BYTES);
    let (table, _) = table.as_chunks::<RECORD_BYTES>();
    let (mut pages, mut bytes) = (0, 0);
    for record in table {
        let record = Record::from_wire(record)?;
        if record.pages == 0 {
            return Err(invalid("a record has no page".to_owned()));
        }
        pages += usize::from(record.pages);
        bytes += u64::from(record.bytes);
    }
    if pages > BATCH_PAGES {
        return Err(invalid(format!("{pages} pages are more than {BATCH_PAGES}")));
    }
    if bytes != payload.len() as u64 {
        return Err(invalid(format!(
            "its records have {bytes} bytes, its payload {}",
            payload.len()
        )));
    }
    Ok(table.iter().map(move |record| {
        let record = Record::from_wire(record).expect("it was read once before");
        let (own, rest) = payload.split_at(record.bytes as usize);
        payload = rest;
        (record, own)
    }))
}

fn invalid(reason: String) -> Error {
    Error::Invalid {
        what: "a batch of pages",
        reason,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let bytes = bytes[at..].first_chunk();
    *bytes.expect("fields lie within the header or record they are of")
}
