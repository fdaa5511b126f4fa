//! The balloon as its driver sees it.

use std::mem;
use std::sync::{Mutex, PoisonError};

use cutover_snapshot::size::ByteSize;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_STATUS,
};

use super::*;
use crate::bus::BusDevice;
use crate::virtio::hostile_rings::survives_hostile_rings;
use crate::virtio::testing::{DATA, Guest, HIGH_START, LOW_SIZE, Piece};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORTING: usize = 3;
const ALL: u64 = 1 << F_STATS_VQ | 1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING;

/// Takes all that it is given, and remembers it.
#[derive(Default)]
struct Taken(Mutex<Vec<(u64, u64)>>);

impl Taken {
    fn take(&self) -> Vec<(u64, u64)> {
        mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Reclaim for Taken {
    fn reclaim(&self, start: u64, bytes: u64) -> u64 {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((start, bytes));
        bytes
    }
}

fn spec() -> BalloonSpec {
    BalloonSpec {
        amount: ByteSize::from_mib(3),
        deflate_on_oom: true,
        // Longer than any test: who wants statistics earlier asks for them.
        stats_interval_s: 3600,
        free_page_reporting: true,
    }
}

fn balloon(taken: &Arc<Taken>) -> Balloon {
    Balloon::new(&spec(), taken.clone()).unwrap()
}

/// A guest whose driver has set everything up, its device, and what that gave away.
fn started() -> (Guest, Arc<Mutex<Balloon>>, Arc<Taken>) {
    let taken = Arc::<Taken>::default();
    let device = Arc::new(Mutex::new(balloon(&taken)));
    let mut guest = Guest::sharing(device.clone());
    guest.start(ALL);
    (guest, device, taken)
}

/// Writes numbers of pages, and returns where.
fn list(guest: &Guest, numbers: &[u32]) -> Piece {
    let bytes: Vec<u8> = numbers.iter().copied().flat_map(u32::to_le_bytes).collect();
    guest.write(DATA, &bytes);
    Piece::Out(DATA, u32::try_from(bytes.len()).unwrap())
}

/// Writes pairs of tags and numbers, and returns where.
fn pairs(guest: &Guest, pairs: &[(u16, u64)]) -> Piece {
    let pair = |&(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let bytes: Vec<u8> = pairs.iter().flat_map(pair).collect();
    guest.write(DATA + 0x1000, &bytes);
    Piece::Out(DATA + 0x1000, u32::try_from(bytes.len()).unwrap())
}

fn field(guest: &mut Guest, offset: usize) -> u32 {
    guest.read_register(VIRTIO_MMIO_CONFIG + u32::try_from(offset).unwrap())
}

fn statistics(device: &Arc<Mutex<Balloon>>) -> Statistics {
    device.lock().unwrap().statistics()
}

#[test]
fn pages_of_the_balloon_are_given_away_and_those_taken_out_are_not() {
    let (mut guest, device, taken) = started();
    let numbers = [9, 8, 0x10, u32::MAX, u32::try_from(HIGH_START >> 12).unwrap()];
    let list = list(&guest, &numbers);
    assert_eq!(guest.request(INFLATE, &[list]), 0);
    assert_eq!(
        taken.take(),
        [(0x8000, 0x2000), (0x1_0000, 0x1000), (HIGH_START, 0x1000)]
    );
    assert_eq!(guest.request(DEFLATE, &[list]), 0);
    assert_eq!(taken.take(), []);
    let counts = device.lock().unwrap().counters().read();
    assert_eq!(
        (counts.inflated, counts.deflated, counts.reclaimed_bytes),
        (1, 1, 0x4000)
    );
}

#[test]
fn free_pages_are_given_away_as_they_are_reported() {
    let (mut guest, device, taken) = started();
    let report = [
        Piece::In(0x20_0000, 0x10_0000),
        Piece::In(HIGH_START, 0x2000),
        Piece::In(0x5100, 0x1000),
    ];
    assert_eq!(guest.request(REPORTING, &report), 0);
    assert_eq!(taken.take(), [(0x20_0000, 0x10_0000), (HIGH_START, 0x2000)]);
    let counts = device.lock().unwrap().counters().read();
    assert_eq!((counts.reported, counts.reported_bytes), (1, 0x10_2000));
}

#[test]
fn the_driver_is_told_how_much_is_wanted_and_says_how_much_there_is() {
    let (mut guest, device, _) = started();
    assert_eq!((field(&mut guest, NUM_PAGES), field(&mut guest, ACTUAL)), (768, 0));
    device.lock().unwrap().ask_for(1024);
    guest.transport.config_changed();
    assert_eq!(
        guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS),
        VIRTIO_MMIO_INT_CONFIG
    );
    guest.write_register(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
    let config = VIRTIO_MMIO_CONFIG.into();
    // What the host wants is not the driver's to write.
    guest.transport.write(config, &7_u32.to_le_bytes());
    guest.transport.write(config + 4, &512_u32.to_le_bytes());
    let told = statistics(&device);
    assert_eq!((told.target_pages, told.actual_pages), (1024, 512));
    assert_eq!((told.target_mib(), told.actual_mib()), (4, 2));
    guest.write_register(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(
        statistics(&device).actual_pages,
        0,
        "a new driver has nothing in the balloon"
    );
}

#[test]
fn statistics_are_read_and_the_buffer_is_kept_until_they_are_wanted_again() {
    let (mut guest, device, _) = started();
    let first = pairs(&guest, &[(4, 100), (5, 1 << 40), (99, 1), (4, 200)]);
    let head = guest.offer(STATISTICS, &[first]);
    guest.kick(STATISTICS);
    guest.until(|| statistics(&device).guest.get(Tag::FreeMemory) == Some(200));
    assert_eq!(statistics(&device).guest.get(Tag::TotalMemory), Some(1 << 40));
    assert_eq!(statistics(&device).guest.get(Tag::SwapIn), None);
    assert_eq!(guest.try_take_used(STATISTICS), None);
    let asked = device.clone();
    guest.on_loop(move || asked.lock().unwrap().ask_every(Duration::from_secs(3600)));
    assert_eq!(guest.take_used(STATISTICS), (head, 0));
    // What is not told any more is not known any more.
    let second = pairs(&guest, &[(5, 7)]);
    guest.offer(STATISTICS, &[second]);
    guest.kick(STATISTICS);
    guest.until(|| statistics(&device).guest.get(Tag::TotalMemory) == Some(7));
    assert_eq!(statistics(&device).guest.get(Tag::FreeMemory), None);
}

#[test]
fn of_two_buffers_with_statistics_one_comes_back() {
    let (mut guest, device, _) = started();
    let told = pairs(&guest, &[(0, 1)]);
    let heads = [(); 2].map(|()| guest.offer(STATISTICS, &[told]));
    guest.kick(STATISTICS);
    assert_eq!(guest.take_used(STATISTICS), (heads[0], 0));
    assert_eq!(statistics(&device).guest.get(Tag::SwapIn), Some(1));
    guest.transport.pause();
    guest.transport.resume();
    guest.on_loop(|| ());
    assert_eq!(guest.try_take_used(STATISTICS), None);
}

#[test]
fn a_balloon_that_takes_the_place_of_another_goes_on_with_its_pages_and_its_statistics() {
    let (mut guest, _, _) = started();
    let told = pairs(&guest, &[(5, 7)]);
    let head = guest.offer(STATISTICS, &[told]);
    guest.kick(STATISTICS);
    guest
        .transport
        .write(u64::from(VIRTIO_MMIO_CONFIG) + 4, &300_u32.to_le_bytes());
    guest.on_loop(|| ());
    guest.transport.pause();
    let state = guest.transport.save();

    let taken = Arc::<Taken>::default();
    let (same, mut other) = (balloon(&taken), balloon(&taken));
    guest.replace(balloon(&taken), &state).unwrap();
    assert_eq!(
        guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS),
        0,
        "nothing is different"
    );
    same.ask_for(1);
    guest.replace(same, &state).unwrap();
    assert_eq!(
        guest.read_register(VIRTIO_MMIO_INTERRUPT_STATUS),
        VIRTIO_MMIO_INT_CONFIG,
        "something else is wanted"
    );
    other.ask_every(Duration::from_secs(1));
    guest.replace(other, &state).unwrap();
    assert_eq!(field(&mut guest, ACTUAL), 300);
    guest.transport.resume();
    assert_eq!(guest.take_used(STATISTICS), (head, 0), "it is asked to fill it again");
    let list = list(&guest, &[8]);
    guest.request(INFLATE, &[list]);
    assert_eq!(taken.take(), [(0x8000, 0x1000)]);
}

#[test]
fn a_driver_that_does_not_want_all_queues_sets_up_those_it_wants() {
    let taken = Arc::<Taken>::default();
    for (features, queue) in [(0, None), (1 << F_STATS_VQ, None), (1 << F_REPORTING, Some(2))] {
        let mut guest = Guest::with(balloon(&taken));
        guest.negotiate(features | 1 << VIRTIO_F_VERSION_1);
        guest.set_first_queues_up(roles(features).count());
        guest.write_register(VIRTIO_MMIO_STATUS, 15);
        assert!(!guest.needs_reset());
        if let Some(queue) = queue {
            guest.request(queue, &[Piece::In(0x20_0000, 0x1000)]);
            assert_eq!(taken.take(), [(0x20_0000, 0x1000)]);
        }
        guest.transport.pause();
        let state = guest.transport.save();
        guest.replace(balloon(&taken), &state).unwrap();
        guest.transport.resume();
        let list = list(&guest, &[8]);
        guest.request(INFLATE, &[list]);
        assert_eq!(taken.take(), [(0x8000, 0x1000)]);
    }
}

#[test]
fn no_feature_is_offered_that_was_not_asked_for() {
    let features = |spec: &BalloonSpec| Balloon::new(spec, Arc::<Taken>::default()).unwrap().features();
    assert_eq!(features(&spec()), ALL);
    assert_eq!(features(&BalloonSpec::default()), 0);
}

#[test]
fn the_balloon_survives_hostile_rings() {
    let (guest, device, taken) = started();
    survives_hostile_rings(
        guest,
        4,
        ALL,
        || device.lock().unwrap().ask_every(Duration::from_secs(3600)),
        |guest| {
            for (start, bytes) in taken.take() {
                let end = start + bytes;
                assert!(end <= LOW_SIZE as u64 || start >= HIGH_START, "{start:#x} {bytes:#x}");
                assert_eq!((start % PAGE_SIZE, bytes % PAGE_SIZE), (0, 0));
            }
            let list = list(guest, &[8]);
            guest.request(INFLATE, &[list]);
            assert_eq!(taken.take(), [(0x8000, 0x1000)]);
        },
    );
}
