//! The tracker with guests of KVM: hand-made programs in real mode, which any KVM runs. Each test goes through all back
//! ends that this kernel has.

use std::collections::BTreeSet;
use std::thread;

use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::MemorySpec;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::*;
use crate::memory;
use crate::page_fault::{CopyOnWrite, Unavailable};
use crate::testing::{POKE, SCATTER, TinyGuest, has_kvm};

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

/// A guest with `memory`, and the tracker of what it writes. None, with a note, where there is no such back end.
fn boot(back_end: BackEnd, memory: &GuestMemory, program: &[u8]) -> Option<(TinyGuest, Tracker)> {
    if !has_kvm() {
        return None;
    }
    let vm = KvmVm::create(memory).unwrap();
    let tracker = match Tracker::new(&vm, back_end) {
        Err(error @ Error::DirtyLog { .. }) => {
            eprintln!("skipped: {error}");
            return None;
        }
        tracker => tracker.unwrap(),
    };
    let guest = TinyGuest::of(vm, Some(&tracker), PROGRAM, program);
    Some((guest, tracker))
}

/// As [`boot`], but for writes that may fill a ring: only where that is exact.
fn boot_exact(back_end: BackEnd, memory: &GuestMemory, program: &[u8]) -> Option<(TinyGuest, Tracker)> {
    if has_kvm()
        && let Err(error) = probe::probe(back_end)
    {
        eprintln!("skipped: {error}");
        return None;
    }
    boot(back_end, memory, program)
}

/// Makes a test of each of these functions and each back end.
macro_rules! for_each_back_end {
    ($($test:ident)*) => {
        for_each_back_end!(bitmap, Bitmap: $($test)*);
        for_each_back_end!(ring, Ring: $($test)*);
        for_each_back_end!(scan, Scan: $($test)*);
    };
    ($module:ident, $back_end:ident: $($test:ident)*) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    super::$test(super::BackEnd::$back_end);
                }
            )*
        }
    };
}

for_each_back_end! {
    pages_the_guest_writes_are_reported_once_to_each_consumer
    a_slot_that_is_cleared_in_several_chunks_is_reported_and_cleared_as_a_whole
    an_idle_guest_changes_nothing
    what_changed_while_nobody_wanted_to_know_is_nobodys
    a_copy_kept_up_while_the_guest_and_the_monitor_write_ends_up_equal
    whatever_was_written_since_the_last_take_is_in_the_next
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

fn pages_the_guest_writes_are_reported_once_to_each_consumer(back_end: BackEnd) {
    let Some((mut guest, tracker)) = boot(back_end, &memory(), POKE) else {
        return;
    };
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

fn a_slot_that_is_cleared_in_several_chunks_is_reported_and_cleared_as_a_whole(back_end: BackEnd) {
    // Two chunks of 64 MiB and a bit; untouched, they cost nothing.
    let pages = 2 * 0x4000 + 77;
    let memory = GuestMemory::from_ranges(&[
        (GuestAddress(0), SLOT_0_PAGES << 12),
        (GuestAddress(SLOT_1), pages << 12),
    ])
    .unwrap();
    let Some((mut guest, tracker)) = boot(back_end, &memory, POKE) else {
        return;
    };
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

fn an_idle_guest_changes_nothing(back_end: BackEnd) {
    let Some((_guest, tracker)) = boot(back_end, &memory(), POKE) else {
        return;
    };
    let consumer = tracker.register(Baseline::Nothing).unwrap();
    assert_eq!(changed(&consumer).len(), SLOT_0_PAGES + SLOT_1_PAGES);
    assert_eq!(changed(&consumer), NO_PAGE);
    let other = tracker.register(Baseline::Now).unwrap();
    assert_eq!(changed(&other), NO_PAGE);
}

fn what_changed_while_nobody_wanted_to_know_is_nobodys(back_end: BackEnd) {
    let Some((mut guest, tracker)) = boot(back_end, &memory(), POKE) else {
        return;
    };
    for round in 0..3 {
        poke(&mut guest, 0x2000);
        let consumer = tracker.register(Baseline::Now).unwrap();
        assert_eq!(changed(&consumer), NO_PAGE, "in round {round}");
        poke(&mut guest, 0x7000);
        assert!(changed(&consumer).contains(&0x7000), "in round {round}");
    }
}

fn a_copy_kept_up_while_the_guest_and_the_monitor_write_ends_up_equal(back_end: BackEnd) {
    let Some((mut guest, tracker)) = boot_exact(back_end, &memory(), SCATTER) else {
        return;
    };
    let memory = guest.vm.memory_slots.memory.clone();
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

fn whatever_was_written_since_the_last_take_is_in_the_next(back_end: BackEnd) {
    // Page 0 is that of the real mode's interrupt table, the last one of slot 0 has the program.
    let addresses: Vec<u64> = (1..272).map(|page| page * 4096).collect();
    let writes = || vec(any::<Index>(), 0..24);
    let config = ProptestConfig::with_cases(12);
    proptest!(config, |(rounds in vec((writes(), writes()), 1..8))| {
        let Some((mut guest, tracker)) = boot(back_end, &memory(), POKE) else {
            return Ok(());
        };
        let memory = guest.vm.memory_slots.memory.clone();
        let consumer = tracker.register(Baseline::Now).unwrap();
        for (by_guest, by_monitor) in rounds {
            let by_guest: BTreeSet<u64> = by_guest.iter().map(|page| *page.get(&addresses)).collect();
            let by_monitor: BTreeSet<u64> = by_monitor.iter().map(|page| *page.get(&addresses)).collect();
            for &address in &by_guest {
                poke(&mut guest, address);
            }
            for &address in &by_monitor {
                memory.write_obj(1_u8, GuestAddress(address)).unwrap();
            }
            let reported: BTreeSet<u64> = changed(&consumer).into_iter().collect();
            prop_assert!(by_guest.is_subset(&reported) && by_monitor.is_subset(&reported));
            prop_assert_eq!(changed(&consumer), NO_PAGE, "again");
        }
    });
}

#[test]
fn memory_that_has_another_userfaultfd_is_tracked_by_the_bitmap_instead_of_a_scan() {
    let memory = memory();
    let Some((mut guest, tracker)) = boot(BackEnd::Scan, &memory, POKE) else {
        return;
    };
    let on_thread: OnThread = Arc::new(|| {});
    let other = CopyOnWrite::arm(&memory, on_thread.clone()).unwrap();
    let consumer = tracker.register(Baseline::Now).unwrap();
    poke(&mut guest, 0x3000);
    assert!(changed(&consumer).contains(&0x3000));
    drop(other);
    poke(&mut guest, 0x4000);
    assert!(changed(&consumer).contains(&0x4000), "the bitmap goes on");
    drop(consumer);

    let consumer = tracker.register(Baseline::Now).unwrap();
    let refused = CopyOnWrite::arm(&memory, on_thread.clone());
    assert!(matches!(refused, Err(Unavailable::Busy)), "memory is scanned");
    poke(&mut guest, 0x5000);
    assert!(changed(&consumer).contains(&0x5000));
    drop(consumer);
    assert!(CopyOnWrite::arm(&memory, on_thread).is_ok(), "nobody asks any more");
}

#[test]
fn memory_that_others_map_is_not_scanned() {
    if !has_kvm() {
        return;
    }
    let shared = memory::map(&MemorySpec {
        size: ByteSize::from_mib(32),
        shared: true,
        hugepages: false,
    });
    let vm = KvmVm::create(&shared.unwrap()).unwrap();
    let refused = Tracker::new(&vm, BackEnd::Scan).err().expect("it is shared");
    let reason = "--dirty-log scan cannot be used here: guest memory is shared";
    assert!(refused.to_string().starts_with(reason), "{refused}");
}
