//! A chain: a snapshot with all it is built on, verified as far as that needs no pages.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::archive::Archive;
use crate::blob::read_whole;
use crate::error::Error;
use crate::image::Image;
use crate::manifest::{self, Base, ImageEntry};
use crate::remote::{Access, RemoteDir, Url};
use crate::section::{self, STATE_BYTES_MAX, State};
use crate::source::{self, Directory, Source};
use crate::store::{Snapshot, check_name};

/// Most snapshots of a chain.
pub const CHAIN_MAX: usize = 128;

/// A snapshot with all it is built on. Every manifest has its checksum, every file its length.
#[derive(Clone, Debug)]
pub struct Chain {
    source: Arc<dyn Source>,
    /// Newest first.
    snapshots: Vec<Snapshot>,
}

impl Chain {
    /// The chain of the snapshot at `path`: a directory, whose parents are beside it, a single file, or either of them in
    /// a bucket (`s3://BUCKET/PATH`) that is reached as the environment says.
    ///
    /// # Errors
    /// A snapshot is missing or not the one it should be, a manifest is damaged, a file has another length.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_through(path, &Access::from_env())
    }

    /// The same, where buckets are reached as `access` says.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_through(path: &Path, access: &Access) -> Result<Self, Error> {
        if let Some(url) = Url::parse(path) {
            let (above, name) = url?.split()?;
            return Self::open_remote(RemoteDir::new(above, access)?, &name);
        }
        let whole = path.canonicalize().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::Absent(path.to_owned()),
            _ => Error::io("find it", path)(error),
        })?;
        let (Some(dir), Some(name)) = (whole.parent(), whole.file_name().and_then(|name| name.to_str())) else {
            return Err(Error::Name(path.display().to_string()));
        };
        if whole.is_file() {
            return Self::of_file(Archive::open(&whole)?);
        }
        check_name(name)?;
        Self::of(Arc::new(Directory(dir.to_owned())), name)
    }

    fn open_remote(dir: RemoteDir, name: &str) -> Result<Self, Error> {
        if dir.open(name, manifest::FILE)?.is_none()
            && let Some(file) = dir.file(name)?
        {
            return Self::of_file(Archive::read(file)?);
        }
        Self::of(Arc::new(dir), name)
    }

    fn of_file(file: Archive) -> Result<Self, Error> {
        let name = file.name.clone();
        Self::of(Arc::new(file), &name)
    }

    /// The chain of the snapshot of `source` called `name`.
    pub(crate) fn of(source: Arc<dyn Source>, name: &str) -> Result<Self, Error> {
        let newest = source::snapshot(&*source, name)?;
        let mut seen = HashSet::from([newest.id()]);
        let mut snapshots = vec![newest];
        while let Some(child) = snapshots.last()
            && let Some(parent) = &child.sealed.manifest.parent
        {
            if !seen.insert(parent.id) {
                return Err(Error::Cycle(child.path.clone()));
            }
            if snapshots.len() == CHAIN_MAX {
                return Err(Error::ChainLength(source.path_of(name)));
            }
            let parent = source::parent(&*source, &child.path, parent)?;
            snapshots.push(parent);
        }
        for snapshot in &snapshots {
            for (file, bytes) in snapshot.sealed.manifest.files() {
                source::open_file(&*source, snapshot, &file, bytes)?;
            }
        }
        Ok(Self { source, snapshots })
    }

    /// Where the snapshots are read from.
    pub(crate) fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// The snapshots, newest first.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// The snapshot the chain was opened for.
    pub fn newest(&self) -> &Snapshot {
        self.snapshots.first().expect("a chain has a newest snapshot")
    }

    /// The state of the newest snapshot.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn state(&self) -> Result<State, Error> {
        self.state_of(self.newest())
    }

    /// The state of one of the snapshots.
    pub(crate) fn state_of(&self, snapshot: &Snapshot) -> Result<State, Error> {
        let manifest = &snapshot.sealed.manifest;
        let blob = source::open_file(self.source(), snapshot, section::FILE, manifest.state_bytes())?;
        let content = read_whole(&*blob, STATE_BYTES_MAX)?;
        State::split(blob.path(), &manifest.state, &content, 0)
    }

    /// An image, put together from all snapshots of the chain.
    ///
    /// # Errors
    /// There is none of this name, or an index is damaged.
    pub fn image(&self, name: &str) -> Result<Image, Error> {
        let mut layers: Vec<(&Snapshot, &ImageEntry)> = Vec::new();
        for snapshot in &self.snapshots {
            let entry = snapshot
                .sealed
                .manifest
                .image(name)
                .ok_or_else(|| Error::ImageMissing {
                    path: snapshot.path.clone(),
                    name: name.to_owned(),
                })?;
            layers.push((snapshot, entry));
            if entry.base == Base::Zero {
                break;
            }
        }
        Image::open(self.source(), &layers)
    }
}
