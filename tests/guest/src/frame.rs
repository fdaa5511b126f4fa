//! Messages framed on a serial line that also carries the kernel's console output.
//!
//! ```text
//! magic (2) | length of the payload (4, little endian) | payload | CRC-32 of length and payload (4, little endian)
//! ```
//! The kernel may print at any moment, so a frame can be cut in two by a line of text. The checksum detects it; the
//! reader then reports the damage, takes the bytes for console text and looks for the next magic behind them. A text
//! inside the length field makes it larger than [`PAYLOAD_MAX`] (its top byte becomes a printed character), so a
//! damaged length never makes the reader wait for bytes that do not come.

use std::io::{self, Write};

/// Most bytes one frame carries.
pub const PAYLOAD_MAX: usize = 160 << 10;

/// Two bytes that never follow each other in UTF-8 text.
const MAGIC: [u8; 2] = [0x16, 0xc7];
const HEADER_LEN: usize = MAGIC.len() + 4;
const CHECKSUM_LEN: usize = 4;

/// What came over the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// Bytes outside any frame: console output.
    Text(Vec<u8>),
    /// The payload of an undamaged frame.
    Payload(Vec<u8>),
    /// A frame began here, and its checksum or length is wrong.
    Damage,
}

/// Writes `payload` as one frame.
///
/// # Errors
/// The payload is longer than [`PAYLOAD_MAX`], or the line fails.
pub fn write(line: &mut impl Write, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= PAYLOAD_MAX)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "payload too long for a frame"))?;
    let mut frame = Vec::with_capacity(HEADER_LEN + payload.len() + CHECKSUM_LEN);
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    let checksum = crc32fast::hash(&frame[MAGIC.len()..]);
    frame.extend_from_slice(&checksum.to_le_bytes());
    line.write_all(&frame)
}

/// Takes a line's bytes apart into text and frames.
#[derive(Debug, Default)]
pub struct Reader {
    pending: Vec<u8>,
}

impl Reader {
    /// Adds bytes that came over the line.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next item, or none until more bytes come.
    pub fn next_item(&mut self) -> Option<Item> {
        let text_len = self.text_len();
        if text_len > 0 {
            return Some(Item::Text(self.pending.drain(..text_len).collect()));
        }
        let header = self.pending.get(MAGIC.len()..HEADER_LEN)?;
        let length = u32::from_le_bytes(header.try_into().expect("the slice is four bytes long"));
        let Some(length) = usize::try_from(length).ok().filter(|&length| length <= PAYLOAD_MAX) else {
            return Some(self.damage());
        };
        let end = HEADER_LEN + length;
        let checksum = self.pending.get(end..end + CHECKSUM_LEN)?;
        if checksum != crc32fast::hash(&self.pending[MAGIC.len()..end]).to_le_bytes() {
            return Some(self.damage());
        }
        let payload = self.pending[HEADER_LEN..end].to_vec();
        self.pending.drain(..end + CHECKSUM_LEN);
        Some(Item::Payload(payload))
    }

    /// How many pending bytes are certainly not part of a frame.
    fn text_len(&self) -> usize {
        let start = self.pending.windows(MAGIC.len()).position(|bytes| bytes == MAGIC);
        start.unwrap_or_else(|| self.pending.len() - usize::from(self.pending.last() == Some(&MAGIC[0])))
    }

    /// Drops the magic, so that what follows it is looked at afresh.
    fn damage(&mut self) -> Item {
        self.pending.drain(..MAGIC.len());
        Item::Damage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(payload: &[u8]) -> Vec<u8> {
        let mut line = Vec::new();
        write(&mut line, payload).expect("a vector takes every byte");
        line
    }

    fn items(line: &[u8], chunk: usize) -> Vec<Item> {
        let mut reader = Reader::default();
        let mut items: Vec<Item> = Vec::new();
        for bytes in line.chunks(chunk) {
            reader.push(bytes);
            while let Some(item) = reader.next_item() {
                match (items.last_mut(), item) {
                    (Some(Item::Text(text)), Item::Text(more)) => text.extend(more),
                    (_, item) => items.push(item),
                }
            }
        }
        items
    }

    #[test]
    fn text_and_frames_are_told_apart_however_the_bytes_arrive() {
        let line = [b"[ 0.1] booting\r\n".as_slice(), &framed(b"one"), &framed(b""), b"done"].concat();
        for chunk in 1..=line.len() {
            assert_eq!(
                items(&line, chunk),
                [
                    Item::Text(b"[ 0.1] booting\r\n".to_vec()),
                    Item::Payload(b"one".to_vec()),
                    Item::Payload(Vec::new()),
                    Item::Text(b"done".to_vec()),
                ],
                "in pieces of {chunk}"
            );
        }
    }

    #[test]
    fn a_kernel_message_anywhere_inside_a_frame_is_reported_and_the_next_frame_is_read() {
        let frame = framed(b"the answer");
        for cut in 2..frame.len() {
            let line = [&frame[..cut], b"\r\n[ 1.0] noise\r\n", &frame[cut..], &framed(b"again")].concat();
            let items = items(&line, 7);
            assert!(items.contains(&Item::Damage), "cut at {cut}: {items:?}");
            let payloads: Vec<_> = items.iter().filter(|item| matches!(item, Item::Payload(_))).collect();
            assert_eq!(payloads, [&Item::Payload(b"again".to_vec())], "cut at {cut}");
        }
    }

    #[test]
    fn a_flipped_bit_is_reported() {
        let frame = framed(b"payload");
        for position in 16..frame.len() * 8 {
            let mut line = frame.clone();
            line[position / 8] ^= 1 << (position % 8);
            line.extend(framed(&[0; 256]));
            let items = items(&line, 64);
            assert!(
                !items.contains(&Item::Payload(b"payload".to_vec())),
                "bit {position}: {items:?}"
            );
        }
    }

    #[test]
    fn a_payload_beyond_the_limit_is_refused() {
        let error = write(&mut Vec::new(), &vec![0; PAYLOAD_MAX + 1]).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
