//! Where snapshots are read from: a directory, a file that is one snapshot, a remote store.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::blob::{Blob, LocalFile, read_whole};
use crate::error::Error;
use crate::manifest::{self, MANIFEST_BYTES_MAX, Parent, Sealed};
use crate::store::{SNAPSHOTS_MAX, Snapshot, check_name};

/// Snapshots with names, and their files.
pub(crate) trait Source: fmt::Debug + Send + Sync {
    /// What messages call it.
    fn path(&self) -> &Path;

    /// What messages call the snapshot with this name.
    fn path_of(&self, name: &str) -> PathBuf;

    /// Names of all that can be snapshots here, at most [`SNAPSHOTS_MAX`].
    fn names(&self) -> Result<Vec<String>, Error>;

    /// A file of the snapshot with this name, if there is any.
    fn open(&self, name: &str, file: &str) -> Result<Option<Arc<dyn Blob>>, Error>;
}

/// The snapshot called `name`.
pub(crate) fn snapshot(source: &dyn Source, name: &str) -> Result<Snapshot, Error> {
    let path = source.path_of(name);
    let blob = source.open(name, manifest::FILE)?;
    let blob = blob.ok_or_else(|| Error::Absent(path.clone()))?;
    let text = read_whole(&*blob, MANIFEST_BYTES_MAX)?;
    Ok(Snapshot {
        path,
        name: name.to_owned(),
        sealed: Sealed::parse(blob.path(), &text, 0)?,
    })
}

/// The snapshot that the one at `child` is built on. It may have another name than it had.
pub(crate) fn parent(source: &dyn Source, child: &Path, parent: &Parent) -> Result<Snapshot, Error> {
    let by_name = match snapshot(source, &parent.name) {
        Ok(snapshot) => Some(snapshot).filter(|snapshot| snapshot.id() == parent.id),
        Err(Error::Absent(_)) => None,
        Err(error) => return Err(error),
    };
    let found = match by_name {
        Some(snapshot) => Some(snapshot),
        None => find(source, parent.id)?,
    };
    let found = found.ok_or_else(|| Error::ParentMissing {
        path: child.to_owned(),
        id: parent.id,
        name: parent.name.clone(),
        store: source.path().to_owned(),
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
fn find(source: &dyn Source, id: Uuid) -> Result<Option<Snapshot>, Error> {
    let names = source.names()?;
    let mut snapshots = names.iter().filter_map(|name| snapshot(source, name).ok());
    Ok(snapshots.find(|snapshot| snapshot.id() == id))
}

/// A file of a snapshot, which must have the length that the manifest says.
pub(crate) fn open_file(
    source: &dyn Source,
    snapshot: &Snapshot,
    file: &str,
    bytes: u64,
) -> Result<Arc<dyn Blob>, Error> {
    let Some(blob) = source.open(&snapshot.name, file)? else {
        return Err(Error::invalid(&snapshot.path.join(file), "is missing"));
    };
    if blob.bytes() != bytes {
        let reason = format!("has {} bytes, but its manifest says {bytes}", blob.bytes());
        return Err(Error::invalid(blob.path(), reason));
    }
    Ok(blob)
}

/// A directory of this host, with a directory for each snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Directory(pub PathBuf);

impl Directory {
    /// Names in the directory that `wanted` wants.
    pub fn entries(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, Error> {
        let failed = |source| Error::io("list it", &self.0)(source);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(failed)? {
            // A name that is not UTF-8 is none of ours.
            let name = entry.map_err(failed)?.file_name().into_string();
            names.extend(name.ok().filter(|name| wanted(name)));
            if names.len() > SNAPSHOTS_MAX {
                let reason = format!("has more than {SNAPSHOTS_MAX} entries");
                return Err(Error::invalid(&self.0, reason));
            }
        }
        Ok(names)
    }
}

impl Source for Directory {
    fn path(&self) -> &Path {
        &self.0
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        self.entries(|name| check_name(name).is_ok())
    }

    fn open(&self, name: &str, file: &str) -> Result<Option<Arc<dyn Blob>>, Error> {
        let opened = LocalFile::open(self.path_of(name).join(file))?;
        Ok(opened.map(|file| Arc::new(file) as Arc<dyn Blob>))
    }
}
