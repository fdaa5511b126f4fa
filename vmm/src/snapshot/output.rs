//! Where a snapshot goes while it is made: a snapshot of a store, or Firecracker's two files.
//!
//! Both are written beside what is there and renamed when they are complete and permanent; dropped before, they leave
//! nothing behind.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cutover_snapshot::error::Error as SnapshotError;
use cutover_snapshot::image::{Layout, PageSource, Shape};
use cutover_snapshot::manifest::{Base, CpuNeeds, MEMORY_IMAGE, MEMORY_PAGE_BYTES};
use cutover_snapshot::state_file::StateFile;
use cutover_snapshot::store::{Snapshot, Store};
use cutover_snapshot::writer::{Draft, SnapshotWriter};
use jiff::Timestamp;
use tempfile::NamedTempFile;

use super::request::{Kind, SnapshotRequest, Target};
use super::{directory_of, disks};
use crate::Error;
use crate::state::MachineState;

/// See the module.
pub enum Output {
    /// A snapshot of a store.
    Store(Box<SnapshotWriter>),
    /// State and memory in a file each.
    Files {
        /// What the state's file is going to be.
        content: Box<StateFile>,
        /// The state's file.
        state: PathBuf,
        /// The memory's file.
        memory: PathBuf,
        /// What takes its place, once it is written.
        written: Option<NamedTempFile>,
    },
}

/// A snapshot that is permanent.
pub struct Finished {
    /// Where it is.
    pub path: PathBuf,
    /// The snapshot, where it can be built on.
    pub snapshot: Option<Snapshot>,
    /// Bytes of its files.
    pub file_bytes: u64,
}

impl Output {
    /// Begins to write to where `request` says.
    ///
    /// # Errors
    /// The name is taken, the parent is not there, or there is no such directory.
    pub fn begin(request: &SnapshotRequest, draft: Draft) -> Result<Self, Error> {
        match &request.target {
            Target::Store { store, name } => {
                let writer = Store::open(store)?.create(name, draft)?;
                Ok(Self::Store(Box::new(writer)))
            }
            Target::Files { state, memory } => Ok(Self::Files {
                content: Box::new(StateFile::new(draft)),
                state: state.clone(),
                memory: memory.clone(),
                written: None,
            }),
        }
    }

    /// Notes what is known only once the guest has stopped: when that was, and what it has seen of its CPU.
    pub fn stopped(&mut self, at: Timestamp, cpu: CpuNeeds) {
        match self {
            Self::Store(writer) => writer.stopped(at, cpu),
            Self::Files { content, .. } => content.stopped(at, cpu),
        }
    }

    /// Whether a disk is to be saved whole, because there is no snapshot before that has it.
    pub fn takes_whole_disk(&self, id: &str) -> bool {
        match self {
            Self::Store(writer) => !writer.parent_has(&disks::image_name(id), disks::PAGE_BYTES),
            Self::Files { .. } => true,
        }
    }

    /// Writes memory: the pages of `source`, and of what there was before where `kind` says so.
    ///
    /// # Errors
    /// Pages cannot be had or not be written.
    pub fn memory(
        &mut self,
        kind: Kind,
        compress: Option<i32>,
        pages: u64,
        source: &mut dyn PageSource,
    ) -> Result<(), Error> {
        match self {
            Self::Store(writer) => {
                let shape = Shape {
                    page_bytes: MEMORY_PAGE_BYTES,
                    pages,
                    base: match kind {
                        Kind::Full => Base::Zero,
                        Kind::Incremental => Base::Parent,
                    },
                    layout: match (kind, compress) {
                        (_, Some(level)) => Layout::Compressed { level },
                        (Kind::Full, None) => Layout::Flat,
                        (Kind::Incremental, None) => Layout::Packed,
                    },
                };
                let mut image = writer.image(MEMORY_IMAGE, shape)?;
                image.copy_from(source, &mut |_| {})?;
                Ok(writer.complete(image)?)
            }
            Self::Files { memory, written, .. } => {
                let size = pages * u64::from(MEMORY_PAGE_BYTES);
                *written = Some(write_raw(memory, size, source)?);
                Ok(())
            }
        }
    }

    /// Writes the state and makes the whole permanent and visible.
    ///
    /// # Errors
    /// It cannot be written; then there is nothing of it.
    pub fn finish(self, state: &MachineState) -> Result<Finished, Error> {
        match self {
            Self::Store(mut writer) => {
                state.write(&mut *writer)?;
                let snapshot = writer.commit()?;
                let files = snapshot.sealed.manifest.files();
                Ok(Finished {
                    path: snapshot.path.clone(),
                    file_bytes: files.map(|(_, bytes)| bytes).sum(),
                    snapshot: Some(snapshot),
                })
            }
            Self::Files {
                mut content,
                state: path,
                memory,
                written,
            } => {
                state.write(&mut *content)?;
                // What can still fail for want of room comes first: neither is replaced then.
                content.write(&path)?;
                if let Some(written) = written {
                    publish(written, &memory)?;
                }
                Ok(Finished {
                    file_bytes: bytes_of(&path)? + bytes_of(&memory)?,
                    path,
                    snapshot: None,
                })
            }
        }
    }
}

fn bytes_of(path: &Path) -> Result<u64, Error> {
    let metadata = path.metadata().map_err(SnapshotError::io("examine it", path))?;
    Ok(metadata.len())
}

/// Writes a plain image of `size` bytes with the pages of `source`, and holes where there are none, beside `path`.
fn write_raw(path: &Path, size: u64, source: &mut dyn PageSource) -> Result<NamedTempFile, Error> {
    let dir = directory_of(path);
    let beside = NamedTempFile::new_in(dir).map_err(SnapshotError::io("create a file in it", dir))?;
    let file = beside.as_file();
    file.set_len(size).map_err(SnapshotError::io("size it", path))?;
    while let Some(pages) = source.next_pages()? {
        let offset = pages.first * u64::from(MEMORY_PAGE_BYTES);
        let written = file.write_all_at(pages.bytes, offset);
        written.map_err(SnapshotError::io("write it", path))?;
    }
    file.sync_all().map_err(SnapshotError::io("sync it", path))?;
    Ok(beside)
}

/// Gives a written file its name, permanently.
fn publish(written: NamedTempFile, path: &Path) -> Result<(), Error> {
    let renamed = written.persist(path).map_err(|error| error.error);
    renamed.map_err(SnapshotError::io("rename the finished file to it", path))?;
    let dir = directory_of(path);
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    Ok(synced.map_err(SnapshotError::io("sync it", dir))?)
}
