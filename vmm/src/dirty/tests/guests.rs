//! The tracker with guests of KVM: hand-made programs in real mode, which any KVM runs.

use std::thread;

use cutover_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::*;
use crate::testing::{POKE, SCATTER, TinyGuest};

/// Slots that do not end with a word of the bitmap: 273 pages from 0 on, 77 from [`SLOT_1`] on.
const SLOT_0_PAGES: usize = 273;
const SLOT_1: u64 = 0x0100_0000;
const SLOT_1_PAGES: usize = 77;
const NO_PAGE: [u64; 0] = [];
/// Where the guest's program is: in the last page of slot 0, away from what it writes there.
const PROGRAM: u64 = 0x11_0800;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[
        (GuestAddress(0), SLOT_0_PAGES << 12),
        (GuestAddress(SLOT_1), SLOT_1_PAGES << 12),
    ])
    .unwrap()
}

fn page_of(memory: &GuestMemory, address: u64) -> [u8; 4096] {
    let mut contents = [0; 4096];
    memory.read_slice(&mut contents, GuestAddress(address)).unwrap();
    contents
}

/// Takes and commits; returns the addresses of the pages.
fn changed(consumer: &Consumer) -> Vec<u64> {
    let taken = consumer.take().unwrap();
    let pages = taken
        .ranges()
        .flat_map(|range| (range.start..range.end()).step_by(4096))
        .collect();
    taken.commit();
    pages
}

/// Has the guest write to the page at `address`.
fn poke(guest: &mut TinyGuest, address: u64) {
    let mut sregs = guest.vcpu.get_sregs().unwrap();
    sregs.es.base = address;
    guest.vcpu.set_sregs(&sregs).unwrap();
    guest.run_to_stop();
}

#[test]
fn pages_the_guest_writes_are_reported_once_to_each_consumer() {
    let Some(mut guest) = TinyGuest::boot(&memory(), PROGRAM, POKE) else {
        return;
    };
    let tracker = Tracker::new(&guest.vm).unwrap();
    poke(&mut guest, 0x1000);
    let early = tracker.register(Baseline::Now).unwrap();
    let written = [0x3000, 0x4_0000, 0x11_0000, SLOT_1, SLOT_1 + 76 * 4096];
    for address in written {
        poke(&mut guest, address);
    }
    let late = tracker.register(Baseline::Now).unwrap();
    poke(&mut guest, 0x5000);
    let has_all = |pages: Vec<u64>, wanted: &[u64]| wanted.iter().all(|page| pages.contains(page));
    assert!(has_all(changed(&early), &[&written[..], &[0x5000]].concat()));
    assert!(has_all(changed(&late), &[0x5000]));
    for address in written {
        poke(&mut guest, address);
    }
    assert!(has_all(changed(&late), &written));
    assert!(has_all(changed(&early), &written));
}

#[test]
fn a_slot_that_is_cleared_in_several_chunks_is_reported_and_cleared_as_a_whole() {
    // Two chunks of 64 MiB and a bit; untouched, they cost nothing.
    let pages = 2 * 0x4000 + 77;
    let memory = GuestMemory::from_ranges(&[
        (GuestAddress(0), SLOT_0_PAGES << 12),
        (GuestAddress(SLOT_1), pages << 12),
    ])
    .unwrap();
    let Some(mut guest) = TinyGuest::boot(&memory, PROGRAM, POKE) else {
        return;
    };
    let tracker = Tracker::new(&guest.vm).unwrap();
    let consumer = tracker.register(Baseline::Nothing).unwrap();
    assert_eq!(changed(&consumer).len(), SLOT_0_PAGES + pages);
    let written = [0, 0x3fff, 0x4000, 0x8000, 0x8000 + 76].map(|page| SLOT_1 + page * 4096);
    for _ in 0..2 {
        for address in written {
            poke(&mut guest, address);
        }
        let pages = changed(&consumer);
        assert!(written.iter().all(|page| pages.contains(page)), "{pages:x?}");
        assert_eq!(changed(&consumer), NO_PAGE);
    }
}

#[test]
fn an_idle_guest_changes_nothing() {
    let Some(guest) = TinyGuest::boot(&memory(), PROGRAM, POKE) else {
        return;
    };
    let tracker = Tracker::new(&guest.vm).unwrap();
    let consumer = tracker.register(Baseline::Nothing).unwrap();
    assert_eq!(changed(&consumer).len(), SLOT_0_PAGES + SLOT_1_PAGES);
    assert_eq!(changed(&consumer), NO_PAGE);
    let other = tracker.register(Baseline::Now).unwrap();
    assert_eq!(changed(&other), NO_PAGE);
}

#[test]
fn what_changed_while_nobody_wanted_to_know_is_nobodys() {
    let Some(mut guest) = TinyGuest::boot(&memory(), PROGRAM, POKE) else {
        return;
    };
    let tracker = Tracker::new(&guest.vm).unwrap();
    for round in 0..3 {
        poke(&mut guest, 0x2000);
        let consumer = tracker.register(Baseline::Now).unwrap();
        assert_eq!(changed(&consumer), NO_PAGE, "in round {round}");
        poke(&mut guest, 0x7000);
        assert!(changed(&consumer).contains(&0x7000), "in round {round}");
    }
}

#[test]
fn a_copy_kept_up_while_the_guest_and_the_monitor_write_ends_up_equal() {
    let Some(mut guest) = TinyGuest::boot(&memory(), PROGRAM, SCATTER) else {
        return;
    };
    let memory = guest.vm.memory_slots.memory.clone();
    let tracker = Tracker::new(&guest.vm).unwrap();
    let consumer = tracker.register(Baseline::Nothing).unwrap();
    let copy = self::memory();
    let copy_changes = |consumer: &Consumer| {
        let pages = changed(consumer);
        for &address in &pages {
            copy.write_slice(&page_of(&memory, address), GuestAddress(address))
                .unwrap();
        }
        pages.len()
    };
    thread::scope(|scope| {
        let running = scope.spawn(|| (0..64).for_each(|_| guest.run_to_stop()));
        let mut rounds = 0_u64;
        while !running.is_finished() {
            rounds += 1;
            memory
                .write_obj(rounds, GuestAddress(SLOT_1 + rounds % 77 * 4096))
                .unwrap();
            copy_changes(&consumer);
        }
    });
    copy_changes(&consumer);
    for region in memory.iter() {
        for address in (region.start_addr().0..=region.last_addr().0).step_by(4096) {
            assert!(
                page_of(&memory, address) == page_of(&copy, address),
                "the page at {address:#x} differs"
            );
        }
    }
}
