//! Writing a snapshot: beside the others, and visible only when all of it is permanent.
//!
//! ```text
//!  begin ── sections, images ──► commit:  state.bin  manifest.json   every file synced
//!  .partial-ID/                           .partial-ID/               directory synced
//!                                         rename to NAME/            ◄── from here on there is a snapshot
//!                                         store's directory synced
//! ```
//!
//! Up to the rename a crash leaves only `.partial-ID`, which nobody reads and [compaction](crate::compact) removes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::FlockOperation;
use uuid::Uuid;

use crate::chain::{CHAIN_MAX, Chain};
use crate::checksum::Checksum;
use crate::error::Error;
use crate::image::{ImageWriter, Shape};
use crate::manifest::{self, Base, CpuNeeds, Manifest, MemoryRegion, Parent, Sealed};
use crate::section::{self, Payload, Section, SectionEntry};
use crate::spec::VmSpec;
use crate::store::{PARTIAL, Snapshot, Store, check_name};

/// What is known of a snapshot before it is written.
#[derive(Clone, Debug)]
pub struct Draft {
    /// When the guest was stopped for it.
    pub created: Timestamp,
    /// What it is built on, a snapshot of the same store.
    pub parent: Option<Parent>,
    /// The VM.
    pub spec: VmSpec,
    /// Where guest memory lies.
    pub memory: Vec<MemoryRegion>,
    /// What the guest has seen of its CPU.
    pub cpu: CpuNeeds,
}

/// A snapshot being written. Dropped without [`commit`](Self::commit), it leaves nothing behind.
pub struct SnapshotWriter {
    store: Store,
    /// Held to the end, so that nobody deletes the parent.
    _lock: File,
    parent: Option<Snapshot>,
    name: String,
    /// The directory: a partial one, then the snapshot's.
    dir: PathBuf,
    manifest: Manifest,
    state: Vec<u8>,
    /// Images that are begun and not completed.
    open_images: Vec<String>,
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
            Some(parent) => Some(find_parent(store, &path, parent)?),
            None => None,
        };
        let id = Uuid::new_v4();
        let dir = store.dir.join(format!("{PARTIAL}{id}"));
        store.files.create_dir(&dir).map_err(Error::io("create it", &dir))?;
        Ok(Self {
            store: store.clone(),
            _lock: lock,
            parent,
            name: name.to_owned(),
            dir,
            manifest: Manifest {
                id,
                parent: draft.parent,
                created: draft.created,
                monitor: concat!("cutover ", env!("CARGO_PKG_VERSION")).to_owned(),
                spec: draft.spec,
                memory: draft.memory,
                cpu: draft.cpu,
                state: Vec::new(),
                images: Vec::new(),
            },
            state: Vec::new(),
            open_images: Vec::new(),
            committed: false,
        })
    }

    /// Adds a section of state.
    ///
    /// # Errors
    /// It has no encoding.
    pub fn section<T: Section>(&mut self, name: &str, value: &T) -> Result<(), Error> {
        let bytes = postcard::to_stdvec(value).map_err(|source| Error::Section {
            path: self.dir.join(section::FILE),
            name: name.to_owned(),
            source: source.into(),
        })?;
        self.payload(
            name,
            &Payload {
                version: T::VERSION,
                bytes: &bytes,
            },
        );
        Ok(())
    }

    /// Adds a section of state that is encoded already.
    pub fn payload(&mut self, name: &str, payload: &Payload<'_>) {
        self.manifest.state.push(SectionEntry {
            name: name.to_owned(),
            version: payload.version,
            bytes: payload.bytes.len() as u64,
            checksum: Checksum::of(payload.bytes),
        });
        self.state.extend_from_slice(payload.bytes);
    }

    /// Begins an image. Several can be written at the same time, also by other threads.
    ///
    /// # Errors
    /// There cannot be such an image, the parent has none to base it on, or its file cannot be created.
    pub fn image(&mut self, name: &str, shape: Shape) -> Result<ImageWriter, Error> {
        let unwritable = |reason| Error::unwritable(&self.dir, reason);
        manifest::check_part_name(name, false).map_err(unwritable)?;
        if shape.base == Base::Parent && !self.parent_has(name, shape.page_bytes) {
            let reason = format!("image '{name}' is based on a parent that has none with such pages");
            return Err(Error::unwritable(&self.dir, reason));
        }
        let image = ImageWriter::create(&*self.store.files, &self.dir, name, shape)?;
        self.open_images.push(name.to_owned());
        Ok(image)
    }

    fn parent_has(&self, name: &str, page_bytes: u32) -> bool {
        let manifest = self.parent.as_ref().map(|parent| &parent.sealed.manifest);
        let image = manifest.and_then(|manifest| manifest.image(name));
        image.is_some_and(|image| image.page_bytes == page_bytes)
    }

    /// Takes back an image that has all its pages, and makes it permanent.
    ///
    /// # Errors
    /// It cannot be written, or a page came twice.
    pub fn complete(&mut self, image: ImageWriter) -> Result<(), Error> {
        let name = image.name().to_owned();
        self.manifest.images.push(image.finish()?);
        self.open_images.retain(|open| *open != name);
        Ok(())
    }

    /// Makes the snapshot permanent and visible.
    ///
    /// # Errors
    /// It cannot be written, or does not hold together; then there is nothing of it.
    pub fn commit(mut self) -> Result<Snapshot, Error> {
        if let Some(name) = self.open_images.first() {
            let reason = format!("image '{name}' was begun and not completed");
            return Err(Error::unwritable(&self.dir, reason));
        }
        self.write(section::FILE, &self.state)?;
        let unwritable = |reason| Error::unwritable(&self.dir, reason);
        self.manifest.check().map_err(unwritable)?;
        let sealed = self.manifest.seal();
        let (text, checksum) = sealed.map_err(|error| unwritable(format!("its manifest: {error}")))?;
        if text.len() as u64 > manifest::MANIFEST_BYTES_MAX {
            return Err(unwritable("its manifest is too large".to_owned()));
        }
        self.write(manifest::FILE, text.as_bytes())?;
        let files = &self.store.files;
        files.sync_dir(&self.dir).map_err(Error::io("sync it", &self.dir))?;
        self.publish()?;
        Ok(Snapshot {
            path: self.dir.clone(),
            name: self.name.clone(),
            sealed: Sealed {
                manifest: self.manifest.clone(),
                checksum,
            },
        })
    }

    /// Gives the directory its name.
    fn publish(&mut self) -> Result<(), Error> {
        let files = &self.store.files;
        let path = self.store.dir.join(&self.name);
        match files.rename(&self.dir, &path) {
            Ok(()) => self.dir = path,
            Err(error) if is_taken(&error) => return Err(Error::Exists(path)),
            Err(error) => return Err(Error::io("rename the finished snapshot to it", &path)(error)),
        }
        let store = &self.store.dir;
        files.sync_dir(store).map_err(Error::io("sync it", store))?;
        self.committed = true;
        Ok(())
    }

    /// Writes a whole file and makes it permanent.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.dir.join(name);
        let mut file = self.store.files.create(&path).map_err(Error::io("create it", &path))?;
        file.write_all_at(bytes, 0).map_err(Error::io("write it", &path))?;
        file.sync().map_err(Error::io("sync it", &path))
    }
}

/// The parent of the snapshot that is to be at `path`, after making sure that a chain can be built on it.
fn find_parent(store: &Store, path: &Path, parent: &Parent) -> Result<Snapshot, Error> {
    let parent = store.parent(path, parent)?;
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
            // The reason for giving up is what the caller is told; compaction removes what stays.
            let _ = self.store.remove(&self.dir, self.manifest.id);
        }
    }
}
