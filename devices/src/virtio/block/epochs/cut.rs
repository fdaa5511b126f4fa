//! A disk as it was at a cut, for whoever sends it elsewhere while the guest goes on writing.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::Shared;
use super::log::Before;
use crate::virtio::DeviceError;
use crate::virtio::block::chunks::{CHUNK_SIZE, ChunkSet};

/// What an epoch wrote, as it was at the cut that ended it.
pub struct DiskCut {
    shared: Arc<Shared>,
    image: Arc<File>,
    /// Which stretch of epochs without a step back the cut belongs to.
    stretch: u64,
    cut: u64,
    written: ChunkSet,
}

impl DiskCut {
    pub(super) fn new(shared: Arc<Shared>, image: Arc<File>, stretch: u64, cut: u64, written: ChunkSet) -> Self {
        Self {
            shared,
            image,
            stretch,
            cut,
            written,
        }
    }

    /// The chunks that were written in the epoch.
    pub fn written(&self) -> &ChunkSet {
        &self.written
    }

    /// Reads what the disk had at the cut from byte `offset` on, be it written in the epoch or not.
    ///
    /// # Errors
    /// The host cannot read the image; or the cut is none any more, as it was invalidated, the disk went back to one
    /// before it, or forward beyond it. What is in `to` is worth nothing then.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), DeviceError> {
        let mut rest = offset..offset.saturating_add(to.len() as u64);
        if rest.end > self.written.disk_size() {
            return Err(self.unreadable(offset, io::ErrorKind::UnexpectedEof.into()));
        }
        let mut to = to;
        while !rest.is_empty() {
            let chunk = rest.start / CHUNK_SIZE;
            let end = rest.end.min((chunk + 1) * CHUNK_SIZE);
            let piece = rest.start..end;
            let (now, later) = to.split_at_mut(usize::try_from(end - rest.start).expect("at most a chunk"));
            self.read_of_chunk(chunk, &piece, now)?;
            (rest.start, to) = (end, later);
        }
        Ok(())
    }

    /// Reads `bytes`, which are of `chunk`.
    fn read_of_chunk(&self, chunk: u64, bytes: &Range<u64>, to: &mut [u8]) -> Result<(), DeviceError> {
        if self.read_kept(chunk, bytes, to)? {
            return Ok(());
        }
        self.image
            .read_exact_at(to, bytes.start)
            .map_err(|source| self.unreadable(bytes.start, source))?;
        // What the guest has begun to write meanwhile was kept before.
        self.read_kept(chunk, bytes, to)?;
        Ok(())
    }

    /// Reads what a log has of it; false if there is nothing.
    fn read_kept(&self, chunk: u64, bytes: &Range<u64>, to: &mut [u8]) -> Result<bool, DeviceError> {
        let start = usize::try_from(bytes.start % CHUNK_SIZE).expect("less than a chunk");
        let read = self
            .shared
            .look_at(self.stretch, self.cut, chunk, |before| match before {
                Before::Zeroes => {
                    to.fill(0);
                    Ok(())
                }
                Before::Bytes(content) => match content.get(start..start + to.len()) {
                    Some(content) => {
                        to.copy_from_slice(content);
                        Ok(())
                    }
                    None => Err(io::ErrorKind::UnexpectedEof.into()),
                },
                Before::Unreadable(reason) => Err(io::Error::other(reason.clone())),
            })?;
        match read {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(source)) => Err(self.unreadable(bytes.start, source)),
        }
    }

    fn unreadable(&self, offset: u64, source: io::Error) -> DeviceError {
        DeviceError::DiskCutUnreadable {
            cut: self.cut,
            offset,
            source,
        }
    }
}
