//! Messages as bytes.
//!
//! ```text
//!  ┌───────┬────────┬─────┬─────┐┌───────────────────────
//!  │ magic │ length │ sum │ sum ││ the message, postcard
//!  │ u32   │ u32    │ u64 │ u64 ││
//!  └───────┴────────┴──│──┴──│──┘└───────────────────────
//!   ◄── of all this ─────────┘    ◄── the first sum is of this
//! ```
//! Little-endian; sums are XXH3-64. The header has its own, so that a damaged length is not believed. What a peer says
//! of the length is checked before, and memory is taken as bytes arrive, so that nobody makes the other side allocate
//! what he does not send.

use std::io::{self, Read};

use twox_hash::XxHash3_64;

use crate::error::Error;
use crate::message::Message;

/// Bytes before a message.
pub const HEADER_BYTES: usize = 24;
/// Most bytes of a message other than [`State`](crate::message::ToDestination::State).
pub const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// What a message begins with.
pub const MAGIC: u32 = u32::from_le_bytes(*b"CoMg");
/// Memory that is taken for a message before any of it has arrived.
const FIRST_BYTES: usize = 4 << 10;

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
    wire.extend(MAGIC.to_le_bytes());
    wire.extend(length.to_le_bytes());
    wire.extend(XxHash3_64::oneshot(&body).to_le_bytes());
    wire.extend(XxHash3_64::oneshot(&wire).to_le_bytes());
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
    let ([first, body_sum, header_sum], []) = header.as_chunks::<8>() else {
        unreachable!("a header is three times eight bytes");
    };
    let opening = u64::from_le_bytes(*first);
    let (magic, length) = (opening & u64::from(u32::MAX), opening >> u32::BITS);
    if magic != u64::from(MAGIC) {
        return Err(Error::NotAPeer(*first));
    }
    check_sum("the header of a message", &header[..HEADER_BYTES - 8], *header_sum)?;
    if length > bytes_max as u64 {
        return Err(invalid(format!("{length} bytes are more than {bytes_max}")));
    }
    let mut body = Vec::with_capacity(FIRST_BYTES);
    let read = from.take(length).read_to_end(&mut body).map_err(&failed)?;
    if (read as u64) < length {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    check_sum("a message", &body, *body_sum)?;
    match postcard::take_from_bytes(&body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(invalid(format!("it goes on for {} bytes after its end", rest.len()))),
        Err(error) => Err(invalid(error.to_string())),
    }
}

fn check_sum(what: &str, bytes: &[u8], expected: [u8; 8]) -> Result<(), Error> {
    let (found, expected) = (XxHash3_64::oneshot(bytes), u64::from_le_bytes(expected));
    if found != expected {
        return Err(Error::Damaged {
            what: what.to_owned(),
            expected,
            found,
        });
    }
    Ok(())
}

fn invalid(reason: String) -> Error {
    Error::Invalid {
        what: "a message",
        reason,
    }
}
