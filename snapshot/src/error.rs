//! What can go wrong with saved state. Every message names the file it is about.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::remote::Failure;

/// Why saved state could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused an operation.
    #[error("{}: cannot {action}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A store that is not on this host could not be used.
    #[error("{}: cannot {action}", .path.display())]
    Remote {
        /// What was tried.
        action: &'static str,
        /// On which object or directory.
        path: PathBuf,
        /// What each endpoint has done last.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The file system has no room for the snapshot, of which nothing is kept.
    #[error("{}: the disk is full: nothing of this snapshot is kept, older ones are as they were", .0.display())]
    Full(PathBuf),
    /// No snapshot has this name.
    #[error("{}: there is no snapshot: {} is missing", .0.display(), crate::manifest::FILE)]
    Absent(PathBuf),
    /// The name is taken.
    #[error("{}: exists already", .0.display())]
    Exists(PathBuf),
    /// Not something a snapshot can be called.
    #[error(
        "{0:?} cannot be a snapshot's name: it has 1 to 64 letters, digits, '-', '_' or '.', and does not begin with '.'"
    )]
    Name(String),
    /// The file is not JSON of the expected form.
    #[error("{}: is not the manifest of a snapshot", .path.display())]
    NotAManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong where.
        source: serde_json::Error,
    },
    /// Written by a newer release.
    #[error("{}: has format version {found}, but this release reads versions up to {newest}", .path.display())]
    FormatVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        newest: u32,
    },
    /// What a file says cannot be.
    #[error("{}: {reason}", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Bytes are not those that were written.
    #[error("{}: damaged at byte {offset}: {what}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the damaged part begins.
        offset: u64,
        /// Which part it is, and how the damage shows.
        what: String,
    },
    /// The snapshot below an incremental one is gone.
    #[error("{}: its parent {id}, once called '{name}', is not in {}", .path.display(), .store.display())]
    ParentMissing {
        /// The incremental snapshot.
        path: PathBuf,
        /// Id of its parent.
        id: Uuid,
        /// Name the parent had.
        name: String,
        /// Where it was looked for.
        store: PathBuf,
    },
    /// The snapshot below an incremental one is not the one it was made from.
    #[error("{}: its parent {} has another content than when this snapshot was made", .path.display(), .parent.display())]
    ParentDiffers {
        /// The incremental snapshot.
        path: PathBuf,
        /// The other snapshot.
        parent: PathBuf,
    },
    /// A snapshot is among its own ancestors.
    #[error("{}: the chain of parents comes back to this snapshot and has no beginning", .0.display())]
    Cycle(PathBuf),
    /// Longer than [`CHAIN_MAX`](crate::chain::CHAIN_MAX).
    #[error("{}: its chain has more than {} snapshots: merge it", .0.display(), crate::chain::CHAIN_MAX)]
    ChainLength(PathBuf),
    /// No such section of state.
    #[error("{}: has no state '{name}'", .path.display())]
    SectionMissing {
        /// The snapshot.
        path: PathBuf,
        /// Name of the section.
        name: String,
    },
    /// A section that cannot be understood.
    #[error("{}: state '{name}'", .path.display())]
    Section {
        /// The file of the sections.
        path: PathBuf,
        /// Name of the section.
        name: String,
        /// Why.
        source: SectionError,
    },
    /// No such image.
    #[error("{}: has no image '{name}'", .path.display())]
    ImageMissing {
        /// The snapshot.
        path: PathBuf,
        /// Name of the image.
        name: String,
    },
    /// The caller handed over pages or state that cannot be saved.
    #[error("{}: cannot be written: {reason}", .path.display())]
    Unwritable {
        /// The file or snapshot.
        path: PathBuf,
        /// What is wrong with what was handed over.
        reason: String,
    },
    /// The pages to be saved could not be had.
    #[error("cannot read the pages to be saved")]
    Source(#[source] Box<dyn StdError + Send + Sync>),
    /// A snapshot that others are built on cannot go.
    #[error("{}: cannot be deleted: '{by}' is built on it", .path.display())]
    Needed {
        /// The snapshot.
        path: PathBuf,
        /// Name of one that needs it.
        by: String,
    },
    /// A snapshot that others are built on cannot be replaced.
    #[error(
        "{}: cannot be merged in place: '{by}' is built on it as it is now: merge it under a new name, or '{by}'",
        .path.display()
    )]
    Replaced {
        /// The snapshot.
        path: PathBuf,
        /// Name of one that is built on it.
        by: String,
    },
    /// Someone writes or deletes here now.
    #[error("{}: another process is writing or deleting snapshots here: try again later", .0.display())]
    Busy(PathBuf),
}

/// Why a section of state could not be understood.
#[derive(Debug, thiserror::Error)]
pub enum SectionError {
    /// A version this release does not know.
    #[error("has version {found}, but this release reads versions 1 to {newest}")]
    Version {
        /// The section's version.
        found: u16,
        /// The newest version that can be read.
        newest: u16,
    },
    /// Not the encoding of the expected type.
    #[error("does not hold what it should")]
    Encoding(#[from] postcard::Error),
    /// More bytes than the value takes.
    #[error("goes on for {0} bytes after its end")]
    Trailing(usize),
}

impl Error {
    /// Says what was tried on which file when the system refused; a full disk is an error of its own.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full(path.to_owned()),
            _ => Self::Io {
                action,
                path: path.to_owned(),
                source,
            },
        }
    }

    /// Says what was tried on which object when no endpoint did it.
    pub(crate) fn remote(action: &'static str, path: &Path) -> impl FnOnce(Failure) -> Self {
        move |source| Self::Remote {
            action,
            path: path.to_owned(),
            source: Box::new(source),
        }
    }

    /// What `path` says cannot be.
    pub(crate) fn invalid(path: &Path, reason: impl Into<String>) -> Self {
        Self::Invalid {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    /// The part of `path` that begins at `offset` is not what was written.
    pub(crate) fn damaged(path: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            offset,
            what: what.into(),
        }
    }

    /// What the caller handed over for `path` cannot be saved.
    pub(crate) fn unwritable(path: &Path, reason: impl Into<String>) -> Self {
        Self::Unwritable {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
