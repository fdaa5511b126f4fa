//! A store: a directory of snapshots, each of which is a directory in it.
//!
//! ```text
//!  STORE/ ── base/         manifest.json  state.bin  memory.pages  disk-root.pages
//!         ├─ monday/       …, its manifest names base as its parent
//!         ├─ .partial-ID/  one that is being written, or whose writer died
//!         └─ .deleted-ID/  one that is being deleted
//! ```
//!
//! Snapshots appear and disappear by one `rename`. Who writes holds a shared lock on the store's directory, who deletes
//! an exclusive one; readers need none, as what they have open stays readable.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;

use crate::error::Error;
use crate::files::{Files, HostFiles};
use crate::manifest::Sealed;
use crate::remote::{Access, RemoteDir, Url};
use crate::source::{self, Directory, Source};
use crate::writer::{Draft, SnapshotWriter};

/// Most bytes of a snapshot's name.
pub const NAME_MAX: usize = 64;
/// Most snapshots of a store.
pub const SNAPSHOTS_MAX: usize = 1 << 16;
/// What the name of a directory begins with that is not yet a snapshot.
pub(crate) const PARTIAL: &str = ".partial-";
/// What the name of a directory begins with that is no longer a snapshot.
pub(crate) const DELETED: &str = ".deleted-";

/// A directory of snapshots.
#[derive(Clone)]
pub struct Store {
    pub(crate) dir: PathBuf,
    pub(crate) files: Arc<dyn Files>,
}

/// A snapshot: where it is, and what its manifest says.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its directory.
    pub path: PathBuf,
    /// Its name, the last part of that.
    pub name: String,
    /// Its manifest.
    pub sealed: Sealed,
}

impl Snapshot {
    /// Its id.
    pub fn id(&self) -> Uuid {
        self.sealed.manifest.id
    }
}

/// Checks what a snapshot is to be called.
///
/// # Errors
/// Something else than 1 to [`NAME_MAX`] letters, digits, `-`, `_` and `.`, or a name that begins with `.`.
pub fn check_name(name: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(Error::Name(name.to_owned()));
    }
    Ok(())
}

/// What there is under one name of a store.
#[derive(Debug)]
pub struct Listed {
    /// The name.
    pub name: String,
    /// The snapshot, or what is wrong with it.
    pub snapshot: Result<Snapshot, Error>,
}

/// All snapshots of the store at `path`: a directory, or a place in a bucket (`s3://BUCKET/PATH`) that is reached as
/// `access` says. Those come first that cannot be read, then the oldest.
///
/// # Errors
/// The store cannot be read.
pub fn list_all(path: &Path, access: &Access) -> Result<Vec<Listed>, Error> {
    match Url::parse(path) {
        Some(url) => survey(&RemoteDir::new(url?, access)?),
        None => survey(&Store::open(path)?.source()),
    }
}

/// All snapshots of `source`, those that cannot be read first, then the oldest.
fn survey(source: &dyn Source) -> Result<Vec<Listed>, Error> {
    let mut snapshots = Vec::new();
    for name in source.names()? {
        match source::snapshot(source, &name) {
            // Something else, or deleted meanwhile.
            Err(Error::Absent(_)) => {}
            snapshot => snapshots.push(Listed { name, snapshot }),
        }
    }
    snapshots.sort_by_cached_key(|Listed { name, snapshot }| {
        let created = snapshot.as_ref().ok().map(|found| found.sealed.manifest.created);
        (created, name.clone())
    });
    Ok(snapshots)
}

impl Store {
    /// The store in directory `dir`.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::with_files(dir, Arc::new(HostFiles))
    }

    /// The store in directory `dir`, written through `files`.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn with_files(dir: &Path, files: Arc<dyn Files>) -> Result<Self, Error> {
        let opened = fs::read_dir(dir);
        opened.map_err(Error::io("open it as a directory of snapshots", dir))?;
        Ok(Self {
            dir: dir.to_owned(),
            files,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Begins a snapshot called `name`. Nothing of it is visible before [`SnapshotWriter::commit`].
    ///
    /// # Errors
    /// The name is taken or not a name, the parent is not there or its chain too long, snapshots are being deleted, or
    /// the directory cannot be written.
    pub fn create(&self, name: &str, draft: Draft) -> Result<SnapshotWriter, Error> {
        SnapshotWriter::begin(self, name, draft)
    }

    /// The snapshot called `name`.
    ///
    /// # Errors
    /// There is none, or its manifest is damaged.
    pub fn snapshot(&self, name: &str) -> Result<Snapshot, Error> {
        check_name(name)?;
        source::snapshot(&self.source(), name)
    }

    /// All snapshots, oldest first.
    ///
    /// # Errors
    /// The directory cannot be read, or a manifest in it is damaged: what that snapshot needs is not known then.
    pub fn list(&self) -> Result<Vec<Snapshot>, Error> {
        let mut snapshots = Vec::new();
        for listed in survey(&self.source())? {
            snapshots.push(listed.snapshot?);
        }
        Ok(snapshots)
    }

    /// The directory, to read from.
    pub(crate) fn source(&self) -> Directory {
        Directory(self.dir.clone())
    }

    /// Keeps snapshots from being deleted (shared) or also from being written (exclusive) for as long as the result
    /// lives.
    pub(crate) fn lock(&self, operation: FlockOperation) -> Result<File, Error> {
        let file = File::open(&self.dir).map_err(Error::io("open it", &self.dir))?;
        match flock(&file, operation).map_err(io::Error::from) {
            Ok(()) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Error::Busy(self.dir.clone())),
            Err(error) => Err(Error::io("lock it", &self.dir)(error)),
        }
    }

    /// Makes the directory `path` of this store, which has id `id`, disappear as a whole, then removes it.
    pub(crate) fn remove(&self, path: &Path, id: Uuid) -> Result<(), Error> {
        let deleted = self.dir.join(format!("{DELETED}{id}"));
        self.files
            .rename(path, &deleted)
            .map_err(Error::io("rename it to delete it", path))?;
        self.files
            .sync_dir(&self.dir)
            .map_err(Error::io("sync it", &self.dir))?;
        self.files.remove(&deleted).map_err(Error::io("remove it", &deleted))
    }
}
