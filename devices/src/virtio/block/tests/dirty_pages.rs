//! What the disk writes into guest memory is marked, whichever engine reads it.

use super::*;
use crate::virtio::dirty_pages::changed_pages;

/// The page of the queue, its used ring included.
const QUEUE: u64 = 0x1000;
/// The page of the status byte.
const STATUS_PAGE: u64 = STATUS & !0xfff;

/// Makes a request whose data goes to `data`; returns the pages that changed.
fn pages_changed_by(guest: &mut Guest, kind: u32, sector: u64, data: &[Piece]) -> Vec<u64> {
    let pieces = [&[Piece::Out(HEADER, 16)], data, &[Piece::In(STATUS, 1)]].concat();
    changed_pages(
        guest,
        |guest| {
            guest.write(HEADER, &header(kind, sector));
            guest.write(STATUS, &[NO_STATUS]);
            assert_eq!(guest.offer(0, &pieces), 0);
        },
        |guest| {
            assert_eq!(guest.take_used(0).0, 0);
            assert_eq!(guest.read(STATUS, 1), [OK]);
        },
    )
}

#[test]
fn data_read_the_status_and_the_used_ring_are_marked() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        let data = [Piece::In(BUFFER + 0xf00, 0x1400), Piece::In(HIGH_START + 0x2000, 512)];
        let changed = pages_changed_by(&mut guest, VIRTIO_BLK_T_IN, 1, &data);
        let filled = [BUFFER, BUFFER + 0x1000, BUFFER + 0x2000, HIGH_START + 0x2000];
        assert_eq!(changed, [&[QUEUE, STATUS_PAGE], &filled[..]].concat());
    }
}

#[test]
fn a_read_that_fails_may_have_filled_its_buffers_so_they_are_marked() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        File::options()
            .write(true)
            .open(&image.path)
            .unwrap()
            .set_len(0)
            .unwrap();
        guest.clean();
        let data = [Piece::In(BUFFER, 512)];
        assert_eq!(request(&mut guest, VIRTIO_BLK_T_IN, 0, &data), (IO_ERROR, 1));
        assert!(guest.is_dirty(BUFFER));
    }
}

#[test]
fn the_serial_number_is_marked() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        let changed = pages_changed_by(&mut guest, VIRTIO_BLK_T_GET_ID, 0, &[Piece::In(BUFFER, 20)]);
        assert_eq!(changed, [QUEUE, STATUS_PAGE, BUFFER]);
    }
}

#[test]
fn the_status_of_a_request_without_data_is_marked() {
    for io in ENGINES {
        let image = Image::new();
        let mut guest = guest(&image.spec(io));
        let changed = pages_changed_by(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert_eq!(changed, [QUEUE, STATUS_PAGE]);
    }
}
