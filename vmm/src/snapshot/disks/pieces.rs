//! The pieces of a disk that are to be read, in the order they are, and whoever waits for that.
//!
//! A disk is read under the gate: each piece is the guest's again when it is read. A whole disk on a file system that can
//! make a copy that shares its blocks (btrfs, XFS and others; `ioctl_ficlone(2)`) is read from such a copy, and all of it
//! is the guest's again at once. The copy goes beside the image, without a name, and not into the snapshot: an image of
//! a snapshot has the checksums of its chunks, so that all is read anyway, and may be compressed, or on another file
//! system.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use cutover_devices::virtio::block::chunks::CHUNK_SIZE;
use cutover_devices::virtio::block::gate::{COPY_BYTES, Copier};
use rustix::fs::ioctl_ficlone;

/// What is left to be read, and of what.
pub struct Pieces {
    file: Arc<File>,
    left: Left,
}

enum Left {
    /// What the gate holds.
    Held(Copier),
    /// All from one place to another, of a copy that nobody writes.
    Copied(Range<u64>),
}

impl Pieces {
    /// What `copier` holds of `file`.
    pub fn held(file: Arc<File>, copier: Copier) -> Self {
        Self {
            file,
            left: Left::Held(copier),
        }
    }

    /// Puts a copy in the place of the file, `size` bytes all of which are to be read, if one can be made that shares its
    /// blocks.
    pub fn share_blocks(&mut self, size: u64) {
        match share_blocks(&self.file) {
            Ok(copy) => {
                *self = Self {
                    file: Arc::new(copy),
                    left: Left::Copied(0..size),
                }
            }
            Err(error) => tracing::debug!(%error, "a disk is saved without sharing its blocks"),
        }
    }

    /// Where to read.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes that are left, in whole chunks.
    pub fn bytes_left(&self) -> u64 {
        match &self.left {
            Left::Held(copier) => copier.bytes_left(),
            Left::Copied(left) => in_chunks(left),
        }
    }

    /// What to read next, [`COPY_BYTES`] or fewer; nothing when all is read.
    pub fn next_piece(&mut self) -> Option<Range<u64>> {
        match &mut self.left {
            Left::Held(copier) => copier.next_chunks(),
            Left::Copied(left) if left.is_empty() => None,
            Left::Copied(left) => Some(left.start..left.end.min(left.start + COPY_BYTES)),
        }
    }

    /// `bytes` are read, or need not be, from the start of the last piece on; returns how many of them were left, in
    /// whole chunks.
    pub fn is_read(&mut self, bytes: &Range<u64>) -> u64 {
        match &mut self.left {
            Left::Held(copier) => copier.release(bytes),
            Left::Copied(left) => {
                left.start = bytes.end;
                in_chunks(bytes)
            }
        }
    }
}

fn in_chunks(bytes: &Range<u64>) -> u64 {
    (bytes.end - bytes.start).next_multiple_of(CHUNK_SIZE)
}

/// A copy of `file` as it is, without a name, that shares its blocks.
fn share_blocks(file: &File) -> io::Result<File> {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let directory = path.parent().ok_or(io::ErrorKind::NotFound)?;
    let copy = tempfile::tempfile_in(directory)?;
    ioctl_ficlone(&copy, file)?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use cutover_devices::OnThread;
    use cutover_devices::virtio::block::Block;
    use cutover_devices::virtio::block::chunks::ChunkSet;
    use cutover_devices::virtio::block::gate::Holds;
    use cutover_snapshot::spec::DiskSpec;

    use super::*;

    const SIZE: u64 = 9 * CHUNK_SIZE + 512;

    /// Reads what is left.
    fn read(mut pieces: Pieces) -> Vec<u8> {
        let (mut content, mut total) = (Vec::new(), pieces.bytes_left());
        while let Some(piece) = pieces.next_piece() {
            assert_eq!(piece.start, content.len() as u64);
            let len = usize::try_from(piece.end - piece.start).unwrap();
            content.resize(content.len() + len, 0);
            let start = content.len() - len;
            pieces.file().read_exact_at(&mut content[start..], piece.start).unwrap();
            total -= pieces.is_read(&piece);
            assert_eq!(total, pieces.bytes_left());
        }
        content
    }

    #[test]
    fn a_disk_is_read_as_it_was_whether_its_blocks_are_shared_or_not() {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..SIZE).map(|byte| (byte / 512).to_le_bytes()[0]).collect();
        image.write_all(&content).unwrap();
        let spec: DiskSpec = serde_json::from_value(serde_json::json!({ "path": image.path() })).unwrap();
        let unconfined: OnThread = Arc::new(|| {});
        let mut block = Block::open(&spec, &unconfined).unwrap();
        for share in [false, true] {
            let copier = block.hold(Holds::Writes, ChunkSet::all(SIZE)).unwrap();
            let mut pieces = Pieces::held(block.disk().file().clone(), copier);
            if share {
                pieces.share_blocks(SIZE);
            }
            if matches!(pieces.left, Left::Copied(_)) {
                // The guest may write now, and somebody else may hold the disk.
                image.as_file().write_all_at(&[0xff; 512], 0).unwrap();
                drop(block.hold(Holds::Writes, ChunkSet::all(SIZE)).unwrap());
            }
            assert!(read(pieces) == content);
        }
    }
}
