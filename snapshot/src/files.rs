//! What the writer does to a file system, behind a trait so that tests can fail, fill or cut it off at every step.
//!
//! Reading does not go through it: a file that reads wrongly is made by writing it wrongly.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

/// Operations on a file system, each of which can be the last.
pub trait Files: Send + Sync {
    /// Creates a directory that only its owner may enter.
    ///
    /// # Errors
    /// It exists, or the system refuses.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates an empty file that only its owner may read.
    ///
    /// # Errors
    /// It exists, or the system refuses.
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>>;

    /// Makes the entries of a directory permanent.
    ///
    /// # Errors
    /// The system refuses.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Gives a directory another name, at once and as a whole.
    ///
    /// # Errors
    /// The name is taken by something that is not an empty directory, or the system refuses.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a directory with all it holds.
    ///
    /// # Errors
    /// The system refuses.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
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

impl Files for HostFiles {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        Ok(Box::new(file))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
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
