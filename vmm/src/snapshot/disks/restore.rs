//! Restoring disks: files are created empty, the guest runs, and its disks are filled behind it.
//!
//! A file has its name only when all of it is there and permanent; until then it is [beside that](super::unfinished), as
//! `.NAME.…partial`. So a monitor that ends early leaves no disk that looks like one and is not, and a file that is to be
//! replaced is there until then.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::iter;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use cutover_devices::virtio::block::chunks::{CHUNK_SIZE, ChunkSet};
use cutover_devices::virtio::block::gate::{Copier, Holds};
use cutover_devices::virtio::block::{self, Block};
use cutover_devices::{OnThread, THREAD_STACK_SIZE};
use cutover_snapshot::chain::Chain;
use cutover_snapshot::image::{Found, Image, Progress};
use cutover_snapshot::section::State;
use cutover_snapshot::spec::VmSpec;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::{NamedTempFile, PersistError};

use super::{PAGE_BYTES, SECTION, SavedDisk, SavedDisks, image_name, pages_of, unfinished};
use crate::Error;
use crate::device_manager::DeviceManager;
use crate::snapshot::directory_of;

/// Most threads that fill one disk.
const WORKERS_MAX: usize = 16;
/// Bytes of a sector: a disk has whole ones.
const SECTOR_BYTES: u64 = 512;

/// What becomes of a file that is already where a disk's image is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and nothing is restored.
    Kept,
    /// It is replaced, once the image is complete.
    Replaced,
}

/// Disks of a snapshot, of which all is verified but the chunks. Nothing is created yet.
pub struct DiskImages {
    disks: Vec<DiskImage>,
}

struct DiskImage {
    saved: SavedDisk,
    image: Image,
    path: PathBuf,
    existing: Existing,
}

/// Files for the disks, of the right size and empty. Dropped, they are gone.
pub struct NewDisks {
    pub(super) disks: Vec<NewDisk>,
}

pub(super) struct NewDisk {
    from: DiskImage,
    pub(super) file: NamedTempFile,
    /// Threads that will fill it, at least one.
    pub(super) workers: usize,
}

/// A disk that is being filled, by one thread or several.
struct Work {
    disk: NewDisk,
    copier: Copier,
    state: Arc<FillState>,
}

/// What is done about the end of filling.
#[derive(Clone)]
pub struct WhenFilled {
    /// All disks are there; called once.
    pub done: Arc<dyn Fn() + Send + Sync>,
    /// A disk can never be: the chunk is damaged, or the file cannot be written. The guest's requests for what is
    /// missing wait for ever, so this ends the VM.
    pub failed: Arc<dyn Fn(Error) + Send + Sync>,
}

/// Disks that are being filled. Dropped before they are there, those that are not complete are gone.
pub struct DiskFilling {
    state: Arc<FillState>,
    threads: Vec<JoinHandle<()>>,
}

struct FillState {
    total: u64,
    left: AtomicU64,
    given_up: AtomicBool,
    /// Disks that are not complete.
    unfinished: Mutex<usize>,
    finished: Condvar,
    then: WhenFilled,
}

impl DiskImages {
    /// The disks that are in the newest snapshot of `chain`, whose sections `state` has, to be restored to the paths that
    /// `spec` has for them. A path where there is a file already is an error unless `existing` says otherwise.
    ///
    /// # Errors
    /// The snapshot is damaged, or a file is in the way.
    pub fn open(chain: &Chain, state: &State, spec: &VmSpec, existing: Existing) -> Result<Self, Error> {
        if !state.names().any(|name| name == SECTION) {
            return Ok(Self { disks: Vec::new() });
        }
        let SavedDisks { disks } = state.read(SECTION)?;
        let mut ids = HashSet::new();
        if let Some(twice) = disks.iter().find(|saved| !ids.insert(&saved.id)) {
            return Err(unusable(chain, twice, "the snapshot lists it twice".to_owned()));
        }
        let disks = disks
            .into_iter()
            .map(|saved| DiskImage::open(chain, spec, saved, existing));
        Ok(Self {
            disks: disks.collect::<Result<_, _>>()?,
        })
    }

    /// Creates the files.
    ///
    /// # Errors
    /// The system refuses. Nothing is left behind.
    pub fn create(self) -> Result<NewDisks, Error> {
        let disks = self.disks.into_iter().map(NewDisk::create);
        Ok(NewDisks {
            disks: disks.collect::<Result<_, _>>()?,
        })
    }
}

impl DiskImage {
    fn open(chain: &Chain, spec: &VmSpec, saved: SavedDisk, existing: Existing) -> Result<Self, Error> {
        let refuse = |reason| unusable(chain, &saved, reason);
        let image = chain.image(&image_name(&saved.id))?;
        let SavedDisk { id, bytes } = &saved;
        if *bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(refuse(format!("{bytes} bytes are not whole sectors")));
        }
        if image.page_bytes() != PAGE_BYTES || image.pages() != pages_of(*bytes) {
            let (pages, page_bytes) = (image.pages(), image.page_bytes());
            return Err(refuse(format!(
                "{bytes} bytes do not make {pages} pages of {page_bytes}"
            )));
        }
        let mut disks = spec.disks.iter().enumerate();
        let Some((_, disk)) = disks.find(|(index, disk)| disk.id_at(*index) == *id) else {
            return Err(refuse("the VM has no such disk".to_owned()));
        };
        if disk.readonly {
            return Err(refuse("the VM's disk of this id can only be read".to_owned()));
        }
        let path = target(id, &disk.path, existing)?;
        Ok(Self {
            saved,
            image,
            path,
            existing,
        })
    }
}

/// Where a disk goes that is to be at `path`: there, or where that leads to.
///
/// # Errors
/// What is there is in the way: it is to be kept, is no file, or somebody uses it.
pub fn target(id: &str, path: &Path, existing: Existing) -> Result<PathBuf, Error> {
    let failed = |action| disk_file(id, path, action);
    match fs::symlink_metadata(path) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path.to_owned()),
        Err(error) => return Err(failed("examine")(error)),
    }
    let is_file = fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    if existing == Existing::Kept || !is_file {
        return Err(Error::DiskExists {
            id: id.to_owned(),
            path: path.to_owned(),
            replaceable: is_file,
        });
    }
    let file = File::open(path).map_err(failed("open"))?;
    // As a disk of a VM it is locked.
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => fs::canonicalize(path).map_err(failed("find")),
        Err(Errno::WOULDBLOCK) => Err(block::in_use(&file, path).into()),
        Err(error) => Err(failed("lock")(error.into())),
    }
}

impl NewDisk {
    fn create(from: DiskImage) -> Result<Self, Error> {
        let failed = |action| disk_file(&from.saved.id, &from.path, action);
        let file = unfinished::create(&from.path).map_err(failed("create"))?;
        file.as_file()
            .set_len(from.saved.bytes)
            .map_err(failed("give its size to"))?;
        Ok(Self {
            workers: from.image.useful_readers().clamp(1, WORKERS_MAX),
            from,
            file,
        })
    }

    /// Makes it permanent under its name.
    fn publish(self) -> Result<(), Error> {
        let DiskImage {
            saved, path, existing, ..
        } = self.from;
        let failed = |action| disk_file(&saved.id, &path, action);
        self.file.as_file().sync_all().map_err(failed("sync"))?;
        let published = match existing {
            Existing::Kept => self.file.persist_noclobber(&path),
            Existing::Replaced => self.file.persist(&path),
        };
        if let Err(PersistError { error, file }) = published {
            // What the guest has written since is in no other place.
            return Err(match file.keep() {
                Ok((_, kept)) => disk_file(&saved.id, &unfinished::set_aside(kept), "give its name to")(error),
                Err(lost) => failed("keep")(lost.error),
            });
        }
        let synced = File::open(directory_of(&path)).and_then(|directory| directory.sync_all());
        synced.map_err(failed("sync the directory of"))
    }
}

impl NewDisks {
    /// `spec` with the files in the place of those they will replace: what the machine is to be built of.
    pub fn spec(&self, spec: &VmSpec) -> VmSpec {
        let mut spec = spec.clone();
        for (index, disk) in spec.disks.iter_mut().enumerate() {
            let id = disk.id_at(index);
            if let Some(new) = self.disks.iter().find(|new| new.from.saved.id == id) {
                disk.path = new.file.path().to_owned();
            }
        }
        spec
    }

    /// Begins to fill them behind `devices`, which were made of [`spec`](Self::spec) and are still stopped. Each has a
    /// thread, or several where the snapshot is far away, which call `on_thread` first.
    ///
    /// # Errors
    /// A thread cannot be created.
    pub fn fill(self, devices: &DeviceManager, on_thread: &OnThread, then: WhenFilled) -> Result<DiskFilling, Error> {
        self.fill_all(devices.disks(), on_thread, then)
    }

    pub(super) fn fill_all<'a>(
        mut self,
        disks: impl Iterator<Item = (&'a str, MutexGuard<'a, Block>)>,
        on_thread: &OnThread,
        then: WhenFilled,
    ) -> Result<DiskFilling, Error> {
        let mut held = Vec::new();
        for (id, mut block) in disks {
            if let Some(position) = self.disks.iter().position(|disk| disk.from.saved.id == id) {
                let disk = self.disks.swap_remove(position);
                let copier = block.hold(Holds::Everything, ChunkSet::all(disk.from.saved.bytes))?;
                held.push((disk, copier));
            }
        }
        let total = held.iter().map(|(_, copier)| copier.bytes_left()).sum();
        let mut filling = DiskFilling {
            state: Arc::new(FillState {
                total,
                left: AtomicU64::new(total),
                given_up: AtomicBool::new(false),
                unfinished: Mutex::new(held.len()),
                finished: Condvar::new(),
                then,
            }),
            threads: Vec::new(),
        };
        if held.is_empty() {
            (filling.state.then.done)();
        }
        for (disk, copier) in held {
            let workers = disk.workers;
            let work = Arc::new(Work {
                disk,
                copier,
                state: filling.state.clone(),
            });
            // Nobody but the threads has it: the last of them completes the disk.
            for share in iter::repeat_n(work, workers) {
                filling.spawn(share, on_thread)?;
            }
        }
        Ok(filling)
    }
}

impl Work {
    /// Fills what nobody else fills, what the guest waits for first.
    fn fill(&self) -> Result<(), Error> {
        let NewDisk { from, file, .. } = &self.disk;
        let mut reader = from.image.reader()?;
        while !self.state.given_up.load(Ordering::Relaxed)
            && let Some(wanted) = self.copier.next_chunks()
        {
            let mut rest = wanted;
            while !rest.is_empty() {
                let found = reader.at(rest.start / CHUNK_SIZE)?;
                let Found { count, bytes } = found.expect("an image has as many pages as its disk has chunks");
                let end = rest.start.saturating_add(count.saturating_mul(CHUNK_SIZE));
                let filled = match bytes {
                    // All of this is zero, as the file is where it is not filled: others find that too.
                    None => rest.start..end,
                    Some(content) => {
                        let filled = rest.start..end.min(rest.end);
                        let len = usize::try_from(filled.end - filled.start).expect("a few chunks");
                        let written = file.as_file().write_all_at(&content[..len], filled.start);
                        written.map_err(disk_file(&from.saved.id, &from.path, "fill"))?;
                        filled
                    }
                };
                let released = self.copier.release(&filled);
                self.state.left.fetch_sub(released, Ordering::Relaxed);
                rest.start = filled.end;
            }
        }
        Ok(())
    }

    /// Ends one thread's share; the last one gives the disk its name, if it is complete.
    fn end(self: Arc<Self>, filled: Result<(), Error>) {
        let state = self.state.clone();
        if let Err(error) = filled {
            // Whoever is told may end the process at once. If it cannot be removed, it still does not have a disk's name.
            let _ = fs::remove_file(self.disk.file.path());
            state.fail(error);
            return;
        }
        if let Some(Self { disk, copier, .. }) = Arc::into_inner(self)
            && copier.bytes_left() == 0
        {
            let published = disk.publish();
            // Whoever waits for the disk may hold it himself, or replace it.
            drop(copier);
            match published {
                Ok(()) => state.one_is_complete(),
                Err(error) => state.fail(error),
            }
        }
    }
}

impl DiskFilling {
    fn spawn(&mut self, work: Arc<Work>, on_thread: &OnThread) -> Result<(), Error> {
        let on_thread = on_thread.clone();
        let fill = move || {
            on_thread();
            let filled = work.fill();
            work.end(filled);
        };
        let thread = thread::Builder::new()
            .name("disk-fill".to_owned())
            .stack_size(THREAD_STACK_SIZE)
            .spawn(fill)
            .map_err(Error::os("create a thread that fills a disk"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        let total = self.state.total;
        Progress {
            done: total - self.state.left.load(Ordering::Relaxed),
            total,
        }
    }

    /// Waits until all disks are there under their names, or that is no longer `wanted`: after that changed, whoever
    /// waits has to be [woken](Self::wake). Whoever ends the VM, or builds its machine anew, waits first.
    pub fn wait(&self, wanted: &dyn Fn() -> bool) {
        let unfinished = self.state.unfinished();
        let wait = |unfinished: &mut usize| *unfinished > 0 && wanted();
        let finished = self.state.finished.wait_while(unfinished, wait);
        drop(finished.unwrap_or_else(PoisonError::into_inner));
    }

    /// Has those who wait look again whether they want to.
    pub fn wake(&self) {
        // Whoever holds the lock has looked already, or not yet.
        drop(self.state.unfinished());
        self.state.finished.notify_all();
    }
}

impl Drop for DiskFilling {
    fn drop(&mut self) {
        self.state.given_up.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of the thread was reported by the panic hook when it happened.
            drop(thread.join());
        }
    }
}

impl FillState {
    fn unfinished(&self) -> MutexGuard<'_, usize> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn one_is_complete(&self) {
        let mut unfinished = self.unfinished();
        *unfinished -= 1;
        if *unfinished == 0 {
            self.finished.notify_all();
            drop(unfinished);
            (self.then.done)();
        }
    }

    /// A disk can never be complete, so none has to be. Only the first failure is told.
    fn fail(&self, error: Error) {
        if !self.given_up.swap(true, Ordering::Relaxed) {
            (self.then.failed)(error);
        }
    }
}

/// The disk of `chain` cannot be restored.
fn unusable(chain: &Chain, saved: &SavedDisk, reason: String) -> Error {
    Error::SavedDisk {
        snapshot: chain.newest().path.clone(),
        id: saved.id.clone(),
        reason,
    }
}

/// For `map_err`: the system refused `action` on the file of disk `id`.
fn disk_file(id: &str, path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::DiskFile {
        id: id.to_owned(),
        path: path.to_owned(),
        action,
        source,
    }
}
