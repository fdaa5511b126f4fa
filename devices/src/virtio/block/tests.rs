//! A fake driver's requests, answered by the real device with either engine from real files.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cutover_snapshot::spec::{DiskIo, DiskSpec, RateLimiterSpec};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tempfile::TempDir;
use virtio_bindings::virtio_blk::*;

use super::*;
use crate::guest_event::GuestEvent;
use crate::virtio::hostile_rings::survives_hostile_rings;
use crate::virtio::testing::{DATA, Guest, HIGH_START, Piece, QUEUE_SIZE, tight_limits};

fn unconfined() -> OnThread {
    std::sync::Arc::new(|| {})
}

mod dirty_pages;
mod epochs;
mod gate;
mod limits;
mod refusals;
mod replace;
mod written;

const ENGINES: [DiskIo; 2] = [DiskIo::IoUring, DiskIo::Threads];
const SECTORS: u64 = 256;
const SIZE: usize = 512 * 256;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;
/// What no device answers.
const NO_STATUS: u8 = 0xee;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// An image whose byte `n` is `n / 512` in its lowest eight bits.
struct Image {
    path: PathBuf,
    _directory: TempDir,
}

impl Image {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        fs::write(&path, contents(0, SIZE)).unwrap();
        Self {
            path,
            _directory: directory,
        }
    }

    fn spec(&self, io: DiskIo) -> DiskSpec {
        spec(&self.path, io)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        fs::read(&self.path).unwrap()[offset..offset + len].to_vec()
    }
}

fn spec(path: &Path, io: DiskIo) -> DiskSpec {
    DiskSpec {
        id: None,
        path: path.to_owned(),
        readonly: false,
        serial: Some("C0FFEE".to_owned()),
        io,
        rate_limiter: RateLimiterSpec::default(),
    }
}

/// What an untouched [`Image`] has at `offset`.
fn contents(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len)
        .map(|byte| (byte / 512).to_le_bytes()[0])
        .collect()
}

fn guest(spec: &DiskSpec) -> Guest {
    Guest::started(Block::open(spec, &unconfined()).unwrap(), FLUSH)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Makes a request with its data in `data`; returns its status and the bytes the device says it wrote.
fn request(guest: &mut Guest, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
    guest.write(HEADER, &header(kind, sector));
    guest.write(STATUS, &[NO_STATUS]);
    let pieces = [&[Piece::Out(HEADER, 16)], data, &[Piece::In(STATUS, 1)]].concat();
    let written = guest.request(0, &pieces);
    (guest.read(STATUS, 1)[0], written)
}

/// Discards or writes zeroes; returns the status.
fn clear(guest: &mut Guest, kind: u32, segment: &[u8]) -> u8 {
    guest.write(BUFFER, segment);
    request(
        guest,
        kind,
        0,
        &[Piece::Out(BUFFER, u32::try_from(segment.len()).unwrap())],
    )
    .0
}

#[test]
fn what_is_written_is_in_the_image_and_is_read_back() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        guest.write(BUFFER, &[0x5a; 1024]);
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_OUT, 7, &[Piece::Out(BUFFER, 1024)]),
            (OK, 1)
        );
        assert_eq!(image.read(0, 7 * 512), contents(0, 7 * 512));
        assert_eq!(image.read(7 * 512, 1024), [0x5a; 1024]);
        assert_eq!(image.read(9 * 512, 512), contents(9 * 512, 512));
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_IN, 6, &[Piece::In(BUFFER, 2048)]),
            (OK, 2049)
        );
        assert_eq!(guest.read(BUFFER, 2048), image.read(6 * 512, 2048));
        assert_eq!(request(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn writes_reach_the_image_when_the_driver_does_not_flush() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = Guest::started(Block::open(&image.spec(io), &unconfined()).unwrap(), 0);
        guest.write(BUFFER, &[0x77; 512]);
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_OUT, 3, &[Piece::Out(BUFFER, 512)]),
            (OK, 1)
        );
        assert_eq!(image.read(3 * 512, 512), [0x77; 512]);
    }
}

#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        guest.write(HEADER, &header(VIRTIO_BLK_T_IN, 10));
        let head = guest.offer(
            0,
            &[
                Piece::Out(HEADER, 3),
                Piece::Out(HEADER + 3, 13),
                Piece::In(BUFFER, 100),
                Piece::In(HIGH_START, 700),
                // The last byte of the last descriptor is the status.
                Piece::In(BUFFER + 0x1000, 225),
            ],
        );
        guest.kick(0);
        assert_eq!(guest.take_used(0), (head, 1025));
        let expected = contents(5120, 1024);
        assert_eq!(guest.read(BUFFER, 100), expected[..100]);
        assert_eq!(guest.read(HIGH_START, 700), expected[100..800]);
        assert_eq!(guest.read(BUFFER + 0x1000, 225), [&expected[800..], &[OK]].concat());
    }
}

#[test]
fn pages_that_a_read_fills_are_marked_dirty() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        guest.clean();
        let data = [Piece::In(BUFFER, 512), Piece::In(BUFFER + 0x2f00, 512)];
        assert_eq!(request(&mut guest, VIRTIO_BLK_T_IN, 0, &data), (OK, 1025));
        let dirty: Vec<_> = (0..5).map(|page| guest.is_dirty(BUFFER + 0x1000 * page)).collect();
        assert_eq!(dirty, [true, false, true, true, false]);
        guest.clean();
        guest.write(BUFFER, &[1; 512]);
        guest.clean();
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_OUT, 0, &[Piece::Out(BUFFER, 512)]),
            (OK, 1)
        );
        assert!(!guest.is_dirty(BUFFER));
    }
}

#[test]
fn many_requests_in_flight_are_each_answered_once_with_their_own_data() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        let count = QUEUE_SIZE / 2;
        for round in 0..20 {
            for index in 0..u64::from(count) {
                let sector = (round + index * 7) % SECTORS;
                let at = DATA + 0x1_0000 + 0x1000 * index;
                guest.write(at, &header(VIRTIO_BLK_T_IN, sector));
                guest.offer_indirect(
                    0,
                    at + 0x100,
                    &[Piece::Out(at, 16), Piece::In(at + 0x200, 512), Piece::In(at + 0x20, 1)],
                );
            }
            guest.kick(0);
            let mut heads: Vec<_> = (0..count).map(|_| guest.take_used(0)).collect();
            heads.sort_unstable();
            let first = (u16::try_from(round).unwrap() * count) % QUEUE_SIZE;
            assert_eq!(
                heads,
                (first..first + count).map(|head| (head, 513)).collect::<Vec<_>>()
            );
            for index in 0..u64::from(count) {
                let sector = usize::try_from((round + index * 7) % SECTORS).unwrap();
                assert_eq!(
                    guest.read(DATA + 0x1_0200 + 0x1000 * index, 512),
                    contents(sector * 512, 512)
                );
            }
        }
    }
}

#[test]
fn requests_outside_the_disk_are_refused() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        for sector in [SECTORS - 1, SECTORS, u64::MAX / 512, u64::MAX] {
            for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
                let data = if kind == VIRTIO_BLK_T_IN {
                    Piece::In(BUFFER, 1024)
                } else {
                    Piece::Out(BUFFER, 1024)
                };
                assert_eq!(request(&mut guest, kind, sector, &[data]), (IO_ERROR, 1));
            }
            assert_eq!(
                clear(&mut guest, VIRTIO_BLK_T_DISCARD, &segment(sector, 2, 0)),
                IO_ERROR
            );
        }
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_IN, SECTORS - 2, &[Piece::In(BUFFER, 1024)]),
            (OK, 1025)
        );
        assert_eq!(image.read(0, SIZE), contents(0, SIZE));
    }
}

#[test]
fn requests_that_are_not_whole_sectors_or_have_no_header_are_refused() {
    let image = Image::new();
    let mut guest = guest(&image.spec(DiskIo::Auto));
    assert_eq!(
        request(&mut guest, VIRTIO_BLK_T_IN, 0, &[Piece::In(BUFFER, 511)]),
        (IO_ERROR, 1)
    );
    assert_eq!(
        request(&mut guest, VIRTIO_BLK_T_OUT, 0, &[Piece::Out(BUFFER, 513)]),
        (IO_ERROR, 1)
    );
    assert_eq!(request(&mut guest, VIRTIO_BLK_T_IN, 0, &[]), (OK, 1));
    guest.write(STATUS, &[NO_STATUS]);
    assert_eq!(guest.request(0, &[Piece::Out(HEADER, 15), Piece::In(STATUS, 1)]), 1);
    assert_eq!(guest.read(STATUS, 1), [IO_ERROR]);
}

#[test]
fn unknown_requests_are_unsupported() {
    let image = Image::new();
    let mut guest = guest(&image.spec(DiskIo::Auto));
    for kind in [VIRTIO_BLK_T_SCSI_CMD, VIRTIO_BLK_T_SECURE_ERASE, 99, u32::MAX] {
        assert_eq!(request(&mut guest, kind, 0, &[]), (UNSUPPORTED, 1));
    }
}

#[test]
fn the_serial_number_is_padded_with_zero_bytes() {
    let image = Image::new();
    let mut guest = guest(&image.spec(DiskIo::Auto));
    guest.write(BUFFER, &[0xff; 20]);
    assert_eq!(
        request(&mut guest, VIRTIO_BLK_T_GET_ID, 0, &[Piece::In(BUFFER, 20)]),
        (OK, 21)
    );
    assert_eq!(guest.read(BUFFER, 20), *b"C0FFEE\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(
        request(&mut guest, VIRTIO_BLK_T_GET_ID, 0, &[Piece::In(BUFFER, 4)]),
        (OK, 5)
    );
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes_and_others_are_untouched() {
    for io in ENGINES {
        for (kind, flags) in [
            (VIRTIO_BLK_T_DISCARD, 0),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0),
            (VIRTIO_BLK_T_WRITE_ZEROES, 1),
        ] {
            let image = Image::new();
            let mut guest = guest(&image.spec(io));
            assert_eq!(clear(&mut guest, kind, &segment(8, 16, flags)), OK);
            assert_eq!(image.read(8 * 512, 16 * 512), [0; 16 * 512]);
            assert_eq!(image.read(0, 8 * 512), contents(0, 8 * 512));
            assert_eq!(
                image.read(24 * 512, SIZE - 24 * 512),
                contents(24 * 512, SIZE - 24 * 512)
            );
            assert_eq!(clear(&mut guest, kind, &segment(8, 0, flags)), OK);
        }
    }
}

#[test]
fn malformed_discards_are_refused() {
    let image = Image::new();
    let mut guest = guest(&image.spec(DiskIo::Auto));
    assert_eq!(clear(&mut guest, VIRTIO_BLK_T_DISCARD, &segment(0, 1, 1)), UNSUPPORTED);
    assert_eq!(
        clear(&mut guest, VIRTIO_BLK_T_WRITE_ZEROES, &segment(0, 1, 2)),
        UNSUPPORTED
    );
    assert_eq!(
        clear(&mut guest, VIRTIO_BLK_T_DISCARD, &segment(0, 1, 0)[..15]),
        IO_ERROR
    );
    assert_eq!(
        clear(
            &mut guest,
            VIRTIO_BLK_T_DISCARD,
            &[segment(0, 1, 0), segment(2, 1, 0)].concat()
        ),
        IO_ERROR
    );
    assert_eq!(image.read(0, SIZE), contents(0, SIZE));
}

#[test]
fn a_readonly_disk_offers_and_takes_no_writes() {
    for io in ENGINES {
        let image = Image::new();
        let readonly = DiskSpec {
            readonly: true,
            ..image.spec(io)
        };
        let block = Block::open(&readonly, &unconfined()).unwrap();
        let writing = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        assert_eq!(
            block.features() & (1 << VIRTIO_BLK_F_RO | writing),
            1 << VIRTIO_BLK_F_RO
        );
        let mut guest = Guest::started(block, FLUSH);
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_OUT, 0, &[Piece::Out(BUFFER, 512)]),
            (IO_ERROR, 1)
        );
        assert_eq!(clear(&mut guest, VIRTIO_BLK_T_DISCARD, &segment(0, 1, 0)), IO_ERROR);
        assert_eq!(
            clear(&mut guest, VIRTIO_BLK_T_WRITE_ZEROES, &segment(0, 1, 0)),
            IO_ERROR
        );
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_IN, 5, &[Piece::In(BUFFER, 512)]),
            (OK, 513)
        );
        assert_eq!(guest.read(BUFFER, 512), contents(5 * 512, 512));
        assert_eq!(request(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(image.read(0, SIZE), contents(0, SIZE));
    }
}

#[test]
fn a_write_that_the_host_refuses_is_an_error_of_the_guest_and_nothing_else() {
    for io in ENGINES {
        let memfd = memfd_create("disk", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(memfd);
        (&file).write_all(&contents(0, SIZE)).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let mut guest = guest(&spec(&path, io));
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_OUT, 0, &[Piece::Out(BUFFER, 512)]),
            (IO_ERROR, 1)
        );
        assert_eq!(clear(&mut guest, VIRTIO_BLK_T_DISCARD, &segment(0, 8, 0)), IO_ERROR);
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_IN, 9, &[Piece::In(BUFFER, 512)]),
            (OK, 513)
        );
        assert_eq!(guest.read(BUFFER, 512), contents(9 * 512, 512));
        assert_eq!(guest.events.take(), []);
    }
}

#[test]
fn a_read_of_an_image_that_shrank_is_an_error_after_what_is_left() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        File::options()
            .write(true)
            .open(&image.path)
            .unwrap()
            .set_len(512 + 100)
            .unwrap();
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_IN, 0, &[Piece::In(BUFFER, 2048)]),
            (IO_ERROR, 613)
        );
        assert_eq!(guest.read(BUFFER, 612), contents(0, 612));
        assert_eq!(
            request(&mut guest, VIRTIO_BLK_T_IN, 0, &[Piece::In(BUFFER, 512)]),
            (OK, 513)
        );
    }
}

#[test]
fn requests_are_done_or_untouched_after_pause_and_all_done_after_resume() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        for round in 0..50_u8 {
            let mut offered = Vec::new();
            for index in 0..4_u64 {
                let at = DATA + 0x1_0000 + 0x1000 * index;
                guest.write(at, &header(VIRTIO_BLK_T_OUT, index * 4));
                guest.write(at + 0x200, &[round; 1024]);
                offered.push(guest.offer(
                    0,
                    &[
                        Piece::Out(at, 16),
                        Piece::Out(at + 0x200, 1024),
                        Piece::In(at + 0x20, 1),
                    ],
                ));
            }
            guest.kick(0);
            guest.transport.pause();
            let mut done = Vec::new();
            while let Some((head, written)) = guest.try_take_used(0) {
                assert_eq!(written, 1);
                done.push(head);
            }
            guest.transport.resume();
            while done.len() < offered.len() {
                done.push(guest.take_used(0).0);
            }
            done.sort_unstable();
            offered.sort_unstable();
            assert_eq!(done, offered);
            for index in 0..4 {
                assert_eq!(image.read(index * 2048, 1024), vec![round; 1024]);
            }
        }
    }
}

#[test]
fn nothing_of_the_requests_before_a_reset_under_load_comes_after_it() {
    const READ: u64 = DATA + 0x2_0000;
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        for round in 0..50_u8 {
            for index in 0..4_u64 {
                let at = DATA + 0x1_0000 + 0x1000 * index;
                let (kind, data) = match index % 2 {
                    0 => (VIRTIO_BLK_T_OUT, Piece::Out(at + 0x200, 1024)),
                    _ => (VIRTIO_BLK_T_IN, Piece::In(READ + 0x1000 * index, 1024)),
                };
                guest.write(at, &header(kind, index * 4));
                guest.write(at + 0x200, &[0xff; 1024]);
                guest.offer(0, &[Piece::Out(at, 16), data, Piece::In(at + 0x20, 1)]);
            }
            guest.kick(0);
            guest.start(FLUSH);
            // The driver uses the memory and the sectors for something else at once.
            guest.write(READ, &[round; 0x4000]);
            guest.write(BUFFER, &[round; 0x2000]);
            assert_eq!(
                request(&mut guest, VIRTIO_BLK_T_OUT, 0, &[Piece::Out(BUFFER, 0x2000)]),
                (OK, 1)
            );
            assert_eq!(request(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
            assert_eq!(image.read(0, 0x2000), [round; 0x2000]);
            assert_eq!(guest.read(READ, 0x4000), [round; 0x4000]);
        }
    }
}

#[test]
fn a_request_without_room_for_its_status_stops_the_device() {
    let image = Image::new();
    let mut guest = guest(&image.spec(DiskIo::Auto));
    guest.write(HEADER, &header(VIRTIO_BLK_T_FLUSH, 0));
    guest.offer(0, &[Piece::Out(HEADER, 16)]);
    guest.kick(0);
    guest.wait_for_failure();
    let events = guest.events.take();
    assert!(
        matches!(&events[..], [GuestEvent::DeviceFailed { reason, .. }] if reason.contains("no room")),
        "{events:?}"
    );
    guest.start(FLUSH);
    assert_eq!(request(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn hostile_rings_do_no_harm() {
    let limits = [RateLimiterSpec::default(), tight_limits()];
    for (io, rate_limiter) in ENGINES.into_iter().flat_map(|io| limits.map(|limits| (io, limits))) {
        let image = Image::new();
        let spec = DiskSpec {
            rate_limiter,
            ..image.spec(io)
        };
        let block = Block::open(&spec, &unconfined()).unwrap();
        survives_hostile_rings(
            Guest::with(block),
            1,
            FLUSH,
            || {},
            |guest| {
                guest.write(BUFFER, &[0x33; 512]);
                assert_eq!(request(guest, VIRTIO_BLK_T_OUT, 1, &[Piece::Out(BUFFER, 512)]), (OK, 1));
                assert_eq!(
                    request(guest, VIRTIO_BLK_T_IN, 1, &[Piece::In(BUFFER + 512, 512)]),
                    (OK, 513)
                );
                assert_eq!(guest.read(BUFFER + 512, 512), [0x33; 512]);
            },
        );
    }
}

#[test]
fn zeroes_are_written_where_the_host_has_no_zeroed_ranges() {
    for io in ENGINES {
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
        (&file).write_all(&contents(512, SIZE)).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let mut guest = guest(&spec(&path, io));
        assert_eq!(clear(&mut guest, VIRTIO_BLK_T_WRITE_ZEROES, &segment(1, 3, 0)), OK);
        let mut data = [0xff; 2048];
        file.read_exact_at(&mut data, 512).unwrap();
        assert_eq!(data, *[&[0; 1536][..], &contents(5 * 512, 512)].concat());
    }
}
