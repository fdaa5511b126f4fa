//! No page of guest memory changes without its mark: the check that every device is put through, and the entropy
//! device as the first. The other devices' are beside their tests.

use super::testing::{DATA, Guest, HIGH_SIZE, HIGH_START, LOW_SIZE, Piece, entropy};

const PAGE_SIZE: usize = 4096;

/// Has the driver `offer` chains to a device that stands still, then the device serve them while the driver waits in
/// `wait`. Returns the pages the device changed, each of which is marked.
pub fn changed_pages(guest: &mut Guest, offer: impl FnOnce(&mut Guest), wait: impl FnOnce(&mut Guest)) -> Vec<u64> {
    guest.transport.pause();
    offer(guest);
    let before = pages(guest);
    guest.clean();
    guest.transport.resume();
    wait(guest);
    let after = pages(guest);
    let changed = before.iter().zip(&after).filter(|(before, after)| before != after);
    let changed: Vec<u64> = changed.map(|((address, _), _)| *address).collect();
    for &page in &changed {
        assert!(guest.is_dirty(page), "the page at {page:#x} changed and is not marked");
    }
    changed
}

/// All of guest memory: address and contents of each page.
fn pages(guest: &Guest) -> Vec<(u64, Vec<u8>)> {
    [(0, LOW_SIZE), (HIGH_START, HIGH_SIZE)]
        .into_iter()
        .flat_map(|(start, size)| {
            let contents = guest.read(start, size);
            let pages = contents.chunks(PAGE_SIZE).map(<[u8]>::to_vec);
            (start..).step_by(PAGE_SIZE).zip(pages.collect::<Vec<_>>())
        })
        .collect()
}

#[test]
fn random_bytes_and_the_used_ring_are_marked() {
    let mut guest = Guest::started(entropy(), 0);
    let buffers = [Piece::In(DATA + 0xff0, 0x20), Piece::In(HIGH_START + 0x1000, 0x1000)];
    let changed = changed_pages(
        &mut guest,
        |guest| assert_eq!(guest.offer(0, &buffers), 0),
        |guest| assert_eq!(guest.take_used(0), (0, 0x1020)),
    );
    assert_eq!(changed, [0x1000, DATA, DATA + 0x1000, HIGH_START + 0x1000]);
}
