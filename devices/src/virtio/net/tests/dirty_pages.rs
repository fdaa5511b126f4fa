//! What the interface writes into guest memory is marked.

use super::*;
use crate::virtio::dirty_pages::changed_pages;

/// The pages of the queues, used rings included.
const RX_QUEUE: u64 = 0x1000;
const TX_QUEUE: u64 = 0x2000;

#[test]
fn a_received_frame_and_the_used_ring_are_marked() {
    let (mut guest, cable) = guest(0);
    let changed = changed_pages(
        &mut guest,
        |guest| assert_eq!(guest.offer(RX, &[Piece::In(RX_DATA + 0xff0, 0x1_2000)]), 0),
        |guest| {
            write(&cable, &frame(1, 0x1400)).unwrap();
            assert_eq!(guest.take_used(RX), (0, 0x1400 + 12));
        },
    );
    assert_eq!(changed, [RX_QUEUE, RX_DATA, RX_DATA + 0x1000, RX_DATA + 0x2000]);
}

#[test]
fn every_buffer_of_a_merged_frame_is_marked() {
    let (mut guest, cable) = guest(MERGEABLE);
    let buffer = |index: u16| Piece::In(RX_DATA + 0x2000 * u64::from(index), 0x1000);
    let changed = changed_pages(
        &mut guest,
        |guest| (0..QUEUE_SIZE).for_each(|index| assert_eq!(guest.offer(RX, &[buffer(index)]), index)),
        |guest| {
            write(&cable, &frame(1, 0x2800)).unwrap();
            for (head, len) in [(0, 0x1000), (1, 0x1000), (2, 0x80c)] {
                assert_eq!(guest.take_used(RX), (head, len));
            }
        },
    );
    assert_eq!(changed, [RX_QUEUE, RX_DATA, RX_DATA + 0x2000, RX_DATA + 0x4000]);
}

#[test]
fn the_used_ring_of_a_sent_frame_is_marked_and_the_frame_is_not() {
    let (mut guest, cable) = guest(0);
    let frame = frame(1, 60);
    let changed = changed_pages(
        &mut guest,
        |guest| assert_eq!(offer_frame(guest, TX_DATA, &frame), 0),
        |guest| {
            assert_eq!(receive(&cable), frame);
            assert_eq!(guest.take_used(TX), (0, 0));
        },
    );
    assert_eq!(changed, [TX_QUEUE]);
    assert!(!guest.is_dirty(TX_DATA));
}
