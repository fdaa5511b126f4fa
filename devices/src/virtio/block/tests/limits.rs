//! A disk with a rate limiter, and what a disk counts.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::*;
use crate::stats::DiskStats;
use crate::virtio::testing::{NO_LIMITS, TWO_OPERATIONS, bucket};

/// A guest with a limited disk, and a way to the disk.
fn limited(image: &Image, io: DiskIo, rate_limiter: RateLimiterSpec) -> (Guest, Arc<Mutex<Block>>) {
    let spec = DiskSpec {
        rate_limiter,
        ..image.spec(io)
    };
    let block = Arc::new(Mutex::new(Block::open(&spec, &unconfined()).unwrap()));
    let mut guest = Guest::sharing(block.clone());
    guest.start(FLUSH);
    (guest, block)
}

/// Offers a read of each of `sectors`, with data and status in a place of its own.
fn offer_reads(guest: &mut Guest, sectors: Range<u64>) -> Vec<u16> {
    let mut offer = |sector| {
        let at = BUFFER + 0x1000 * sector;
        guest.write(at, &header(VIRTIO_BLK_T_IN, sector));
        guest.write(at + 0x20, &[NO_STATUS]);
        guest.offer(
            0,
            &[Piece::Out(at, 16), Piece::In(at + 0x200, 512), Piece::In(at + 0x20, 1)],
        )
    };
    sectors.map(&mut offer).collect()
}

/// The read of sector `index` was answered.
fn assert_is_read(guest: &Guest, index: u64) {
    let at = BUFFER + 0x1000 * index;
    assert_eq!(guest.read(at + 0x20, 1), [OK]);
    let offset = usize::try_from(index).unwrap() * 512;
    assert_eq!(guest.read(at + 0x200, 512), contents(offset, 512));
}

fn lift_limits(guest: &Guest, block: &Arc<Mutex<Block>>) {
    let block = block.clone();
    guest.on_loop(move || block.lock().unwrap().limit(&NO_LIMITS));
}

#[test]
fn requests_beyond_the_limits_wait_untouched_until_these_are_lifted() {
    for io in ENGINES {
        let image = Image::new();
        let (mut guest, block) = limited(&image, io, TWO_OPERATIONS);
        let counters = block.lock().unwrap().counters().clone();
        let mut heads = offer_reads(&mut guest, 0..4);
        guest.kick(0);
        let mut done = vec![guest.take_used(0).0, guest.take_used(0).0];
        guest.until(|| counters.read(String::new()).throttled == 1);
        // Its driver may ring as often as it likes.
        guest.kick(0);
        guest.on_loop(|| ());
        assert_eq!(guest.try_take_used(0), None);
        assert_eq!(guest.read(BUFFER + 0x2020, 1), [NO_STATUS]);
        lift_limits(&guest, &block);
        done.extend([guest.take_used(0).0, guest.take_used(0).0]);
        done.sort_unstable();
        heads.sort_unstable();
        assert_eq!(done, heads);
        (0..4).for_each(|index| assert_is_read(&guest, index));
    }
}

#[test]
fn a_pause_while_requests_wait_loses_none_of_them() {
    for io in ENGINES {
        let image = Image::new();
        let (mut guest, block) = limited(&image, io, TWO_OPERATIONS);
        let heads = offer_reads(&mut guest, 0..4);
        guest.kick(0);
        let mut done = vec![guest.take_used(0).0, guest.take_used(0).0];
        for _ in 0..3 {
            guest.transport.pause();
            guest.transport.resume();
        }
        guest.transport.pause();
        lift_limits(&guest, &block);
        assert_eq!(guest.try_take_used(0), None);
        guest.transport.resume();
        done.extend([guest.take_used(0).0, guest.take_used(0).0]);
        done.sort_unstable();
        assert_eq!(done, heads);
        (0..4).for_each(|index| assert_is_read(&guest, index));
    }
}

#[test]
fn a_disk_reset_while_requests_wait_forgets_them_and_serves_the_new_driver() {
    for io in ENGINES {
        let image = Image::new();
        let (mut guest, block) = limited(&image, io, TWO_OPERATIONS);
        offer_reads(&mut guest, 0..4);
        guest.kick(0);
        guest.take_used(0);
        guest.take_used(0);
        guest.start(FLUSH);
        let head = offer_reads(&mut guest, 7..8)[0];
        guest.kick(0);
        lift_limits(&guest, &block);
        assert_eq!(guest.take_used(0), (head, 513));
        assert_is_read(&guest, 7);
        assert_eq!(guest.read(BUFFER + 0x3020, 1), [NO_STATUS]);
    }
}

#[test]
fn no_more_bytes_pass_than_the_bucket_and_the_time_allow() {
    const SIZE: u64 = 4096;
    const REFILL_MS: u64 = 10;
    const REQUESTS: u64 = 100;
    for io in ENGINES {
        let image = Image::new();
        let limits = RateLimiterSpec {
            bandwidth: bucket(SIZE, REFILL_MS),
            ops: None,
        };
        let start = Instant::now();
        let (mut guest, block) = limited(&image, io, limits);
        for round in 0..REQUESTS / 4 {
            let first = round * 4 % 16;
            offer_reads(&mut guest, first..first + 4);
            guest.kick(0);
            for _ in 0..4 {
                guest.take_used(0);
            }
            (first..first + 4).for_each(|index| assert_is_read(&guest, index));
        }
        let allowed =
            u128::from(SIZE) + start.elapsed().as_nanos() * u128::from(SIZE) / u128::from(REFILL_MS * 1_000_000);
        let stats = block.lock().unwrap().counters().read(String::new());
        assert_eq!((stats.reads, stats.read_bytes), (REQUESTS, REQUESTS * 512));
        assert!(u128::from(stats.read_bytes) <= allowed);
        assert!(stats.throttled > 0);
    }
}

#[test]
fn a_request_larger_than_the_bucket_passes() {
    for io in ENGINES {
        let image = Image::new();
        let limits = RateLimiterSpec {
            bandwidth: bucket(1000, 1),
            ops: None,
        };
        let (mut guest, _block) = limited(&image, io, limits);
        for _ in 0..2 {
            assert_eq!(
                request(&mut guest, VIRTIO_BLK_T_IN, 3, &[Piece::In(BUFFER, 8192)]),
                (OK, 8193)
            );
            assert_eq!(guest.read(BUFFER, 8192), contents(3 * 512, 8192));
        }
    }
}

#[test]
fn requests_are_counted_by_kind_when_they_are_answered() {
    for io in ENGINES {
        let image = Image::new();
        let (mut guest, block) = limited(&image, io, RateLimiterSpec::default());
        request(&mut guest, VIRTIO_BLK_T_IN, 0, &[Piece::In(BUFFER, 1024)]);
        request(&mut guest, VIRTIO_BLK_T_OUT, 4, &[Piece::Out(BUFFER, 512)]);
        request(&mut guest, VIRTIO_BLK_T_OUT, 5, &[Piece::Out(BUFFER, 512)]);
        request(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]);
        clear(&mut guest, VIRTIO_BLK_T_DISCARD, &segment(8, 8, 0));
        clear(&mut guest, VIRTIO_BLK_T_WRITE_ZEROES, &segment(8, 8, 0));
        request(&mut guest, VIRTIO_BLK_T_GET_ID, 0, &[Piece::In(BUFFER, 20)]);
        request(&mut guest, VIRTIO_BLK_T_IN, SECTORS, &[Piece::In(BUFFER, 512)]);
        request(&mut guest, 99, 0, &[]);
        let stats = block.lock().unwrap().counters().read("rootfs".to_owned());
        let expected = DiskStats {
            id: "rootfs".to_owned(),
            reads: 1,
            writes: 2,
            flushes: 1,
            discards: 2,
            read_bytes: 1024,
            written_bytes: 1024,
            failed: 2,
            throttled: 0,
        };
        assert_eq!(stats, expected);
    }
}
