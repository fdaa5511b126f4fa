//! A chain: a snapshot with all it is built on, verified as far as that needs no pages.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::image::Image;
use crate::manifest::{Base, ImageEntry};
use crate::section::{self, State};
use crate::store::{Snapshot, Store};

/// Most snapshots of a chain.
pub const CHAIN_MAX: usize = 128;

/// A snapshot with all it is built on. Every manifest has its checksum, every file its length.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Newest first.
    snapshots: Vec<Snapshot>,
}

impl Chain {
    /// The chain of the snapshot in directory `path`; its parents are beside it.
    ///
    /// # Errors
    /// A snapshot is missing or not the one it should be, a manifest is damaged, a file has another length.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (dir, name) = split(path)?;
        let store = Store::open(&dir)?;
        let newest = store.snapshot(&name)?;
        let mut seen = HashSet::from([newest.id()]);
        let mut snapshots = vec![newest];
        while let Some(child) = snapshots.last()
            && let Some(parent) = &child.sealed.manifest.parent
        {
            if !seen.insert(parent.id) {
                return Err(Error::Cycle(child.path.clone()));
            }
            if snapshots.len() == CHAIN_MAX {
                return Err(Error::ChainLength(path.to_owned()));
            }
            let parent = store.parent(&child.path, parent)?;
            snapshots.push(parent);
        }
        snapshots.iter().try_for_each(check_lengths)?;
        Ok(Self { snapshots })
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
        read_state(self.newest())
    }

    /// An image, put together from all snapshots of the chain.
    ///
    /// # Errors
    /// There is none of this name, or an index is damaged.
    pub fn image(&self, name: &str) -> Result<Image, Error> {
        let mut layers: Vec<(&Path, &ImageEntry)> = Vec::new();
        for snapshot in &self.snapshots {
            let path = &snapshot.path;
            let entry = snapshot
                .sealed
                .manifest
                .image(name)
                .ok_or_else(|| Error::ImageMissing {
                    path: path.clone(),
                    name: name.to_owned(),
                })?;
            layers.push((path, entry));
            if entry.base == Base::Zero {
                break;
            }
        }
        Image::open(&layers)
    }
}

/// Reads the state of one snapshot.
pub(crate) fn read_state(snapshot: &Snapshot) -> Result<State, Error> {
    let path = snapshot.path.join(section::FILE);
    let content = fs::read(&path).map_err(Error::io("read it", &path))?;
    State::split(&path, &snapshot.sealed.manifest.state, &content, 0)
}

/// The store and the name of the snapshot in directory `path`.
fn split(path: &Path) -> Result<(PathBuf, String), Error> {
    let whole = path.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::Absent(path.to_owned()),
        _ => Error::io("find it", path)(error),
    })?;
    match (whole.parent(), whole.file_name().and_then(|name| name.to_str())) {
        (Some(dir), Some(name)) => Ok((dir.to_owned(), name.to_owned())),
        _ => Err(Error::Name(path.display().to_string())),
    }
}

/// Compares the lengths of a snapshot's files with what its manifest says.
fn check_lengths(snapshot: &Snapshot) -> Result<(), Error> {
    for (file, expected) in snapshot.sealed.manifest.files() {
        let path = snapshot.path.join(file);
        let metadata = fs::symlink_metadata(&path).map_err(Error::io("examine it", &path))?;
        if !metadata.is_file() {
            return Err(Error::invalid(&path, "is not a regular file"));
        }
        if metadata.len() != expected {
            let reason = format!("has {} bytes, but its manifest says {expected}", metadata.len());
            return Err(Error::invalid(&path, reason));
        }
    }
    Ok(())
}
