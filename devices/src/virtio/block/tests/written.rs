//! What a guest writes is recorded, whichever way it writes it, and what it reads is not.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::*;
use crate::virtio::block::chunks::CHUNK_SIZE;
use crate::virtio::block::written::Consumer;

fn taken(consumer: &Consumer) -> Vec<Range<u64>> {
    let taken = consumer.take();
    let ranges = taken.chunks().ranges().collect();
    taken.commit();
    ranges
}

fn one(range: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(range).collect()
}

fn chunk(first: u64) -> Vec<Range<u64>> {
    one(first * CHUNK_SIZE..(first + 1) * CHUNK_SIZE)
}

#[test]
fn writes_discards_and_zeroes_are_recorded_by_the_time_they_are_answered() {
    for io in ENGINES {
        let image = Image::new();
        let block = Block::open(&image.spec(io), &unconfined()).unwrap();
        let consumer = block.writes().register();
        let mut guest = Guest::started(block, FLUSH);
        request(&mut guest, VIRTIO_BLK_T_IN, 0, &[Piece::In(BUFFER, 512)]);
        request(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert_eq!(taken(&consumer), []);
        request(&mut guest, VIRTIO_BLK_T_OUT, 130, &[Piece::Out(BUFFER, 512)]);
        assert_eq!(taken(&consumer), chunk(1));
        clear(&mut guest, VIRTIO_BLK_T_DISCARD, &segment(0, 8, 0));
        assert_eq!(taken(&consumer), chunk(0));
        clear(&mut guest, VIRTIO_BLK_T_WRITE_ZEROES, &segment(136, 8, 0));
        assert_eq!(taken(&consumer), chunk(1));
        assert_eq!(taken(&consumer), []);
    }
}

#[test]
fn a_write_that_failed_is_recorded_as_some_of_it_may_be_there() {
    for io in ENGINES {
        let memfd = memfd_create("disk", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(memfd);
        (&file).write_all(&contents(0, SIZE)).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let block = Block::open(&spec(&path, io), &unconfined()).unwrap();
        let consumer = block.writes().register();
        let mut guest = Guest::started(block, FLUSH);
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        let answer = request(&mut guest, VIRTIO_BLK_T_OUT, 0, &[Piece::Out(BUFFER, 512)]);
        assert_eq!((answer, taken(&consumer)), ((IO_ERROR, 1), chunk(0)));
    }
}

#[test]
fn another_image_counts_as_written_throughout() {
    let (old, new) = (Image::new(), Image::new());
    let block = Arc::new(Mutex::new(Block::open(&old.spec(DiskIo::Auto), &unconfined()).unwrap()));
    let consumer = block.lock().unwrap().writes().register();
    let successor = block.lock().unwrap().disk().successor(&new.path).unwrap();
    block.lock().unwrap().replace(successor).unwrap();
    assert_eq!(taken(&consumer), one(0..SECTORS * 512));
}
