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
use crate::manifest::{Parent, Sealed};
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
        let path = self.dir.join(name);
        let sealed = Sealed::read(&path)?;
        Ok(Snapshot {
            path,
            name: name.to_owned(),
            sealed,
        })
    }

    /// All snapshots, oldest first.
    ///
    /// # Errors
    /// The directory cannot be read, or a manifest in it is damaged: what that snapshot needs is not known then.
    pub fn list(&self) -> Result<Vec<Snapshot>, Error> {
        let mut snapshots = Vec::new();
        for name in self.names(|name| check_name(name).is_ok())? {
            match self.snapshot(&name) {
                Ok(snapshot) => snapshots.push(snapshot),
                // Another directory, or deleted meanwhile.
                Err(Error::Absent(_)) => {}
                Err(error) => return Err(error),
            }
        }
        snapshots.sort_by(|a, b| {
            let created = |snapshot: &Snapshot| snapshot.sealed.manifest.created;
            created(a).cmp(&created(b)).then_with(|| a.name.cmp(&b.name))
        });
        Ok(snapshots)
    }

    /// The snapshot that the one at `child` is built on.
    ///
    /// # Errors
    /// It is not there, damaged, or not what it was when the child was made.
    pub(crate) fn parent(&self, child: &Path, parent: &Parent) -> Result<Snapshot, Error> {
        let by_name = match self.snapshot(&parent.name) {
            Ok(snapshot) => Some(snapshot).filter(|snapshot| snapshot.id() == parent.id),
            Err(Error::Absent(_)) => None,
            Err(error) => return Err(error),
        };
        let found = match by_name {
            Some(snapshot) => Some(snapshot),
            None => self.find(parent.id)?,
        };
        let found = found.ok_or_else(|| Error::ParentMissing {
            path: child.to_owned(),
            id: parent.id,
            name: parent.name.clone(),
            store: self.dir.clone(),
        })?;
        if found.sealed.checksum != parent.checksum {
            return Err(Error::ParentDiffers {
                path: child.to_owned(),
                parent: found.path,
            });
        }
        Ok(found)
    }

    /// The snapshot with this id, whatever it is called now. Damaged manifests are passed over.
    fn find(&self, id: Uuid) -> Result<Option<Snapshot>, Error> {
        let names = self.names(|name| check_name(name).is_ok())?;
        let mut snapshots = names.iter().filter_map(|name| self.snapshot(name).ok());
        Ok(snapshots.find(|snapshot| snapshot.id() == id))
    }

    /// Names in the directory that `wanted` wants.
    pub(crate) fn names(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, Error> {
        let failed = |source| Error::io("list it", &self.dir)(source);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            // A name that is not UTF-8 is none of ours.
            let name = entry.map_err(failed)?.file_name().into_string();
            names.extend(name.ok().filter(|name| wanted(name)));
            if names.len() > SNAPSHOTS_MAX {
                return Err(Error::invalid(
                    &self.dir,
                    format!("has more than {SNAPSHOTS_MAX} entries"),
                ));
            }
        }
        Ok(names)
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
