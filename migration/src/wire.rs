//! Messages as bytes.
//!
//! ```text
//!  ┌───────┬────────┬──────────┐┌─────────────────────
//!  │ magic │ length │ checksum ││ the message, postcard
//!  │ u32   │ u32    │ u64      ││
//!  └───────┴────────┴──────────┘└─────────────────────
//! ```
//! Little-endian. The checksum is XXH3-64 of the length and the message. What a peer says of the length is checked
//! before, and memory is taken as bytes arrive, so that nobody makes the other side allocate what he does not send.

use std::io::{self, Read};

use twox_hash::XxHash3_64;

use crate::error::Error;
use crate::message::Message;

/// Bytes before a message.
pub const HEADER_BYTES: usize = 16;
/// Most bytes of a message other than [`State`](crate::message::ToDestination::State).
pub const MESSAGE_BYTES_MAX: usize = 2 << 20;

const MAGIC: [u8; 4] = *b"CoMg";
/// Memory that is taken for a message before any of it has arrived.
const FIRST_BYTES: usize = 64 << 10;

/// The bytes of `message`.
///
/// # Errors
/// It has no encoding, or is too long.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, Error> {
    let invalid = |reason: String| Error::Invalid {
        what: message.name(),
        reason,
    };
    let body = postcard::to_stdvec(message).map_err(|error| invalid(error.to_string()))?;
    let length = u32::try_from(body.len()).map_err(|_| invalid(format!("{} bytes are too long", body.len())))?;
    let mut wire = Vec::with_capacity(HEADER_BYTES + body.len());
    wire.extend(MAGIC);
    wire.extend(length.to_le_bytes());
    wire.extend(checksum(length, &body).to_le_bytes());
    wire.extend(body);
    Ok(wire)
}

/// Reads a message of at most `bytes_max` bytes; `failed` is what it means that reading fails.
///
/// # Errors
/// It does not come, is not one, or is not as it was sent.
pub fn decode<M: Message>(
    from: &mut impl Read,
    bytes_max: usize,
    failed: impl Fn(io::Error) -> Error,
) -> Result<M, Error> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header).map_err(&failed)?;
    let ([magic, length, low, high], []) = header.as_chunks::<4>() else {
        unreachable!("a header is four times four bytes");
    };
    if *magic != MAGIC {
        let (first, _) = header.split_first_chunk().expect("a header has more than 8 bytes");
        return Err(Error::NotAPeer(*first));
    }
    let length = u32::from_le_bytes(*length);
    if length as usize > bytes_max {
        return Err(invalid(format!("{length} bytes are more than {bytes_max}")));
    }
    let mut body = Vec::with_capacity(FIRST_BYTES.min(length as usize));
    let read = from.take(u64::from(length)).read_to_end(&mut body).map_err(&failed)?;
    if read < length as usize {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    let expected = u64::from(u32::from_le_bytes(*low)) | u64::from(u32::from_le_bytes(*high)) << u32::BITS;
    let found = checksum(length, &body);
    if found != expected {
        return Err(Error::Damaged {
            what: "a message".to_owned(),
            expected,
            found,
        });
    }
    match postcard::take_from_bytes(&body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(invalid(format!("it goes on for {} bytes after its end", rest.len()))),
        Err(error) => Err(invalid(error.to_string())),
    }
}

fn checksum(length: u32, body: &[u8]) -> u64 {
    // The length as the seed: one pass, and a message cut short has another checksum.
    XxHash3_64::oneshot_with_seed(u64::from(length), body)
}

fn invalid(reason: String) -> Error {
    Error::Invalid {
        what: "a message",
        reason,
    }
}
