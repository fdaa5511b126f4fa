//! Disks that move with the VM.
//!
//! ```text
//!  source       the disk's image ── read ═══ as memory does, page by page ═══ write ──► .NAME.…partial ── run ──► NAME
//!               its log of writes ─► dirty                                               ▲
//!                                                        an older NAME, if there is one ─┘ copied on this host
//! ```
//! At the destination a disk has its name only when the VM runs there: until then an older copy is what it was, and what
//! fails leaves nothing behind. Of an older copy only what differs comes over the link.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cutover_devices::virtio::block::written::Consumer;
use cutover_migration::pages::{PAGE_BYTES, PageBits};
use cutover_migration::vm::{Image, ImageShape, VmError};
use cutover_snapshot::spec::VmSpec;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use crate::Error;
use crate::device_manager::DeviceManager;
use crate::dirty::PAGE_SIZE;
use crate::snapshot::directory_of;
use crate::snapshot::disks::{Existing, image_name, target, unfinished};

/// Bytes of a sector: a disk has whole ones.
const SECTOR_BYTES: u64 = 512;
/// Bytes of an older copy that are copied at once.
const COPY_BYTES: u64 = 1 << 20;
/// Zeroes, for file systems that cannot make holes.
const ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// A disk's image as pages. The last one may be only partly on the disk.
struct DiskImage {
    file: Arc<File>,
    bytes: u64,
    starts_empty: bool,
    /// Whether something was written that is not permanent yet.
    unsettled: AtomicBool,
}

/// The disks of a VM that move away with it.
#[derive(Default)]
pub struct MovingDisks {
    disks: Vec<MovingDisk>,
}

struct MovingDisk {
    id: String,
    image: Arc<DiskImage>,
    writes: Consumer,
}

/// Files for disks that move in. Dropped before they are [published](Self::publish), they are gone.
#[derive(Default)]
pub struct NewDisks {
    disks: Vec<NewDisk>,
}

struct NewDisk {
    id: String,
    path: PathBuf,
    file: NamedTempFile,
    image: Arc<DiskImage>,
}

impl DiskImage {
    fn new(file: Arc<File>, bytes: u64, starts_empty: bool) -> Arc<Self> {
        Arc::new(Self {
            file,
            bytes,
            starts_empty,
            unsettled: AtomicBool::new(false),
        })
    }

    /// Where `pages` are, as far as the disk goes.
    fn bytes_of(&self, pages: &Range<u64>) -> io::Result<Range<u64>> {
        if pages.start > pages.end || pages.end > self.pages() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(pages.start * PAGE_SIZE..(pages.end * PAGE_SIZE).min(self.bytes))
    }

    /// Those of its pages that may not be zero: what the file system has something for.
    fn data(&self) -> PageBits {
        let mut data = PageBits::full(self.pages());
        let mut at = 0;
        while at < self.bytes {
            let next = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(next) => next,
                Err(Errno::NXIO) => self.bytes,
                // Not a file, or a file system that cannot tell.
                Err(_) => return data,
            };
            data.remove_range(at.div_ceil(PAGE_SIZE)..next.min(self.bytes) / PAGE_SIZE);
            at = match seek(&self.file, SeekFrom::Hole(next)) {
                Ok(hole) => hole,
                Err(_) => return data,
            };
        }
        data
    }
}

impl Image for DiskImage {
    fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE)
    }

    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes_of(&pages)?;
        let len = usize::try_from(bytes.end - bytes.start).map_err(io::Error::other)?;
        let (on_disk, beyond) = into.split_at_mut_checked(len).ok_or(io::ErrorKind::InvalidInput)?;
        self.file.read_exact_at(on_disk, bytes.start)?;
        beyond.fill(0);
        Ok(())
    }

    fn write(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()> {
        let bytes = self.bytes_of(&pages)?;
        let len = usize::try_from(bytes.end - bytes.start).map_err(io::Error::other)?;
        let on_disk = content.get(..len).ok_or(io::ErrorKind::InvalidInput)?;
        self.unsettled.store(true, Ordering::Relaxed);
        self.file.write_all_at(on_disk, bytes.start)
    }

    fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        let bytes = self.bytes_of(&pages)?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.unsettled.store(true, Ordering::Relaxed);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, hole, bytes.start, bytes.end - bytes.start) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP) => pages
                .into_iter()
                .try_for_each(|page| self.write(page..page + 1, &ZEROES)),
            Err(error) => Err(error.into()),
        }
    }

    fn starts_empty(&self) -> bool {
        self.starts_empty
    }

    fn settle(&self) -> io::Result<()> {
        if self.unsettled.swap(false, Ordering::Relaxed) {
            self.file.sync_data()?;
        }
        Ok(())
    }
}

impl MovingDisks {
    /// Those of `devices` that can be written; from here on their writes are watched.
    pub fn of(devices: &DeviceManager) -> Self {
        let writable = devices.disks().filter(|(_, block)| !block.disk().readonly());
        let disks = writable.map(|(id, block)| MovingDisk {
            id: id.to_owned(),
            writes: block.writes().register_anew(),
            image: DiskImage::new(block.disk().file().clone(), block.disk().size(), false),
        });
        Self { disks: disks.collect() }
    }

    /// What they are to the destination.
    pub fn shapes(&self) -> impl Iterator<Item = ImageShape> {
        self.disks.iter().map(|disk| ImageShape {
            name: image_name(&disk.id),
            pages: disk.image.pages(),
            bytes: disk.image.bytes,
            data: disk.image.data().len() * PAGE_SIZE,
        })
    }

    /// Their images.
    pub fn images(&self) -> impl Iterator<Item = Arc<dyn Image>> {
        self.disks.iter().map(|disk| disk.image.clone() as Arc<dyn Image>)
    }

    /// For each what was written since the last time; the `first` time all that may not be zero.
    ///
    /// # Errors
    /// One was replaced by another.
    pub fn take(&self, first: bool) -> Result<Vec<PageBits>, VmError> {
        let disks = self.disks.iter();
        disks.map(|disk| disk.take(first)).collect()
    }
}

impl MovingDisk {
    fn take(&self, first: bool) -> Result<PageBits, VmError> {
        let taken = self.writes.take();
        let (then, now) = (self.image.bytes, taken.chunks().disk_size());
        if then != now {
            let id = &self.id;
            return Err(format!("disk '{id}' of {then} bytes was replaced by one of {now} while it moved").into());
        }
        let mut pages = PageBits::empty(self.image.pages());
        for bytes in taken.chunks().ranges() {
            pages.insert_range(bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE));
        }
        taken.commit();
        if first {
            // What is written from here on is in the next one.
            pages.intersect(&self.image.data());
        }
        Ok(pages)
    }
}

impl NewDisks {
    /// Makes the files of the disks of `spec` that `shapes` tell of, each as an older copy has it, or empty.
    ///
    /// # Errors
    /// Why that cannot be. Nothing is left behind.
    pub fn create(spec: &VmSpec, shapes: &[ImageShape]) -> Result<Self, Error> {
        let mut new = Self::default();
        for shape in shapes {
            let disks = spec.disks.iter().enumerate();
            let writable = disks.filter(|(_, disk)| !disk.readonly);
            let found = writable.map(|(index, disk)| (disk.id_at(index), disk));
            let mut found = found.filter(|(id, _)| image_name(id) == shape.name);
            let is_disk = shape.bytes > 0 && shape.bytes.is_multiple_of(SECTOR_BYTES);
            let has_its_pages = shape.bytes.div_ceil(PAGE_SIZE) == shape.pages;
            let disk = found.next().filter(|(id, _)| is_disk && has_its_pages && !new.has(id));
            let Some((id, disk)) = disk else {
                return Err(cutover_migration::Error::Invalid {
                    what: "a disk that moves",
                    reason: format!("the VM has no such disk that can be written: {shape:?}"),
                }
                .into());
            };
            new.disks.push(NewDisk::create(id, &disk.path, shape.bytes)?);
        }
        Ok(new)
    }

    /// Their images.
    pub fn images(&self) -> impl Iterator<Item = Arc<dyn Image>> {
        self.disks.iter().map(|disk| disk.image.clone() as Arc<dyn Image>)
    }

    /// `spec` with the files in the place of those they will be: what the machine is to be built of.
    pub fn spec(&self, spec: &VmSpec) -> VmSpec {
        let mut spec = spec.clone();
        for (index, disk) in spec.disks.iter_mut().enumerate() {
            let id = disk.id_at(index);
            if let Some(new) = self.disks.iter().find(|new| new.id == id) {
                disk.path = new.file.path().to_owned();
            }
        }
        spec
    }

    /// Gives them their names, in the place of older copies.
    ///
    /// # Errors
    /// The system refuses.
    pub fn publish(self) -> Result<(), Error> {
        self.disks.into_iter().try_for_each(NewDisk::publish)
    }

    fn has(&self, id: &str) -> bool {
        self.disks.iter().any(|disk| disk.id == id)
    }
}

impl NewDisk {
    /// The file for disk `id` of `bytes` bytes, which is to be at `path`.
    fn create(id: String, path: &Path, bytes: u64) -> Result<Self, Error> {
        let path = target(&id, path, Existing::Replaced)?;
        let create = || -> io::Result<(NamedTempFile, bool)> {
            let file = unfinished::create(&path)?;
            file.as_file().set_len(bytes)?;
            let older = match File::open(&path) {
                Ok(older) => Some(older),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            if let Some(older) = &older {
                copy(older, file.as_file(), bytes)?;
            }
            Ok((file, older.is_none()))
        };
        let (file, starts_empty) = create().map_err(|source| failed(&id, &path, "create", source))?;
        let opened = file.as_file().try_clone();
        let opened = opened.map_err(|source| failed(&id, &path, "open", source))?;
        Ok(Self {
            id,
            image: DiskImage::new(Arc::new(opened), bytes, starts_empty),
            path,
            file,
        })
    }

    fn publish(self) -> Result<(), Error> {
        let Self { id, path, file, .. } = self;
        if let Err(error) = file.persist(&path) {
            return Err(failed(&id, &path, "give its name to", error.error));
        }
        let synced = File::open(directory_of(&path)).and_then(|directory| directory.sync_all());
        synced.map_err(|source| failed(&id, &path, "sync the directory of", source))
    }
}

fn failed(id: &str, path: &Path, action: &'static str, source: io::Error) -> Error {
    Error::DiskFile {
        id: id.to_owned(),
        path: path.to_owned(),
        action,
        source,
    }
}

/// Copies what there is of `from`, `bytes` at most, to `to`, which is as long as that and empty. Holes stay holes.
fn copy(from: &File, to: &File, bytes: u64) -> io::Result<()> {
    let end = bytes.min(from.metadata()?.len());
    let mut buffer = vec![0; usize::try_from(COPY_BYTES.min(end)).map_err(io::Error::other)?];
    let mut at = 0;
    while at < end {
        at = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            // A file system that cannot tell.
            Err(_) => at,
        };
        let len = usize::try_from(end.saturating_sub(at).min(COPY_BYTES)).map_err(io::Error::other)?;
        let piece = &mut buffer[..len];
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use cutover_snapshot::spec::DiskSpec;
    use tempfile::TempDir;

    use super::*;

    /// Not whole pages, nor whole chunks.
    const BYTES: u64 = 100 * PAGE_SIZE + 3 * SECTOR_BYTES;

    fn image(content: &[u8]) -> Arc<DiskImage> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        DiskImage::new(Arc::new(file), content.len() as u64, true)
    }

    /// A spec with a disk at each of `paths`.
    fn spec(paths: &[PathBuf]) -> VmSpec {
        let disk = |path| serde_json::from_value::<DiskSpec>(serde_json::json!({ "path": path })).unwrap();
        VmSpec {
            disks: paths.iter().map(disk).collect(),
            ..crate::testing::tiny_spec(Path::new("kernel"))
        }
    }

    fn shape(id: &str, bytes: u64) -> ImageShape {
        ImageShape {
            name: image_name(id),
            pages: bytes.div_ceil(PAGE_SIZE),
            bytes,
            data: bytes,
        }
    }

    fn files(directory: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_last_page_is_as_long_as_the_disk_and_zero_beyond() {
        let image = image(&vec![7; usize::try_from(BYTES).unwrap()]);
        assert_eq!(image.pages(), 101);
        let mut content = [1; 2 * PAGE_BYTES];
        image.read(99..101, &mut content).unwrap();
        assert!(content[..PAGE_BYTES + 1536].iter().all(|&byte| byte == 7));
        assert!(content[PAGE_BYTES + 1536..].iter().all(|&byte| byte == 0));
        image.write(100..101, &[9; PAGE_BYTES]).unwrap();
        assert_eq!(image.file.metadata().unwrap().len(), BYTES);
        image.zero(99..101).unwrap();
        image.settle().unwrap();
        assert_eq!(image.file.metadata().unwrap().len(), BYTES);
        image.read(98..100, &mut content).unwrap();
        assert_eq!((content[0], content[PAGE_BYTES]), (7, 0));
    }

    #[test]
    fn pages_a_disk_does_not_have_are_refused() {
        let image = image(&[0; 4096]);
        assert!(image.read(1..2, &mut [0; PAGE_BYTES]).is_err());
        assert!(image.write(0..2, &[0; 2 * PAGE_BYTES]).is_err());
        assert!(image.write(0..1, &[0; 9]).is_err(), "too little content");
        assert!(image.zero(0..u64::MAX).is_err());
    }

    #[test]
    fn what_was_never_written_need_not_be_sent() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; PAGE_BYTES], 32 << 20).unwrap();
        let image = DiskImage::new(Arc::new(file), 64 << 20, true);
        let data = image.data();
        assert!(data.contains((32 << 20) / PAGE_SIZE));
        assert!(data.len() <= 512, "holes are left out, as far as the file system tells");
    }

    #[test]
    fn a_disk_is_there_when_it_is_published_and_not_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.img");
        let spec = spec(std::slice::from_ref(&path));
        let create = || NewDisks::create(&spec, &[shape("disk0", BYTES)]).unwrap();
        let given_up = create();
        assert_ne!(given_up.spec(&spec).disks[0].path, path);
        drop(given_up);
        assert!(files(&directory).is_empty());

        let new = create();
        let image = new.images().next().unwrap();
        assert!(image.starts_empty());
        image.write(3..4, &[5; PAGE_BYTES]).unwrap();
        assert!(!path.exists());
        new.publish().unwrap();
        assert_eq!(files(&directory), ["data.img"]);
        let content = fs::read(&path).unwrap();
        assert_eq!(content.len() as u64, BYTES);
        assert_eq!((content[3 * PAGE_BYTES - 1], content[3 * PAGE_BYTES]), (0, 5));
    }

    #[test]
    fn an_older_copy_is_begun_with_and_stays_what_it_is_until_the_disk_is_published() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.img");
        let older: Vec<u8> = (0..3_u32 << 20).map(|byte| (byte >> 10).to_le_bytes()[0]).collect();
        fs::write(&path, &older).unwrap();
        let spec = spec(std::slice::from_ref(&path));
        // Both longer and shorter than it was.
        for bytes in [4 << 20, BYTES] {
            let new = NewDisks::create(&spec, &[shape("disk0", bytes)]).unwrap();
            let image = new.images().next().unwrap();
            assert!(!image.starts_empty());
            let mut page = [0; PAGE_BYTES];
            image.read(5..6, &mut page).unwrap();
            assert!(page[..] == older[5 * PAGE_BYTES..6 * PAGE_BYTES]);
            image.write(5..6, &[0xee; PAGE_BYTES]).unwrap();
            drop(new);
            assert!(fs::read(&path).unwrap() == older);
        }
        let new = NewDisks::create(&spec, &[shape("disk0", BYTES)]).unwrap();
        new.publish().unwrap();
        assert!(fs::read(&path).unwrap() == older[..usize::try_from(BYTES).unwrap()]);
    }

    #[test]
    fn disks_that_the_vm_does_not_have_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut spec = spec(&[directory.path().join("a.img"), directory.path().join("b.img")]);
        spec.disks[1].readonly = true;
        let wrong = [
            vec![shape("disk9", BYTES)],
            vec![shape("disk1", BYTES)],
            vec![shape("disk0", BYTES), shape("disk0", BYTES)],
            vec![shape("disk0", 0)],
            vec![shape("disk0", 100)],
            vec![ImageShape {
                pages: 1,
                ..shape("disk0", BYTES)
            }],
        ];
        for shapes in wrong {
            assert!(NewDisks::create(&spec, &shapes).is_err(), "{shapes:?}");
        }
        assert!(files(&directory).is_empty());
    }
}
