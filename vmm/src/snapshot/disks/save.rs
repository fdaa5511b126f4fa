//! Saving disks: chunks are held at the moment of the snapshot, and copied into images afterwards.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};

use cutover_devices::virtio::block::Block;
use cutover_devices::virtio::block::chunks::{CHUNK_SIZE, ChunkSet};
use cutover_devices::virtio::block::gate::Holds;
use cutover_devices::virtio::block::written::{Consumer, Taken};
use cutover_devices::{OnThread, THREAD_STACK_SIZE};
use cutover_snapshot::image::{ImageWriter, Layout, Shape};
use cutover_snapshot::manifest::Base;
use cutover_snapshot::section::SectionWriter;
use cutover_snapshot::writer::SnapshotWriter;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::pieces::Pieces;
use super::{PAGE_BYTES, SECTION, SavedDisk, SavedDisks, image_name, pages_of};
use crate::Error;
use crate::device_manager::DeviceManager;
use crate::dirty::Baseline;

/// Is told of bytes that are dealt with, and says whether to go on.
pub type Watch = Arc<dyn Fn(u64) -> Result<(), Error> + Send + Sync>;

/// Knows what changed on every disk that can be written since it was last saved.
pub struct DiskTracks {
    /// By the id of the disk.
    tracks: BTreeMap<String, Track>,
}

struct Track {
    consumer: Consumer,
    /// The disk's image, unless it was replaced meanwhile.
    image: Mutex<Weak<File>>,
    /// Whether [`DiskTracks::settle`] was called for it since the disk was last held.
    settled: AtomicBool,
}

/// Disks as they were at one moment. Dropped, they are as if nothing had been held or taken.
#[derive(Default)]
pub struct HeldDisks {
    disks: Vec<HeldDisk>,
}

struct HeldDisk {
    saved: SavedDisk,
    base: Base,
    pieces: Pieces,
    /// Whether it may be copied by sharing blocks.
    shares: bool,
    taken: Taken,
}

/// Disks that are being copied. Dropped, the threads give up, and all is as if nothing had been held or taken.
pub struct DiskCopies {
    copies: Vec<DiskCopy>,
    given_up: Arc<AtomicBool>,
}

struct DiskCopy {
    saved: SavedDisk,
    thread: JoinHandle<Result<(ImageWriter, Taken), Error>>,
}

/// What is news no more once the snapshot is permanent; put back when dropped.
#[must_use = "what is dropped without being committed will be saved again"]
pub struct CopiedDisks {
    taken: Vec<Taken>,
}

impl DiskTracks {
    /// Begins to track the disks of `devices` that can be written.
    pub fn register(devices: &DeviceManager, baseline: Baseline) -> Self {
        Self::of(devices.disks(), baseline)
    }

    pub(super) fn of<'a>(disks: impl Iterator<Item = (&'a str, MutexGuard<'a, Block>)>, baseline: Baseline) -> Self {
        let writable = disks.filter(|(_, block)| !block.disk().readonly());
        let tracks = writable.map(|(id, block)| {
            let consumer = match baseline {
                Baseline::Now => block.writes().register(),
                Baseline::Nothing => block.writes().register_anew(),
            };
            let track = Track {
                consumer,
                image: Mutex::new(Arc::downgrade(block.disk().file())),
                settled: AtomicBool::new(false),
            };
            (id.to_owned(), track)
        });
        Self {
            tracks: tracks.collect(),
        }
    }

    /// Brings the disks that will be held `whole` to stable storage, while the guest still runs. Only then are they
    /// copied by sharing their blocks, where that is possible: a file system brings to stable storage first what is to be
    /// shared, and the guest could not write for so long.
    pub fn settle(&self, whole: impl Fn(&str) -> bool) {
        let tracks = self.tracks.iter().filter(|(id, _)| whole(id));
        tracks.for_each(|(_, track)| track.settle());
    }

    /// Holds the disks of `devices`, which are stopped, as they are: those that are `whole` completely, of others what
    /// changed since they were last saved. It costs nothing that grows with what they hold.
    ///
    /// # Errors
    /// A restore still fills one of them.
    pub fn hold(&self, devices: &DeviceManager, whole: impl Fn(&str) -> bool) -> Result<HeldDisks, Error> {
        self.hold_all(devices.disks(), whole)
    }

    pub(super) fn hold_all<'a>(
        &self,
        disks: impl Iterator<Item = (&'a str, MutexGuard<'a, Block>)>,
        whole: impl Fn(&str) -> bool,
    ) -> Result<HeldDisks, Error> {
        let mut held = HeldDisks::default();
        for (id, mut block) in disks {
            let Some(track) = self.tracks.get(id) else {
                continue;
            };
            let taken = track.consumer.take();
            let bytes = block.disk().size();
            let image = block.disk().file().clone();
            let settled = track.is_settled(&image);
            let whole = whole(id);
            let chunks = if whole {
                ChunkSet::all(bytes)
            } else {
                taken.chunks().clone()
            };
            held.disks.push(HeldDisk {
                saved: SavedDisk {
                    id: id.to_owned(),
                    bytes,
                },
                // What is complete needs no parent.
                base: if chunks.len() == pages_of(bytes) {
                    Base::Zero
                } else {
                    Base::Parent
                },
                pieces: Pieces::held(image, block.hold(Holds::Writes, chunks)?),
                shares: whole && settled,
                taken,
            });
        }
        Ok(held)
    }
}

impl Track {
    fn image(&self) -> MutexGuard<'_, Weak<File>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self) {
        let image = self.image().upgrade();
        let synced = image.is_some_and(|image| image.sync_data().is_ok());
        self.settled.store(synced, Ordering::Relaxed);
    }

    /// Whether `image`, which the disk has now, was settled since the last call.
    fn is_settled(&self, image: &Arc<File>) -> bool {
        let settled = self.settled.swap(false, Ordering::Relaxed);
        let known = std::mem::replace(&mut *self.image(), Arc::downgrade(image));
        settled && known.ptr_eq(&Arc::downgrade(image))
    }
}

impl HeldDisks {
    /// Bytes to deal with: read, or found to be holes.
    pub fn bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.pieces.bytes_left()).sum()
    }

    /// Begins to copy them into images of `writer`, each on a thread that calls `on_thread` first and tells `watch` what
    /// it does. Pages are compressed at level `compress`.
    ///
    /// # Errors
    /// An image or a thread cannot be created.
    pub fn start(
        self,
        writer: &mut SnapshotWriter,
        compress: Option<i32>,
        watch: &Watch,
        on_thread: &OnThread,
    ) -> Result<DiskCopies, Error> {
        let mut copies = DiskCopies {
            copies: Vec::new(),
            given_up: Arc::default(),
        };
        for disk in self.disks {
            let saved = disk.saved.clone();
            let image = writer.image(&image_name(&saved.id), disk.shape(compress))?;
            let (watch, given_up, on_thread) = (watch.clone(), copies.given_up.clone(), on_thread.clone());
            let copy = move || {
                on_thread();
                disk.copy(image, &|bytes| {
                    if given_up.load(Ordering::Relaxed) {
                        return Err(Error::SnapshotCancelled);
                    }
                    watch(bytes)
                })
            };
            let thread = thread::Builder::new()
                .name("disk-copy".to_owned())
                .stack_size(THREAD_STACK_SIZE)
                .spawn(copy)
                .map_err(Error::os("create a thread that copies a disk"))?;
            copies.copies.push(DiskCopy { saved, thread });
        }
        Ok(copies)
    }
}

impl HeldDisk {
    fn shape(&self, compress: Option<i32>) -> Shape {
        Shape {
            page_bytes: PAGE_BYTES,
            pages: pages_of(self.saved.bytes),
            base: self.base,
            layout: match (compress, self.base) {
                (Some(level), _) => Layout::Compressed { level },
                (None, Base::Zero) => Layout::Flat,
                (None, Base::Parent) => Layout::Packed,
            },
        }
    }

    /// Copies what is held into `to`, and lets go of it piece by piece.
    fn copy(
        mut self,
        mut to: ImageWriter,
        watch: &dyn Fn(u64) -> Result<(), Error>,
    ) -> Result<(ImageWriter, Taken), Error> {
        if self.shares {
            self.pieces.share_blocks(self.saved.bytes);
        }
        let mut buffer = Vec::new();
        while let Some(mut piece) = self.pieces.next_piece() {
            while let Some(hole) = self.hole_at(&piece) {
                watch(self.pieces.is_read(&hole))?;
                piece.start = hole.end;
            }
            if !piece.is_empty() {
                self.read(&piece, &mut buffer)?;
                // In memory they are safe: the guest need not wait for them to be written.
                watch(self.pieces.is_read(&piece))?;
                to.put(piece.start / CHUNK_SIZE, &buffer)?;
            }
        }
        debug_assert_eq!(self.pieces.bytes_left(), 0, "each piece is named once");
        Ok((to, self.taken))
    }

    /// Fills `buffer` with the content of `bytes`, and with zeroes up to the end of the last page.
    fn read(&self, bytes: &Range<u64>, buffer: &mut Vec<u8>) -> Result<(), Error> {
        let len = usize::try_from(bytes.end - bytes.start).expect("a few chunks");
        buffer.clear();
        buffer.resize(len.next_multiple_of(PAGE_BYTES as usize), 0);
        let read = self.pieces.file().read_exact_at(&mut buffer[..len], bytes.start);
        read.map_err(|source| Error::ReadDisk {
            id: self.saved.id.clone(),
            offset: bytes.start,
            source,
        })
    }

    /// Whole chunks from the start of `bytes` on, if there are any bytes, that the file has no data for and the image need
    /// not mention: nobody writes them before they are released.
    fn hole_at(&self, bytes: &Range<u64>) -> Option<Range<u64>> {
        if self.base == Base::Parent || bytes.is_empty() {
            return None;
        }
        let data = match seek(self.pieces.file(), SeekFrom::Data(bytes.start)) {
            Ok(data) => data / CHUNK_SIZE * CHUNK_SIZE,
            Err(Errno::NXIO) => self.saved.bytes,
            // Not a file, or a file system that cannot tell.
            Err(_) => return None,
        };
        (data > bytes.start).then_some(bytes.start..data.min(self.saved.bytes))
    }
}

impl DiskCopies {
    /// Waits for the threads, and completes the images of `writer`, which is the one they were begun with.
    ///
    /// # Errors
    /// A disk cannot be read, an image not be written, or it was cancelled.
    pub fn finish(mut self, writer: &mut SnapshotWriter) -> Result<CopiedDisks, Error> {
        let (mut disks, mut taken) = (Vec::new(), Vec::new());
        while !self.copies.is_empty() {
            let copy = self.copies.remove(0);
            let (image, of_disk) = join(copy.thread)?;
            writer.complete(image)?;
            disks.push(copy.saved);
            taken.push(of_disk);
        }
        writer.section(SECTION, &SavedDisks { disks })?;
        Ok(CopiedDisks { taken })
    }
}

impl Drop for DiskCopies {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
        for copy in self.copies.drain(..) {
            // Why the snapshot failed is known already.
            drop(copy.thread.join());
        }
    }
}

impl CopiedDisks {
    /// The snapshot is permanent.
    pub fn commit(self) {
        self.taken.into_iter().for_each(Taken::commit);
    }
}

fn join<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
}
