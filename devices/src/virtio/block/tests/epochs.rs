//! A guest whose disk is protected: what it writes waits for a moment, and can be taken back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;
use crate::virtio::block::chunks::{CHUNK_SIZE, ChunkSet};
use crate::virtio::block::epochs::{DiskCut, REQUEST_BYTES_MAX};
use crate::virtio::block::gate::Holds;

const CHUNKS: u64 = 9;
const DISK_SIZE: u64 = (CHUNKS - 1) * CHUNK_SIZE + 512;

/// A guest, and its disk.
struct Protected {
    guest: Guest,
    block: Arc<Mutex<Block>>,
    image: Image,
}

impl Protected {
    /// A disk that is protected from cut 1 on.
    fn new(io: DiskIo) -> (Self, DiskCut) {
        let image = Image::new();
        fs::write(&image.path, pattern()).unwrap();
        let mut block = Block::open(&image.spec(io), &unconfined()).unwrap();
        let cut = begin(&mut block, 1);
        let block = Arc::new(Mutex::new(block));
        let mut guest = Guest::sharing(block.clone());
        guest.start(FLUSH);
        (Self { guest, block, image }, cut)
    }

    fn write(&mut self, sector: u64, byte: u8) {
        self.guest.write(BUFFER, &[byte; 512]);
        let data = [Piece::Out(BUFFER, 512)];
        assert_eq!(request(&mut self.guest, VIRTIO_BLK_T_OUT, sector, &data), (OK, 1));
    }

    /// Does `task` to the disk while it stands still.
    fn stopped<T>(&mut self, task: impl FnOnce(&mut Block) -> T) -> T {
        self.guest.transport.pause();
        let outcome = task(&mut self.block.lock().unwrap());
        self.guest.transport.resume();
        outcome
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.image.path).unwrap()
    }
}

fn begin(block: &mut Block, cut: u64) -> DiskCut {
    let none = ChunkSet::none(block.disk().size());
    block.begin_epochs(cut, none, Arc::new(|| {}), &unconfined()).unwrap()
}

/// What a disk has whose sectors all differ.
fn pattern() -> Vec<u8> {
    let word = |word: u64| (word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
    (0..DISK_SIZE / 8).flat_map(word).collect()
}

fn read(cut: &DiskCut) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(DISK_SIZE).unwrap()];
    cut.read(0, &mut content).unwrap();
    content
}

/// A sector for each `index`, all over the disk.
fn sector(index: u64) -> u64 {
    index * 977 % (DISK_SIZE / 512)
}

#[test]
fn what_is_sent_of_a_cut_is_what_the_disk_was_however_much_is_written_meanwhile() {
    for io in ENGINES {
        let (mut disk, first) = Protected::new(io);
        assert!(read(&first) == pattern());
        for round in 2..6_u8 {
            let before = disk.content();
            let cut = disk.stopped(|block| block.cut(round.into()).unwrap());
            let ended = Arc::new(AtomicBool::new(false));
            let done = ended.clone();
            let sent = thread::spawn(move || {
                let mut read_last = false;
                while !read_last {
                    read_last = done.load(Ordering::Acquire);
                    assert!(read(&cut) == before);
                }
            });
            for index in 0..40 {
                disk.write(sector(index + u64::from(round)), round);
            }
            ended.store(true, Ordering::Release);
            sent.join().unwrap();
            disk.block.lock().unwrap().make_permanent(round.into());
        }
    }
}

#[test]
fn a_guest_that_goes_back_finds_its_disk_as_it_was_at_the_cut() {
    for io in ENGINES {
        let (mut disk, _first) = Protected::new(io);
        disk.write(3, 1);
        let at_cut = disk.content();
        disk.stopped(|block| block.cut(2).map(drop).unwrap());
        for index in 0..60 {
            disk.write(sector(index), 0xdd);
        }
        clear(&mut disk.guest, VIRTIO_BLK_T_DISCARD, &segment(200, 300, 0));
        disk.stopped(|block| block.cut(3).map(drop).unwrap());
        disk.write(3, 2);
        disk.stopped(|block| block.roll_back(2).unwrap());
        assert!(disk.content() == at_cut);
        let data = [Piece::In(BUFFER, 512)];
        assert_eq!(request(&mut disk.guest, VIRTIO_BLK_T_IN, 3, &data), (OK, 513));
        assert_eq!(disk.guest.read(BUFFER, 512), [1; 512]);
        disk.write(4, 7);
        disk.stopped(|block| block.roll_back(1).unwrap());
        assert!(disk.content() == pattern());
    }
}

#[test]
fn a_snapshot_of_a_protected_disk_has_it_as_it_was_and_so_has_the_cut() {
    for io in ENGINES {
        let (mut disk, _first) = Protected::new(io);
        disk.write(0, 1);
        let before = disk.content();
        let (cut, copier) = disk.stopped(|block| {
            let all = ChunkSet::all(DISK_SIZE);
            (block.cut(2).unwrap(), block.hold(Holds::Writes, all).unwrap())
        });
        let refused = disk.stopped(|block| block.roll_back(1));
        assert!(matches!(refused, Err(DeviceError::DiskBeingCopied)));
        let file = File::open(&disk.image.path).unwrap();
        let copied = thread::spawn(move || {
            let mut copied = vec![0; usize::try_from(DISK_SIZE).unwrap()];
            while let Some(bytes) = copier.next_chunks() {
                let range = usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap();
                file.read_exact_at(&mut copied[range], bytes.start).unwrap();
                copier.release(&bytes);
            }
            copied
        });
        for index in 0..40 {
            disk.write(sector(index), 0xcc);
        }
        assert!(copied.join().unwrap() == before);
        assert!(read(&cut) == before);
    }
}

#[test]
fn a_protected_disk_keeps_its_image_and_one_that_is_filled_is_not_protected() {
    let (mut disk, _first) = Protected::new(DiskIo::Auto);
    let other = Image::new();
    let replace = |block: &mut Block| {
        let successor = block.disk().successor(&other.path).unwrap();
        block.replace(successor).map(drop)
    };
    assert!(matches!(disk.stopped(replace), Err(DeviceError::DiskProtected)));
    disk.stopped(Block::end_epochs);
    let copier = disk.stopped(|block| block.hold(Holds::Everything, ChunkSet::all(DISK_SIZE)).unwrap());
    let begun = disk.stopped(|block| {
        let none = ChunkSet::none(DISK_SIZE);
        block.begin_epochs(1, none, Arc::new(|| {}), &unconfined()).map(drop)
    });
    assert!(matches!(begun, Err(DeviceError::DiskBeingCopied)));
    copier.release(&(0..DISK_SIZE));
    drop(copier);
    disk.stopped(replace).unwrap();
}

#[test]
fn more_than_can_be_kept_is_not_cleared_at_once() {
    let image = Image::new();
    let size = REQUEST_BYTES_MAX + CHUNK_SIZE;
    File::options()
        .write(true)
        .open(&image.path)
        .unwrap()
        .set_len(size)
        .unwrap();
    let mut block = Block::open(&image.spec(DiskIo::Auto), &unconfined()).unwrap();
    begin(&mut block, 1);
    let mut guest = Guest::started(block, FLUSH);
    let sectors = u32::try_from(REQUEST_BYTES_MAX / 512).unwrap();
    let clear = |guest: &mut Guest, sectors| clear(guest, VIRTIO_BLK_T_WRITE_ZEROES, &segment(0, sectors, 0));
    assert_eq!(clear(&mut guest, sectors + 1), UNSUPPORTED);
    assert_eq!(image.read(0, SIZE), contents(0, SIZE));
    assert_eq!(clear(&mut guest, sectors), OK);
    assert_eq!(image.read(0, SIZE), vec![0; SIZE]);
}
