//! Writing a snapshot: beside the others, and visible only when all of it is permanent.
//!
//! ```text
//!  begin ── sections, images ──► commit:  state.bin  manifest.json   every file synced
//!  .partial-ID/                           .partial-ID/               directory synced
//!                                         rename to NAME/            ◄── from here on there is a snapshot
//!                                         store's directory synced
//! ```
//!
//! Up to the rename a crash leaves only `.partial-ID`, which nobody reads and [pruning](crate::prune) removes.

use std::fs::File;
use std::io;
use std::path::Path;

use jiff::Timestamp;
use rustix::fs::FlockOperation;

use crate::chain::{CHAIN_MAX, Chain};
use crate::compose::Composer;
use crate::error::Error;
use crate::files::NewFiles;
use crate::image::{ImageWriter, Shape};
use crate::manifest::{CpuNeeds, Manifest, Parent};
use crate::section::{Payload, SectionWriter};
use crate::source;
use crate::store::{PARTIAL, Snapshot, Store, check_name};

pub use crate::manifest::Draft;

/// A snapshot being written. Dropped without [`commit`](Self::commit), it leaves nothing behind.
pub struct SnapshotWriter {
    store: Store,
    /// Held to the end, so that nobody deletes the parent, or builds on what is being replaced.
    _lock: File,
    name: String,
    /// Whether it takes the place of the snapshot that has its name.
    replaces: bool,
    composer: Composer,
    committed: bool,
}

impl From<&Snapshot> for Parent {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            id: snapshot.id(),
            name: snapshot.name.clone(),
            checksum: snapshot.sealed.checksum,
        }
    }
}

impl SnapshotWriter {
    pub(crate) fn begin(store: &Store, name: &str, draft: Draft) -> Result<Self, Error> {
        check_name(name)?;
        let path = store.dir.join(name);
        if path.try_exists().map_err(Error::io("examine it", &path))? {
            return Err(Error::Exists(path));
        }
        let lock = store.lock(FlockOperation::NonBlockingLockShared)?;
        let parent = match &draft.parent {
            Some(parent) => Some(find_parent(store, &path, parent)?.sealed.manifest),
            None => None,
        };
        Ok(Self {
            store: store.clone(),
            _lock: lock,
            name: name.to_owned(),
            replaces: false,
            composer: begin_in(store, draft, parent)?,
            committed: false,
        })
    }

    /// Begins a complete snapshot that is going to take the place of `old`, on which no other may be built.
    pub(crate) fn replace(store: &Store, old: &Snapshot, draft: Draft) -> Result<Self, Error> {
        // Nobody can begin a child of the old one meanwhile.
        let lock = store.lock(FlockOperation::NonBlockingLockExclusive)?;
        let current = store.snapshot(&old.name)?;
        if current.sealed.checksum != old.sealed.checksum {
            return Err(Error::Busy(store.dir.clone()));
        }
        for other in store.list()? {
            let parent = other.sealed.manifest.parent.as_ref();
            if parent.is_some_and(|parent| parent.id == old.id()) {
                return Err(Error::Replaced {
                    path: current.path,
                    by: other.name,
                });
            }
        }
        Ok(Self {
            store: store.clone(),
            _lock: lock,
            name: old.name.clone(),
            replaces: true,
            composer: begin_in(store, draft, None)?,
            committed: false,
        })
    }

    /// Has `fill` give the snapshot its state and images.
    pub(crate) fn fill(
        &mut self,
        fill: impl FnOnce(&mut Composer, &dyn NewFiles) -> Result<(), Error>,
    ) -> Result<(), Error> {
        fill(&mut self.composer, &*self.store.files)
    }

    /// Notes what may be known only once the guest has stopped: when that was, and what it has seen of its CPU.
    pub fn stopped(&mut self, at: Timestamp, cpu: CpuNeeds) {
        let manifest = &mut self.composer.manifest;
        (manifest.created, manifest.cpu) = (at, cpu);
    }

    /// Whether the parent, if there is any, has an image called `name` with such pages, so that another can be based on
    /// it.
    pub fn parent_has(&self, name: &str, page_bytes: u32) -> bool {
        self.composer.parent_has(name, page_bytes)
    }

    /// Begins an image. Several can be written at the same time, also by other threads.
    ///
    /// # Errors
    /// There cannot be such an image, the parent has none to base it on, or its file cannot be created.
    pub fn image(&mut self, name: &str, shape: Shape) -> Result<ImageWriter, Error> {
        self.composer.image(&*self.store.files, name, shape)
    }

    /// Takes back an image that has all its pages, and makes it permanent.
    ///
    /// # Errors
    /// It cannot be written, or a page came twice.
    pub fn complete(&mut self, image: ImageWriter) -> Result<(), Error> {
        self.composer.complete(image)
    }

    /// Makes the snapshot permanent and visible.
    ///
    /// # Errors
    /// It cannot be written, or does not hold together; then there is nothing of it.
    pub fn commit(mut self) -> Result<Snapshot, Error> {
        let files = self.store.files.clone();
        let sealed = self.composer.finish(&*files)?;
        let dir = self.composer.dir();
        files.sync_dir(dir).map_err(Error::io("sync it", dir))?;
        let path = self.store.dir.join(&self.name);
        if self.replaces {
            self.exchange(&path)?;
        } else {
            self.publish(&path)?;
        }
        Ok(Snapshot {
            path,
            name: self.name.clone(),
            sealed,
        })
    }

    /// Gives the directory its name.
    fn publish(&mut self, path: &Path) -> Result<(), Error> {
        match self.store.files.rename(self.composer.dir(), path) {
            Ok(()) => self.committed = true,
            Err(error) if is_taken(&error) => return Err(Error::Exists(path.to_owned())),
            Err(error) => return Err(Error::io("rename the finished snapshot to it", path)(error)),
        }
        self.sync_store().inspect_err(|_| {
            // What may not be permanent must not be there either: who is told of a failure starts from what was before.
            let _ = self.store.remove(path, self.composer.manifest.id);
        })
    }

    /// Gives the directory its name, and what had it the one of a snapshot that is not finished; then removes that.
    fn exchange(&mut self, path: &Path) -> Result<(), Error> {
        let exchanged = self.store.files.exchange(self.composer.dir(), path);
        exchanged.map_err(Error::io("exchange it for the finished snapshot", path))?;
        self.committed = true;
        self.sync_store()?;
        self.store.remove(self.composer.dir(), self.composer.manifest.id)
    }

    fn sync_store(&self) -> Result<(), Error> {
        let store = &self.store.dir;
        self.store.files.sync_dir(store).map_err(Error::io("sync it", store))
    }
}

impl SectionWriter for SnapshotWriter {
    fn payload(&mut self, name: &str, payload: &Payload<'_>) {
        self.composer.payload(name, payload);
    }
}

/// Makes a directory in `store` for a snapshot that is being written.
fn begin_in(store: &Store, draft: Draft, parent: Option<Manifest>) -> Result<Composer, Error> {
    let manifest = Manifest::begin(draft);
    let dir = store.dir.join(format!("{PARTIAL}{}", manifest.id));
    store.files.create_dir(&dir).map_err(Error::io("create it", &dir))?;
    Ok(Composer::new(dir, manifest, parent))
}

/// The parent of the snapshot that is to be at `path`, after making sure that a chain can be built on it.
fn find_parent(store: &Store, path: &Path, parent: &Parent) -> Result<Snapshot, Error> {
    let parent = source::parent(&store.source(), path, parent)?;
    if Chain::open(&parent.path)?.snapshots().len() >= CHAIN_MAX {
        return Err(Error::ChainLength(path.to_owned()));
    }
    Ok(parent)
}

/// Whether a directory could not be renamed because there is something of that name.
fn is_taken(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, NotADirectory};
    matches!(error.kind(), AlreadyExists | DirectoryNotEmpty | NotADirectory)
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.committed {
            // The reason for giving up is what the caller is told; pruning removes what stays.
            let _ = self.store.remove(self.composer.dir(), self.composer.manifest.id);
        }
    }
}
