//! Bytes that snapshots are read from: a file, a part of one, an object of a remote store.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;

/// Something that can be read anywhere, by several threads at a time.
pub(crate) trait Blob: fmt::Debug + Send + Sync {
    /// What messages call it.
    fn path(&self) -> &Path;

    /// Its length.
    fn bytes(&self) -> u64;

    /// Fills `buffer` from `offset` on; bytes that are not there are damage.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error>;

    /// The file of which it is the whole, if it is.
    fn file(&self) -> Option<&File>;

    /// How many threads should read at a time for reading to be fast: more than one where each waits for a network.
    fn useful_readers(&self) -> usize;
}

/// Reads all of `blob`, which must not have more than `max` bytes.
pub(crate) fn read_whole(blob: &dyn Blob, max: u64) -> Result<Vec<u8>, Error> {
    let bytes = usize::try_from(blob.bytes()).ok().filter(|_| blob.bytes() <= max);
    let bytes = bytes.ok_or_else(|| {
        let reason = format!("it has more than {max} bytes");
        let error = io::Error::new(io::ErrorKind::FileTooLarge, reason);
        Error::io("read it", blob.path())(error)
    })?;
    let mut content = vec![0; bytes];
    blob.read_at(&mut content, 0)?;
    Ok(content)
}

/// A file of this host.
#[derive(Debug)]
pub(crate) struct LocalFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl LocalFile {
    /// Opens the regular file at `path`, if there is any.
    pub fn open(path: PathBuf) -> Result<Option<Self>, Error> {
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_file() => {
                let file = File::open(&path).map_err(Error::io("open it", &path))?;
                let bytes = metadata.len();
                Ok(Some(Self { path, file, bytes }))
            }
            Ok(_) => {
                let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
                Err(Error::io("read it", &path)(error))
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(Error::io("examine it", &path)(error)),
        }
    }
}

impl Blob for LocalFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        match self.file.read_exact_at(buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ends_early(&self.path, offset)),
            other => other.map_err(Error::io("read it", &self.path)),
        }
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn useful_readers(&self) -> usize {
        1
    }
}

/// A part of something larger.
#[derive(Debug)]
pub(crate) struct Part {
    /// What messages call it.
    pub path: PathBuf,
    /// What it is a part of.
    pub whole: Arc<dyn Blob>,
    /// Where it begins there.
    pub start: u64,
    /// Its length; it ends within the whole.
    pub bytes: u64,
}

impl Blob for Part {
    fn path(&self) -> &Path {
        &self.path
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        check_within(self, buffer.len(), offset)?;
        self.whole.read_at(buffer, self.start + offset)
    }

    fn file(&self) -> Option<&File> {
        None
    }

    fn useful_readers(&self) -> usize {
        self.whole.useful_readers()
    }
}

/// Refuses to read `length` bytes from `offset` on that `blob` does not have.
pub(crate) fn check_within(blob: &dyn Blob, length: usize, offset: u64) -> Result<(), Error> {
    match offset.checked_add(length as u64) {
        Some(end) if end <= blob.bytes() => Ok(()),
        _ => Err(ends_early(blob.path(), offset)),
    }
}

/// What `path` should have from `offset` on is not there.
pub(crate) fn ends_early(path: &Path, offset: u64) -> Error {
    Error::damaged(path, offset, "the file ends early")
}
