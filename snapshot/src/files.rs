//! What the writer does to a file system, behind a trait so that tests can fail, fill or cut it off at every step.
//!
//! Reading does not go through it: a file that reads wrongly is made by writing it wrongly.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use uuid::Uuid;

use crate::error::Error;
use crate::store::PARTIAL;

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

    /// Gives each of two files or directories the name of the other, at once.
    ///
    /// # Errors
    /// The file system cannot do that, or the system refuses.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()>;

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

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
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

/// The directory in which the file at `path` is.
fn parent_dir(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// A name for what is being written in `dir`: what is left of it is removed when the store is [pruned](crate::prune).
fn partial(dir: &Path) -> PathBuf {
    dir.join(format!("{PARTIAL}{}", Uuid::new_v4()))
}

/// Has `write` write a file beside `path`, and then gives it that name: it is there as a whole or not at all.
pub(crate) fn publish(
    files: &dyn Files,
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<(), Error> {
    let dir = parent_dir(path);
    let partial = partial(&dir);
    let published = write(&partial).and_then(|()| {
        let renamed = files.rename(&partial, path);
        renamed.map_err(Error::io("rename the finished file to it", path))
    });
    if let Err(error) = published {
        // The reason for giving up is what the caller is told.
        let _ = files.remove(&partial);
        return Err(error);
    }
    files.sync_dir(&dir).map_err(Error::io("sync it", &dir))
}
