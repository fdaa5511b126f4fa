//! The compressors: lz4 for links that are nearly as fast as it, zstd for slower ones.

use lz4_flex::block::{self, CompressTable};
use zstd::bulk;

/// zstd's level: that at which it is fastest without giving up its ratio.
const ZSTD_LEVEL: i32 = 1;

/// A compressor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Blocks of lz4.
    Lz4,
    /// Frames of zstd.
    Zstd,
}

/// Compressors, and the memory they work in.
pub struct Compressor {
    lz4: CompressTable,
    /// Made when it is used first.
    zstd: Option<bulk::Compressor<'static>>,
    out: Vec<u8>,
}

/// Their counterparts.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<bulk::Decompressor<'static>>,
    out: Vec<u8>,
}

impl Default for Compressor {
    fn default() -> Self {
        Self {
            lz4: CompressTable::large(),
            zstd: None,
            out: Vec::new(),
        }
    }
}

impl Compressor {
    /// `content` as `tool` compresses it; nothing if it cannot.
    pub fn compress(&mut self, tool: Tool, content: &[u8]) -> Option<&[u8]> {
        let room = block::get_maximum_output_size(content.len());
        if self.out.len() < room {
            self.out.resize(room, 0);
        }
        let len = match tool {
            Tool::Lz4 => block::compress_into_with_table(content, &mut self.out, &mut self.lz4).ok()?,
            Tool::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                self.zstd
                    .as_mut()?
                    .compress_to_buffer(content, &mut self.out[..])
                    .ok()?
            }
        };
        Some(&self.out[..len])
    }
}

impl Decompressor {
    /// What `tool` made `packed` of, which has to be `bytes` long.
    ///
    /// # Errors
    /// It made it of something else, or of nothing.
    pub fn decompress(&mut self, tool: Tool, packed: &[u8], bytes: usize) -> Result<&[u8], String> {
        if self.out.len() < bytes {
            self.out.resize(bytes, 0);
        }
        let out = &mut self.out[..bytes];
        let len = match tool {
            Tool::Lz4 => block::decompress_into(packed, out).map_err(|error| error.to_string())?,
            Tool::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(bulk::Decompressor::new().map_err(|error| error.to_string())?),
                };
                zstd.decompress_to_buffer(packed, out)
                    .map_err(|error| error.to_string())?
            }
        };
        if len != bytes {
            return Err(format!("{len} bytes came of it, not {bytes}"));
        }
        Ok(&self.out[..bytes])
    }
}
