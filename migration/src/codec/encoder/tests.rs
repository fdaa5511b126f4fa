//! Pages that were encoded and decoded again, from a memory that changes meanwhile.

use std::io;
use std::slice;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::codec::{Decoder, Page, ZERO};
use crate::error::Error;
use crate::vm::Image;

/// An image in memory.
struct Memory(Mutex<Vec<Page>>);

impl Memory {
    fn new(pages: Vec<Page>) -> Self {
        Self(Mutex::new(pages))
    }

    fn bytes(pages: Range<u64>) -> Range<usize> {
        usize::try_from(pages.start).unwrap()..usize::try_from(pages.end).unwrap()
    }
}

impl Image for Memory {
    fn pages(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(self.0.lock().unwrap()[Self::bytes(pages)].as_flattened());
        Ok(())
    }

    fn write(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap()[Self::bytes(pages)]
            .as_flattened_mut()
            .copy_from_slice(content);
        Ok(())
    }

    fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.0.lock().unwrap()[Self::bytes(pages)].fill([0; PAGE_BYTES]);
        Ok(())
    }

    fn starts_empty(&self) -> bool {
        true
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A source and a destination.
struct Pair {
    source: Vec<Page>,
    encoder: Encoder,
    decoder: Decoder,
    destination: Memory,
    /// Bytes that went over.
    payload: usize,
}

impl Pair {
    fn new(source: Vec<Page>, compression: Compression) -> Self {
        let pages = source.len() as u64;
        Self {
            encoder: Encoder::new(&[pages], 1, compression),
            decoder: Decoder::default(),
            destination: Memory::new(vec![[0; PAGE_BYTES]; source.len()]),
            source,
            payload: 0,
        }
    }

    fn send(&mut self, range: Range<u64>) -> PageCounts {
        self.send_ranges(slice::from_ref(&range))
    }

    fn send_ranges(&mut self, ranges: &[Range<u64>]) -> PageCounts {
        let pages = ranges.iter().cloned().flat_map(Memory::bytes);
        let content: Vec<u8> = pages.flat_map(|page| self.source[page]).collect();
        let mut batch = Batch::default();
        let counts = self.encoder.encode(0, ranges, &content, &mut batch);
        let payload: Vec<u8> = batch.payload(&content).flatten().copied().collect();
        self.payload += payload.len();
        let mut rest = payload.as_slice();
        for record in &batch.records {
            let (bytes, behind) = rest.split_at(record.bytes.try_into().unwrap());
            rest = behind;
            self.decoder.apply("memory", &self.destination, record, bytes).unwrap();
        }
        assert!(rest.is_empty());
        counts
    }

    fn send_all(&mut self) -> PageCounts {
        self.send(0..self.source.len() as u64)
    }

    fn assert_same(&self) {
        assert!(self.source == *self.destination.0.lock().unwrap());
    }
}

/// Bytes that do not shrink.
fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    page
}

/// Bytes that do.
fn text(seed: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    let words = format!("page {seed} of a guest, which has much to say ");
    page.iter_mut()
        .zip(words.bytes().cycle())
        .for_each(|(byte, from)| *byte = from);
    page
}

#[test]
fn on_a_wide_link_pages_are_zero_or_raw_whatever_was_sent_before() {
    let mut pair = Pair::new(vec![ZERO, text(1), noise(2), ZERO, ZERO, text(3)], Compression::Never);
    let expected = PageCounts {
        zero: 3,
        raw: 3,
        ..PageCounts::default()
    };
    for _ in 0..2 {
        assert_eq!(pair.send_all(), expected);
        pair.assert_same();
    }
    assert_eq!(pair.payload, 2 * 3 * PAGE_BYTES);
}

#[test]
fn consecutive_pages_make_one_record() {
    let mut pair = Pair::new(vec![noise(1); 9], Compression::Never);
    let mut batch = Batch::default();
    let content: Vec<u8> = pair.source[..6].as_flattened().to_vec();
    pair.encoder.encode(0, &[0..3, 3..4, 5..7], &content, &mut batch);
    let records: Vec<_> = batch
        .records
        .iter()
        .map(|record| (record.first, record.pages))
        .collect();
    assert_eq!(records, [(0, 4), (5, 2)]);
    assert_eq!(
        batch.pieces,
        [Piece::Content(0..4 * 4096), Piece::Content(4 * 4096..6 * 4096)]
    );
}

#[test]
fn on_a_narrow_link_pages_that_come_again_are_deltas_or_not_sent_at_all() {
    let source = (0..100).map(noise).collect();
    let mut pair = Pair::new(source, Compression::Always);
    assert_eq!(pair.send_all().raw, 100);
    for page in &mut pair.source[10..40] {
        page[77] ^= 1;
        page[4000] ^= 0x20;
    }
    pair.source[50] = noise(1000);
    pair.source[60] = ZERO;
    let before = pair.payload;
    let expected = PageCounts {
        zero: 1,
        unchanged: 68,
        delta: 30,
        raw: 1,
        ..PageCounts::default()
    };
    assert_eq!(pair.send_all(), expected);
    pair.assert_same();
    assert!(pair.payload - before < PAGE_BYTES + 30 * 16);
}

#[test]
fn on_a_narrow_link_what_shrinks_is_compressed() {
    let source = (0..200).map(text).collect();
    let mut pair = Pair::new(source, Compression::Always);
    assert_eq!(pair.send_all().compressed, 200);
    pair.assert_same();
    assert!(pair.payload < 200 * PAGE_BYTES / 10);
}

#[test]
fn data_that_does_not_shrink_is_mostly_left_alone_and_found_again_when_it_does() {
    let source: Vec<_> = (0..40 * RUN_PAGES as u64)
        .map(noise)
        .chain((0..40 * RUN_PAGES as u64).map(text))
        .collect();
    let mut pair = Pair::new(source, Compression::Always);
    let mut counts = PageCounts::default();
    for first in (0..pair.source.len() as u64).step_by(RUN_PAGES) {
        counts += pair.send(first..first + RUN_PAGES as u64);
    }
    pair.assert_same();
    assert!(counts.compressed >= 24 * RUN_PAGES as u64, "{counts:?}");
}

#[test]
fn a_page_that_was_sent_unremembered_is_not_sent_as_a_delta_to_what_was_before() {
    let source = vec![noise(1); 2];
    let mut pair = Pair::new(source, Compression::Always);
    pair.send_all();
    pair.source[0][9] ^= 1;
    pair.encoder.choice = Choice::new(Compression::Never);
    assert_eq!(pair.send(0..1).raw, 1);
    pair.source[0][9] ^= 2;
    pair.source[1][9] ^= 2;
    pair.encoder.choice = Choice::new(Compression::Always);
    let counts = pair.send_all();
    assert_eq!((counts.raw, counts.delta), (1, 1));
    pair.assert_same();
}

#[test]
fn after_the_switch_to_post_copy_every_page_is_sent_whole() {
    let mut pair = Pair::new(vec![noise(1), text(2)], Compression::Always);
    pair.send_all();
    pair.encoder.stop_deltas();
    pair.destination = Memory::new(vec![ZERO; 2]);
    pair.send_all();
    pair.assert_same();
    pair.destination = Memory::new(vec![ZERO; 2]);
    pair.send_all();
    pair.assert_same();
}

#[test]
fn under_a_limit_pages_are_remembered_and_compressed_from_the_first_batch_on() {
    let mut pair = Pair::new((0..64).map(text).collect(), Compression::Auto);
    pair.encoder.begin_round(1, Some(1000));
    assert_eq!(pair.send_all().compressed, 64);
    pair.assert_same();
    pair.encoder.begin_round(2, Some(1000));
    assert_eq!(pair.send_all().unchanged, 64);
    pair.source[5][100] ^= 1;
    pair.encoder.begin_round(3, None);
    assert_eq!(pair.send(5..6).raw, 1, "nothing is known of the link itself");
    pair.assert_same();
}

#[test]
fn pages_of_one_word_are_sent_as_that_word_on_every_link() {
    for compression in [Compression::Always, Compression::Auto] {
        let mut pair = Pair::new(vec![[0x5a; PAGE_BYTES]; 100], compression);
        assert_eq!(pair.send_all().compressed, 100);
        pair.assert_same();
        assert_eq!(pair.payload, 8);
        pair.source[7][9] = 1;
        let counts = pair.send_all();
        let is_remembered = compression == Compression::Always;
        assert_eq!(
            (counts.delta, counts.compressed, counts.raw),
            if is_remembered { (1, 0, 0) } else { (0, 100, 0) }
        );
        pair.assert_same();
    }
    let mut pair = Pair::new(vec![[0x5a; PAGE_BYTES]; 3], Compression::Never);
    assert_eq!(pair.send_all().raw, 3);
}

#[test]
fn other_patterns_are_sent_as_such_on_every_link() {
    let mut counting = ZERO;
    for (number, word) in (0u64..).zip(counting.as_chunks_mut().0) {
        *word = (number << 12).to_le_bytes();
    }
    for compression in [Compression::Always, Compression::Auto] {
        let mut pair = Pair::new(vec![counting; 100], compression);
        assert_eq!(pair.send_all().compressed, 100);
        assert!(pair.payload < 100 * 20);
        pair.assert_same();
    }
    let mut pair = Pair::new(vec![counting; 3], Compression::Never);
    assert_eq!(pair.send_all().raw, 3);
}

#[test]
fn records_that_no_encoder_makes_are_refused() {
    let image = Memory::new(vec![ZERO; 4]);
    let apply = |first, pages, encoding, bytes: &[u8]| {
        let record = Record {
            first,
            pages,
            encoding,
            bytes: bytes.len().try_into().unwrap(),
        };
        let error = Decoder::default().apply("memory", &image, &record, bytes).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        error.to_string()
    };
    assert!(apply(3, 2, Encoding::Zero, &[]).contains("pages 3..5 of image 'memory', which has 4"));
    apply(u64::MAX, 1, Encoding::Zero, &[]);
    assert!(apply(1, 1, Encoding::Zero, &[1]).contains("pages 1 to 1 of image 'memory': they are zero and have bytes"));
    apply(0, 1, Encoding::Raw, &[1; 4095]);
    apply(0, 2, Encoding::Raw, &[1; 4096]);
    apply(0, 1, Encoding::Delta, &[]);
    apply(0, 1, Encoding::Delta, &[0x80, 4, 9]);
    apply(0, 1, Encoding::Pattern, &[1]);
    apply(0, 1, Encoding::Fill, &[1; 7]);
    apply(0, 1, Encoding::Lz4, &[0x10]);
    apply(0, 1, Encoding::Zstd, b"no frame");
    let mut compressor = Compressor::default();
    for tool in [Tool::Lz4, Tool::Zstd] {
        let short = compressor.compress(tool, &[7; 4095]).unwrap().to_vec();
        assert!(apply(0, 1, tool.encoding(), &short).contains("4095 bytes came of it, not 4096"));
        let long = compressor.compress(tool, &[7; 4097]).unwrap().to_vec();
        apply(0, 1, tool.encoding(), &long);
    }
}

/// What happens to a page between two rounds.
fn change() -> impl Strategy<Value = (usize, Page)> {
    let page = prop_oneof![
        Just(ZERO),
        any::<u8>().prop_map(|byte| [byte; PAGE_BYTES]),
        any::<u64>().prop_map(noise),
        any::<u64>().prop_map(text),
        (0..3u64, 0..4096usize, any::<u8>()).prop_map(|(seed, place, byte)| {
            let mut page = noise(seed);
            page[place] = byte;
            page
        }),
    ];
    (0..150usize, page)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_changes_and_however_it_is_sent_the_destination_has_it(
        rounds in prop::collection::vec((prop::collection::vec(change(), 0..60), 0..3u8), 1..6),
    ) {
        let mut pair = Pair::new(vec![ZERO; 150], Compression::Auto);
        for (round, (changes, how)) in (1..).zip(rounds) {
            let mut dirty = crate::pages::PageBits::empty(150);
            for (page, content) in changes {
                pair.source[page] = content;
                dirty.insert(page as u64);
            }
            let compression = [Compression::Never, Compression::Always, Compression::Auto][usize::from(how)];
            pair.encoder.choice = Choice::new(compression);
            pair.encoder.begin_round(round, Some(1));
            let ranges: Vec<_> = dirty.ranges().collect();
            let counts = pair.send_ranges(&ranges);
            prop_assert_eq!(counts.total(), dirty.len());
            pair.assert_same();
        }
    }

    #[test]
    fn no_bytes_do_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        encoding in prop::sample::select(vec![
            Encoding::Delta, Encoding::Pattern, Encoding::Fill, Encoding::Lz4, Encoding::Zstd,
        ]),
        pages in 0..5u16,
        damage: usize,
    ) {
        let image = Memory::new(vec![ZERO; 5]);
        let mut decoder = Decoder::default();
        let mut apply = |bytes: &[u8]| {
            let record = Record { first: 0, pages, encoding, bytes: bytes.len().try_into().unwrap() };
            let _ = decoder.apply("memory", &image, &record, bytes);
        };
        apply(&bytes);
        let tool = if encoding == Encoding::Lz4 { Tool::Lz4 } else { Tool::Zstd };
        let content = text(1).repeat(usize::from(pages));
        let mut packed = Compressor::default().compress(tool, &content).unwrap().to_vec();
        let place = damage % packed.len().max(1);
        packed.iter_mut().skip(place).take(1).for_each(|byte| *byte ^= 0x55);
        apply(&packed);
    }
}
