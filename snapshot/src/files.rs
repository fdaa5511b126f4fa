//! What the writer does to a file system, behind a trait so that tests can fail, fill or cut it off at every step.
//!
//! Reading does not go through it: a file that reads wrongly is made by writing it wrongly.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use crate::error::Error;

/// Where new files can be put: a file system, or something that is filled from front to back.
pub trait NewFiles: Send + Sync {
    /// Creates an empty file that only its owner may read.
    ///
    /// # Errors
    /// It exists, or the system refuses.
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>>;
}

/// Operations on a file system, each of which can be the last.
pub trait Files: NewFiles {
    /// Creates a directory that only its owner may enter.
    ///
    /// # Errors
    /// It exists, or the system refuses.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the entries of a directory permanent.
    ///
    /// # Errors
    /// The system refuses.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Gives a file or directory another name, at once and as a whole; a file replaces one that has this name.
    ///
    /// # Errors
    /// The name of a directory is taken by something that is not an empty directory, or the system refuses.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file, or a directory with all it holds.
    ///
    /// # Errors
    /// The system refuses.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// A file being written.
pub trait NewFile: Send {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The system refuses; part of them may have been written.
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes what was written permanent.
    ///
    /// # Errors
    /// The system refuses.
    fn sync(&mut self) -> io::Result<()>;
}

/// The file systems of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostFiles;

impl NewFiles for HostFiles {
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        Ok(Box::new(file))
    }
}

impl Files for HostFiles {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if path.symlink_metadata()?.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        }
    }
}

impl NewFile for File {
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Writes a whole file and makes its content permanent.
pub(crate) fn write_whole(files: &dyn NewFiles, path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = files.create(path).map_err(Error::io("create it", path))?;
    file.write_all_at(bytes, 0).map_err(Error::io("write it", path))?;
    file.sync().map_err(Error::io("sync it", path))
}

/// Reads a whole regular file of at most `max` bytes.
pub(crate) fn read_bounded(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut content = Vec::new();
    File::open(path)?.take(max + 1).read_to_end(&mut content)?;
    if content.len() as u64 > max {
        let reason = format!("it has more than {max} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
    }
    Ok(content)
}
