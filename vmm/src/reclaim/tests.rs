//! Memory that is discarded is zero and in the dirty log; while somebody needs it as it is, it is not discarded.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use cutover_migration::pages::PageBits;
use cutover_migration::vm::ArrivingMemory;
use cutover_snapshot::image::PageSource;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::MemorySpec;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::dirty::{BackEnd, Baseline, Layout, PageSet, Tracker};
use crate::kvm::KvmVm;
use crate::memory;
use crate::page_fault::{Arriving, CopyOnWrite, untouched};
use crate::testing::{POKE, TinyGuest, has_kvm};

/// Where tiny guests have their program, and the page that they write.
const PROGRAM: u64 = 0x8_0000;
const POKED: u64 = 0x9_0000;

fn spec(shared: bool) -> MemorySpec {
    MemorySpec {
        size: ByteSize::from_mib(32),
        shared,
        hugepages: false,
    }
}

/// Private and shared memory, and private memory that is a file of `sevens`.
fn all_kinds() -> [(GuestMemory, u8); 3] {
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(&vec![7; 32 << 20]).unwrap();
    [
        (memory::map(&spec(false)).unwrap(), 0),
        (memory::map(&spec(true)).unwrap(), 0),
        (memory::map_flat(&spec(false), &file).unwrap(), 7),
    ]
}

fn fill(memory: &GuestMemory, start: u64, bytes: usize) {
    memory.write_slice(&vec![9; bytes], GuestAddress(start)).unwrap();
}

/// The one byte that all of `bytes` bytes from `start` on have.
fn content(memory: &GuestMemory, start: u64, bytes: usize) -> u8 {
    let mut found = vec![0; bytes];
    memory.read_slice(&mut found, GuestAddress(start)).unwrap();
    assert!(found.iter().all(|byte| *byte == found[0]), "at {start:#x}");
    found[0]
}

/// Pages that are marked, since this was last asked.
fn marked(memory: &GuestMemory) -> Vec<u64> {
    let layout = Arc::new(Layout::of(memory));
    let mut pages = PageSet::empty(&layout);
    for (slot, region) in layout.slots().iter().zip(memory.iter()) {
        for (word, bits) in cutover_migration::pages::set_words(&(**region).bitmap().get_and_reset()) {
            pages.insert(slot.first_word + word, bits);
        }
    }
    pages
        .ranges()
        .flat_map(|range| range.parts(1))
        .map(|page| page.start)
        .collect()
}

#[test]
fn what_is_discarded_is_as_it_was_at_first_and_marked() {
    for (memory, at_first) in all_kinds() {
        fill(&memory, 0x1_0000, 0x8000);
        marked(&memory);
        let reclaim = Reclaim::of(&memory);
        assert_eq!(reclaim.reclaim(0x1_2000, 0x3000), 0x3000);
        assert_eq!(content(&memory, 0x1_2000, 0x3000), at_first);
        assert_eq!(content(&memory, 0x1_0000, 0x2000), 9);
        assert_eq!(content(&memory, 0x1_5000, 0x3000), 9);
        assert_eq!(marked(&memory), [0x1_2000, 0x1_3000, 0x1_4000]);
    }
}

#[test]
fn what_is_discarded_takes_no_memory() {
    for (memory, _) in &all_kinds()[..2] {
        fill(memory, 0, 32 << 20);
        assert!(untouched(memory).unwrap().is_empty());
        assert_eq!(Reclaim::of(memory).reclaim(0, 32 << 20), 32 << 20);
        assert_eq!(untouched(memory).unwrap().len(), 8192);
    }
}

#[test]
fn what_is_no_whole_page_of_guest_memory_is_left_alone() {
    let memory = memory::map(&spec(false)).unwrap();
    let reclaim = Reclaim::of(&memory);
    fill(&memory, 0x1_0000, 0x3000);
    for (start, bytes, taken) in [
        (0x1_0001, 0x1ffe, 0),
        (0x1_0800, 0x2000, 0x1000),
        (32 << 20, 0x1000, 0),
        ((32 << 20) - 0x1000, u64::MAX, 0x1000),
        (u64::MAX - 0xfff, 0x1000, 0),
        (0, 0, 0),
    ] {
        assert_eq!(reclaim.reclaim(start, bytes), taken, "{start:#x} {bytes:#x}");
    }
    assert_eq!(content(&memory, 0x1_0000, 0x1000), 9);
    assert_eq!(content(&memory, 0x1_1000, 0x1000), 0);
    assert_eq!(content(&memory, 0x1_2000, 0x1000), 9);
}

#[test]
fn nothing_is_discarded_or_marked_while_anybody_wants_memory_kept() {
    let memory = memory::map(&spec(false)).unwrap();
    let reclaim = Reclaim::of(&memory);
    fill(&memory, 0x1_0000, 0x1000);
    marked(&memory);
    let kept = [reclaim.keep(), reclaim.clone().keep()];
    for one in kept {
        assert_eq!(reclaim.reclaim(0x1_0000, 0x1000), 0);
        drop(one);
    }
    assert_eq!((content(&memory, 0x1_0000, 0x1000), marked(&memory)), (9, vec![]));
    assert_eq!(reclaim.reclaim(0x1_0000, 0x1000), 0x1000);
}

/// Has `guest` write its page, wherever that is now.
fn poke(guest: &mut TinyGuest, value: u8) {
    let mut sregs = guest.vcpu.get_sregs().unwrap();
    (sregs.es.base, sregs.es.selector) = (POKED, 0);
    guest.vcpu.set_sregs(&sregs).unwrap();
    let mut regs = guest.vcpu.get_regs().unwrap();
    (regs.rdi, regs.rax) = (0, value.into());
    guest.vcpu.set_regs(&regs).unwrap();
    guest.run_to_stop();
}

#[test]
fn a_guest_writes_anew_what_was_discarded_and_the_dirty_log_has_both() {
    for shared in [false, true] {
        for back_end in [BackEnd::Bitmap, BackEnd::Scan] {
            if !has_kvm() {
                return;
            }
            let memory = memory::map(&spec(shared)).unwrap();
            let vm = KvmVm::create(&memory).unwrap();
            let Ok(tracker) = Tracker::new(&vm, back_end) else {
                continue;
            };
            let mut guest = TinyGuest::of(vm, Some(&tracker), PROGRAM, POKE);
            let changes = tracker.register(Baseline::Now).unwrap();
            poke(&mut guest, 5);
            changes.take().unwrap().commit();
            assert_eq!(Reclaim::of(&memory).reclaim(POKED, 0x1000), 0x1000);
            let taken = changes.take().unwrap();
            assert!(taken.contains(POKED));
            taken.commit();
            assert_eq!(memory.read_obj::<u8>(GuestAddress(POKED)).unwrap(), 0);
            poke(&mut guest, 6);
            assert!(changes.take().unwrap().contains(POKED), "{back_end}");
            assert_eq!(memory.read_obj::<u8>(GuestAddress(POKED)).unwrap(), 6);
        }
    }
}

#[test]
fn a_snapshot_has_what_was_there_when_it_was_frozen_though_the_guest_gives_it_back() {
    for shared in [false, true] {
        let memory = memory::map(&spec(shared)).unwrap();
        let reclaim = Reclaim::of(&memory);
        let Some(mut guest) = TinyGuest::boot(&memory, PROGRAM, POKE) else {
            return;
        };
        poke(&mut guest, 5);
        fill(&memory, 0x10_0000, 0x4000);
        let protection = CopyOnWrite::arm(&memory, Arc::new(|| {}))
            .unwrap()
            .keeping(reclaim.keep());
        let all = PageSet::full(&Arc::new(Layout::of(&memory)));
        // Before it is frozen, too: the protection of what is discarded would be gone.
        protection.protect(&all).unwrap();
        assert_eq!(reclaim.reclaim(0x10_0000, 0x1000), 0);
        protection.freeze(all).unwrap();
        assert_eq!(reclaim.reclaim(0x10_1000, 0x1000), 0);
        assert_eq!(reclaim.reclaim(POKED, 0x1000), 0);
        poke(&mut guest, 6);
        let mut source = protection.into_source();
        let mut found = vec![0; 32 << 20];
        while let Some(pages) = source.next_pages().unwrap() {
            let at = usize::try_from(pages.first * PAGE_SIZE).unwrap();
            found[at..at + pages.bytes.len()].copy_from_slice(pages.bytes);
        }
        assert_eq!(found[usize::try_from(POKED).unwrap()], 5);
        assert!(found[0x10_0000..0x10_4000].iter().all(|byte| *byte == 9));
        drop(source);
        assert_eq!(reclaim.reclaim(0x10_0000, 0x4000), 0x4000);
        assert_eq!(content(&memory, 0x10_0000, 0x4000), 0);
        poke(&mut guest, 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(POKED)).unwrap(), 7);
    }
}

#[test]
fn memory_that_is_yet_to_arrive_is_kept_until_it_has() {
    let memory = memory::map(&spec(false)).unwrap();
    let reclaim = Reclaim::of(&memory);
    let mut missing = PageBits::empty(8192);
    missing.insert(16);
    fill(&memory, 0x1_1000, 0x1000);
    let arriving = Arriving::start(&memory, &missing).unwrap();
    arriving.keep(reclaim.keep());
    assert_eq!(reclaim.reclaim(0x1_0000, 0x2000), 0);
    arriving.arrive(16..17, &[8; 4096]).unwrap();
    arriving.complete();
    assert_eq!(content(&memory, 0x1_0000, 0x1000), 8);
    assert_eq!(content(&memory, 0x1_1000, 0x1000), 9);
    assert_eq!(reclaim.reclaim(0x1_0000, 0x2000), 0x2000);
    assert_eq!(content(&memory, 0x1_0000, 0x2000), 0);
    // Nobody wants it kept any more, so nothing would let go of this.
    arriving.keep(reclaim.keep());
    assert_eq!(reclaim.reclaim(0x1_0000, 0x1000), 0x1000);
}
