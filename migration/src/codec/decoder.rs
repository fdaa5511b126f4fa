//! The receiving side: records of a batch in, pages out.

use std::io;

use super::compressor::{Decompressor, Tool};
use super::{Page, delta, fill, pattern};
use crate::batch::{Encoding, Record};
use crate::error::Error;
use crate::pages::PAGE_BYTES;
use crate::vm::Image;

/// The decoder of one stream.
#[derive(Default)]
pub struct Decoder {
    decompressor: Decompressor,
    /// Pages that deltas are applied to.
    content: Vec<u8>,
}

impl Decoder {
    /// Has the pages of `record` be what `bytes` say, in `image`, whose name is `name`.
    ///
    /// # Errors
    /// The bytes are none that an encoder makes, or the image refuses. Some of the pages may be written.
    pub fn apply(&mut self, name: &str, image: &dyn Image, record: &Record, bytes: &[u8]) -> Result<(), Error> {
        let pages = record.range();
        if pages.end > image.pages() {
            let reason = format!("pages {pages:?} of image '{name}', which has {}", image.pages());
            return Err(invalid(reason));
        }
        let failed = |action| {
            move |source: io::Error| Error::Pages {
                action,
                image: name.to_owned(),
                first: record.first,
                last: record.range().end.saturating_sub(1),
                source,
            }
        };
        let malformed = |reason: &str| {
            let last = record.range().end.saturating_sub(1);
            invalid(format!("pages {} to {last} of image '{name}': {reason}", record.first))
        };
        let content_bytes = usize::from(record.pages) * PAGE_BYTES;
        let content = match record.encoding {
            Encoding::Zero if bytes.is_empty() => return image.zero(pages).map_err(failed("clear")),
            Encoding::Zero => return Err(malformed("they are zero and have bytes")),
            Encoding::Raw if bytes.len() == content_bytes => bytes,
            Encoding::Raw => return Err(malformed(&format!("they have {} bytes", bytes.len()))),
            Encoding::Lz4 => self
                .decompress(Tool::Lz4, bytes, content_bytes)
                .map_err(|reason| malformed(&reason))?,
            Encoding::Zstd => self
                .decompress(Tool::Zstd, bytes, content_bytes)
                .map_err(|reason| malformed(&reason))?,
            Encoding::Fill => {
                let word = bytes.try_into().map_err(|_| malformed("not one word"))?;
                let content = self.room(content_bytes);
                fill::fill(content, word);
                content
            }
            Encoding::Delta => {
                let content = self.room(content_bytes);
                image.read(pages.clone(), content).map_err(failed("read"))?;
                each(bytes, content, delta::apply).map_err(|delta::Malformed| malformed("not a delta"))?;
                content
            }
            Encoding::Pattern => {
                let content = self.room(content_bytes);
                each(bytes, content, pattern::apply).map_err(|delta::Malformed| malformed("not a pattern"))?;
                content
            }
        };
        image.write(pages, content).map_err(failed("write"))
    }

    fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.content.len() < bytes {
            self.content.resize(bytes, 0);
        }
        &mut self.content[..bytes]
    }

    fn decompress(&mut self, tool: Tool, packed: &[u8], bytes: usize) -> Result<&[u8], String> {
        self.decompressor
            .decompress(tool, packed, bytes)
            .map_err(|reason| format!("{tool:?}: {reason}"))
    }
}

/// Applies to each page of `content` what it takes off the front of `bytes`, which is all there is.
fn each(
    mut bytes: &[u8],
    content: &mut [u8],
    apply: impl Fn(&mut &[u8], &mut Page) -> Result<(), delta::Malformed>,
) -> Result<(), delta::Malformed> {
    for page in content.as_chunks_mut().0 {
        apply(&mut bytes, page)?;
    }
    if bytes.is_empty() {
        Ok(())
    } else {
        Err(delta::Malformed)
    }
}

fn invalid(reason: String) -> Error {
    Error::Invalid {
        what: "a batch of pages",
        reason,
    }
}
