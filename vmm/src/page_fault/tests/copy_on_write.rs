//! What is copied is what was there when it was frozen, whoever writes meanwhile.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, RwLock};
use std::thread::{self, JoinHandle};

use cutover_devices::GuestMemory;
use cutover_snapshot::image::PageSource;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::super::copy_on_write::EARLY_PAGES_MAX;
use super::super::*;
use super::{SLOT_1, both_kinds, confined, content, layout, two_slots};
use crate::dirty::{BackEnd, Baseline, Layout, PAGE_SIZE, PageRange, PageSet, Tracker};
use crate::testing::{POKE, SCATTER, TinyGuest};

/// Where tiny guests have their program, in the last page of the first slot of [`two_slots`].
const PROGRAM: u64 = (299 << 12) + 0x800;

/// Pages as they came from a source.
struct Copied {
    content: Vec<u8>,
    pages: PageSet,
}

impl Copied {
    /// Nothing, of memory like `memory`.
    fn nothing(memory: &GuestMemory) -> Self {
        Self {
            content: vec![0; content(memory).len()],
            pages: PageSet::empty(&layout(memory)),
        }
    }

    /// Takes the next pages; false if there are no more.
    fn take(&mut self, source: &mut FrozenPages) -> bool {
        let Some(pages) = source.next_pages().unwrap() else {
            return false;
        };
        let at = usize::try_from(pages.first * PAGE_SIZE).unwrap();
        self.content[at..at + pages.bytes.len()].copy_from_slice(pages.bytes);
        let layout = self.pages.layout().clone();
        for number in pages.first..pages.first + pages.bytes.len() as u64 / PAGE_SIZE {
            let address = address_of(&layout, number);
            assert!(!self.pages.contains(address), "page {number} came twice");
            self.pages.insert_range(PageRange::page(address));
        }
        true
    }

    fn take_all(mut self, mut source: FrozenPages) -> Self {
        while self.take(&mut source) {}
        self
    }
}

fn address_of(layout: &Layout, number: u64) -> u64 {
    let slot = layout
        .slots()
        .iter()
        .rev()
        .find(|slot| slot.first_number <= number)
        .unwrap();
    slot.start + (number - slot.first_number) * PAGE_SIZE
}

fn all_pages(memory: &GuestMemory) -> PageSet {
    PageSet::full(&layout(memory))
}

/// Something that writes memory until it is told to stop, in rounds that can be held off.
struct Writer {
    rounds: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Calls `round` again and again, never while `gate` is held for writing, until nobody wants to know.
    fn start(gate: &Arc<RwLock<()>>, mut round: impl FnMut() + Send + 'static) -> Self {
        let (done, rounds): (Sender<()>, _) = channel();
        let gate = gate.clone();
        let thread = thread::spawn(move || {
            while done.send(()).is_ok() {
                let _open = gate.read().unwrap();
                round();
            }
        });
        Self { rounds, thread }
    }

    /// Waits for a round that begins from now on.
    fn has_gone_on(&self) {
        while self.rounds.try_recv().is_ok() {}
        // The first to come may be of a round that had begun before.
        for _ in 0..2 {
            self.rounds.recv().unwrap();
        }
    }

    fn stop(self) {
        drop(self.rounds);
        self.thread.join().unwrap();
    }
}

/// Numbers that look random.
fn scattered(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    }
}

/// Writes a number into 64 pages of `memory` here and there, by the processor.
fn by_processor(memory: &GuestMemory, seed: u64) -> impl FnMut() + Send + 'static {
    let (memory, layout, mut next) = (memory.clone(), layout(memory), scattered(seed));
    move || {
        for _ in 0..64 {
            let address = address_of(&layout, next() % layout.pages()) + next() % 512 * 8;
            memory.write_obj(next(), GuestAddress(address)).unwrap();
        }
    }
}

/// Writes 8 of those pages of `memory` here and there, by the kernel.
fn by_system_call(memory: &GuestMemory, pages: Range<u64>) -> impl FnMut() + Send + 'static {
    let (memory, layout, mut next) = (memory.clone(), layout(memory), scattered(9));
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut reader = File::from(OwnedFd::from(reader));
    move || {
        for _ in 0..8 {
            let page = pages.start + next() % (pages.end - pages.start);
            let address = GuestAddress(address_of(&layout, page));
            writer.write_all(&[next().to_le_bytes()[0]; 4096]).unwrap();
            let mut slice = memory.get_slice(address, 4096).unwrap();
            let read = reader.read_volatile(&mut slice).unwrap();
            assert_eq!(read, 4096);
        }
    }
}

/// Copies `memory` while all of `writers` go on; asserts that it is what it was in between.
fn assert_copied_as_frozen(memory: &GuestMemory, gate: &RwLock<()>, writers: &[Writer]) {
    let protection = CopyOnWrite::arm(memory, confined()).unwrap();
    // Ahead of time, as the snapshots do: pages that are written again are let go.
    protection.protect(&all_pages(memory)).unwrap();
    writers.iter().for_each(Writer::has_gone_on);

    let stopped = gate.write().unwrap();
    let expected = content(memory);
    protection.freeze(all_pages(memory)).unwrap();
    drop(stopped);

    let mut source = protection.into_source();
    assert_eq!(source.bytes_total(), expected.len() as u64);
    let mut copied = Copied::nothing(memory);
    writers.iter().for_each(Writer::has_gone_on);
    let mut pieces = 0;
    while copied.take(&mut source) {
        pieces += 1;
        if pieces % 50 == 0 {
            writers.iter().for_each(Writer::has_gone_on);
        }
    }
    assert!(copied.pages == all_pages(memory));
    assert!(copied.content == expected, "not what was frozen");
    assert!(content(memory) != expected, "nobody wrote");
}

#[test]
fn memory_is_copied_as_it_was_frozen_while_threads_and_system_calls_write_it() {
    for memory in both_kinds(4) {
        let gate = Arc::new(RwLock::new(()));
        let writers = [
            Writer::start(&gate, by_processor(&memory, 1)),
            Writer::start(&gate, by_processor(&memory, 2)),
            Writer::start(&gate, by_system_call(&memory, 0..1024)),
        ];
        for _ in 0..3 {
            assert_copied_as_frozen(&memory, &gate, &writers);
        }
        writers.into_iter().for_each(Writer::stop);
    }
}

#[test]
fn memory_is_copied_as_it_was_frozen_while_a_guest_writes_it() {
    let memory = two_slots();
    let Some(mut guest) = TinyGuest::boot(&memory, PROGRAM, SCATTER) else {
        return;
    };
    let gate = Arc::new(RwLock::new(()));
    let writers = [
        Writer::start(&gate, move || guest.run_to_stop()),
        Writer::start(&gate, by_system_call(&memory, 300..377)),
    ];
    for _ in 0..3 {
        assert_copied_as_frozen(&memory, &gate, &writers);
    }
    writers.into_iter().for_each(Writer::stop);
}

#[test]
fn what_a_guest_writes_to_a_frozen_page_is_in_the_dirty_log_and_not_in_the_copy() {
    let memory = two_slots();
    let Some(mut guest) = TinyGuest::boot(&memory, PROGRAM, POKE) else {
        return;
    };
    let tracker = Tracker::new(&guest.vm, BackEnd::Bitmap).unwrap();
    let consumer = tracker.register(Baseline::Now).unwrap();
    let written = [0x3000, 0x5000, SLOT_1 + 0x7000];
    written
        .iter()
        .for_each(|&address| memory.write_obj(7_u8, GuestAddress(address)).unwrap());
    consumer.take().unwrap().commit();

    let protection = CopyOnWrite::arm(&memory, confined()).unwrap();
    protection.freeze(all_pages(&memory)).unwrap();
    let expected = content(&memory);
    let poke = |guest: &mut TinyGuest, address| {
        let mut sregs = guest.vcpu.get_sregs().unwrap();
        sregs.es.base = address;
        guest.vcpu.set_sregs(&sregs).unwrap();
        guest.run_to_stop();
    };
    written.iter().for_each(|&address| poke(&mut guest, address));
    let dirty = consumer.take().unwrap();
    for address in written {
        assert_eq!(memory.read_obj::<u8>(GuestAddress(address)).unwrap(), 0);
        assert!(dirty.contains(address), "{address:#x}");
    }
    dirty.commit();

    let copied = Copied::nothing(&memory).take_all(protection.into_source());
    assert!(copied.content == expected);
    // The log goes on being exact when protection is over.
    poke(&mut guest, 0x3000);
    assert!(consumer.take().unwrap().contains(0x3000));
}

#[test]
fn pages_that_nobody_had_touched_are_frozen_as_zeros() {
    for memory in both_kinds(4) {
        let protection = CopyOnWrite::arm(&memory, confined()).unwrap();
        protection.freeze(all_pages(&memory)).unwrap();
        for page in 0..1024_u64 {
            memory.write_obj(page + 1, GuestAddress(page << 12)).unwrap();
        }
        let copied = Copied::nothing(&memory).take_all(protection.into_source());
        assert!(copied.pages == all_pages(&memory));
        assert!(copied.content.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn only_frozen_pages_are_copied_and_others_can_be_written() {
    let memory = two_slots();
    memory.write_obj(1_u64, GuestAddress(0x2000)).unwrap();
    memory.write_obj(2_u64, GuestAddress(SLOT_1)).unwrap();
    let protection = CopyOnWrite::arm(&memory, confined()).unwrap();
    protection.protect(&all_pages(&memory)).unwrap();
    let mut pages = PageSet::empty(&layout(&memory));
    for address in [0x2000, 0x3000, SLOT_1] {
        pages.insert_range(PageRange::page(address));
    }
    protection.freeze(pages.clone()).unwrap();
    for address in [0x1000, 0x2000, SLOT_1 + 0x1000] {
        memory.write_obj(9_u64, GuestAddress(address)).unwrap();
    }
    let copied = Copied::nothing(&memory).take_all(protection.into_source());
    assert!(copied.pages == pages);
    let word = |number: usize| u64::from_le_bytes(copied.content[number * 4096..][..8].try_into().unwrap());
    assert_eq!([2, 3, 300].map(word), [1, 0, 2]);
}

/// Memory with more pages than may be saved early, frozen, and a thread that writes all of them; it tells of each.
fn overwritten(memory: &GuestMemory) -> (FrozenPages, Receiver<u64>, JoinHandle<()>) {
    let pages = layout(memory).pages();
    assert!(pages > 2 * EARLY_PAGES_MAX);
    let protection = CopyOnWrite::arm(memory, confined()).unwrap();
    protection.freeze(all_pages(memory)).unwrap();
    let (wrote, written) = channel();
    let memory = memory.clone();
    let writer = thread::spawn(move || {
        for page in 0..pages {
            memory.write_obj(page + 1, GuestAddress(page << 12)).unwrap();
            // Nobody may want to know any more.
            let _ = wrote.send(page);
        }
    });
    (protection.into_source(), written, writer)
}

#[test]
fn a_writer_waits_for_the_copier_when_too_many_pages_are_saved_early() {
    let [memory, _] = both_kinds(32);
    let (source, written, writer) = overwritten(&memory);
    for page in 0..EARLY_PAGES_MAX {
        assert_eq!(written.recv().unwrap(), page);
    }
    // The next one is not written before the copier has made room.
    assert_eq!(memory.read_obj::<u64>(GuestAddress(EARLY_PAGES_MAX << 12)).unwrap(), 0);
    assert!(written.try_recv().is_err());
    let copied = Copied::nothing(&memory).take_all(source);
    writer.join().unwrap();
    assert!(copied.pages == all_pages(&memory));
    assert!(copied.content.iter().all(|&byte| byte == 0));
    assert_eq!(written.iter().count() as u64, layout(&memory).pages() - EARLY_PAGES_MAX);
}

#[test]
fn who_gives_up_copying_lets_every_writer_go_on() {
    let [memory, _] = both_kinds(32);
    let (mut source, written, writer) = overwritten(&memory);
    assert!(Copied::nothing(&memory).take(&mut source));
    written
        .iter()
        .take(usize::try_from(EARLY_PAGES_MAX).unwrap())
        .for_each(drop);
    drop(source);
    writer.join().unwrap();
    let last = layout(&memory).pages();
    assert_eq!(memory.read_obj::<u64>(GuestAddress((last - 1) << 12)).unwrap(), last);
}

#[test]
fn protection_that_is_dropped_before_it_is_used_leaves_nothing_behind() {
    for memory in both_kinds(4) {
        let protection = CopyOnWrite::arm(&memory, confined()).unwrap();
        protection.protect(&all_pages(&memory)).unwrap();
        assert!(matches!(CopyOnWrite::arm(&memory, confined()), Err(Unavailable::Busy)));
        drop(protection);
        memory.write_obj(1_u64, GuestAddress(0x1000)).unwrap();
        assert!(CopyOnWrite::arm(&memory, confined()).is_ok());
    }
}

#[test]
fn when_nobody_takes_care_of_page_faults_any_more_writers_go_on_and_the_copy_fails() {
    let [memory, _] = both_kinds(4);
    let frozen = Arc::new(Barrier::new(2));
    let told = frozen.clone();
    let on_thread = Arc::new(move || {
        told.wait();
        panic!("the page-fault thread ends");
    });
    let protection = CopyOnWrite::arm(&memory, on_thread).unwrap();
    protection.freeze(all_pages(&memory)).unwrap();
    frozen.wait();
    memory.write_obj(1_u64, GuestAddress(0x1000)).unwrap();
    assert!(protection.into_source().next_pages().is_err());
}
