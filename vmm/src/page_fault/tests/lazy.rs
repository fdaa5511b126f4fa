//! Memory that is filled while it is used has what the image has.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;

use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::chain::Chain;
use cutover_snapshot::early::EarlyPages;
use cutover_snapshot::image::{self, Image, Progress, Shape};
use cutover_snapshot::manifest::{Base, CpuNeeds, MemoryRegion, Parent};
use cutover_snapshot::store::{Snapshot, Store};
use cutover_snapshot::writer::Draft;
use vm_memory::{Bytes, GuestAddress};

use super::super::*;
use super::{SLOT_1, assert_ended, both_kinds, confined, content, in_another_process, layout, two_slots};
use crate::Error;
use crate::dirty::{Layout, PAGE_SIZE};
use crate::testing::{POKE, TinyGuest};

/// Where the tiny guest has its program.
const PROGRAM: u64 = (299 << 12) + 0x800;

/// A chain of snapshots of some memory, and the content that its newest has.
struct Saved {
    store: tempfile::TempDir,
    newest: Option<Snapshot>,
    content: Vec<u8>,
}

impl Saved {
    fn new(memory: &GuestMemory) -> Self {
        Self {
            store: tempfile::tempdir().unwrap(),
            newest: None,
            content: vec![0; usize::try_from(layout(memory).pages() * PAGE_SIZE).unwrap()],
        }
    }

    /// Adds a snapshot with `pages`, and what is to be in them.
    fn add(&mut self, memory: &GuestMemory, pages: impl Iterator<Item = (u64, u8)>) {
        let store = Store::open(self.store.path()).unwrap();
        let parent = self.newest.as_ref().map(Parent::from);
        let name = format!("snapshot-{}", fs::read_dir(self.store.path()).unwrap().count());
        let base = if parent.is_some() { Base::Parent } else { Base::Zero };
        let mut writer = store.create(&name, draft(memory, parent)).unwrap();
        let shape = Shape {
            page_bytes: 4096,
            pages: layout(memory).pages(),
            base,
            layout: image::Layout::Compressed { level: 1 },
        };
        let mut image = writer.image("memory", shape).unwrap();
        for (number, value) in pages {
            let mut page = [value; 4096];
            if value != 0 {
                page[..8].copy_from_slice(&number.to_le_bytes());
            }
            image.put(number, &page).unwrap();
            let at = usize::try_from(number * PAGE_SIZE).unwrap();
            self.content[at..at + 4096].copy_from_slice(&page);
        }
        writer.complete(image).unwrap();
        self.newest = Some(writer.commit().unwrap());
    }

    fn path(&self) -> &Path {
        &self.newest.as_ref().unwrap().path
    }

    fn image(&self) -> Image {
        Chain::open(self.path()).unwrap().image("memory").unwrap()
    }

    /// A chain of four for `memory`: every third page, then some changed, some zeroed, some new.
    fn chain(memory: &GuestMemory) -> Self {
        let pages = layout(memory).pages();
        let mut saved = Self::new(memory);
        saved.add(memory, (0..pages).step_by(3).map(|page| (page, 1)));
        saved.add(memory, (0..pages).step_by(7).map(|page| (page, 2)));
        saved.add(memory, (0..pages).step_by(9).map(|page| (page, 0)));
        saved.add(memory, (pages / 2..pages / 2 + 40).map(|page| (page, 3)));
        saved
    }
}

fn draft(memory: &GuestMemory, parent: Option<Parent>) -> Draft {
    let layout = layout(memory);
    let regions = layout.slots().iter().map(|slot| MemoryRegion {
        start: slot.start,
        bytes: slot.pages * PAGE_SIZE,
    });
    let bytes = layout.pages() * PAGE_SIZE;
    let spec = serde_json::json!({ "cpus": 1, "memory": { "size": bytes }, "boot": { "kernel": "vmlinux" } });
    Draft {
        created: "2026-11-21T12:00:00Z".parse().unwrap(),
        parent,
        spec: serde_json::from_value(spec).unwrap(),
        memory: regions.collect(),
        cpu: CpuNeeds::default(),
    }
}

/// Filled with what it has now, by a thread that begins as told.
fn filled_by(memory: &GuestMemory, on_thread: OnThread) -> LazyMemory {
    let image = Saved::chain(memory).image();
    LazyMemory::start(memory, image, EarlyPages::default(), 1, on_thread, || {}).unwrap()
}

fn start(memory: &GuestMemory, image: Image, workers: usize) -> LazyMemory {
    LazyMemory::start(memory, image, EarlyPages::default(), workers, confined(), || {}).unwrap()
}

#[test]
fn threads_that_read_memory_while_it_is_filled_find_what_the_image_has() {
    for workers in [1, 3] {
        for memory in both_kinds(4).into_iter().chain([two_slots()]) {
            let saved = Saved::chain(&memory);
            let lazy = start(&memory, saved.image(), workers);
            let layout = layout(&memory);
            thread::scope(|scope| {
                for seed in 0..4_u64 {
                    let (memory, saved, layout) = (&memory, &saved, &layout);
                    scope.spawn(move || {
                        // Each page once, in an order of their own.
                        for step in 0..layout.pages() {
                            let number = (step * 101 + seed * 57) % layout.pages();
                            let mut page = [0xaa; 4096];
                            memory.read_slice(&mut page, address_of(layout, number)).unwrap();
                            let at = usize::try_from(number * PAGE_SIZE).unwrap();
                            assert!(page == saved.content[at..at + 4096], "page {number}");
                        }
                    });
                }
            });
            lazy.wait(&|| true);
            assert!(content(&memory) == saved.content);
        }
    }
}

fn address_of(layout: &Layout, number: u64) -> GuestAddress {
    let slot = layout
        .slots()
        .iter()
        .rev()
        .find(|slot| slot.first_number <= number)
        .unwrap();
    GuestAddress(slot.start + (number - slot.first_number) * PAGE_SIZE)
}

#[test]
fn what_is_written_while_memory_is_filled_stays() {
    let memory = two_slots();
    let saved = Saved::chain(&memory);
    let lazy = start(&memory, saved.image(), 2);
    let layout = layout(&memory);
    for number in (0..layout.pages()).rev() {
        memory.write_obj(!number, address_of(&layout, number)).unwrap();
    }
    lazy.wait(&|| true);
    let mut expected = saved.content;
    for (number, page) in (0_u64..).zip(expected.chunks_mut(4096)) {
        page[..8].copy_from_slice(&(!number).to_le_bytes());
    }
    assert!(content(&memory) == expected);
}

#[test]
fn a_guest_runs_on_memory_that_comes_as_it_is_used() {
    let template = two_slots();
    let Some(guest) = TinyGuest::boot(&template, PROGRAM, POKE) else {
        return;
    };
    drop(guest);
    let mut saved = Saved::new(&template);
    saved.add(&template, (0..377).map(|page| (page, 5)));
    let memory = two_slots();
    // The guest's KVM is given memory that is not there, and its program is put into the page that came.
    let lazy = start(&memory, saved.image(), 1);
    let mut guest = TinyGuest::boot(&memory, PROGRAM, POKE).unwrap();
    for address in [0x3000, SLOT_1, SLOT_1 + (76 << 12)] {
        let mut sregs = guest.vcpu.get_sregs().unwrap();
        sregs.es.base = address + 8;
        guest.vcpu.set_sregs(&sregs).unwrap();
        guest.run_to_stop();
        let expected = u64::from_le_bytes([0, 5, 5, 5, 5, 5, 5, 5]);
        assert_eq!(
            memory.read_obj::<u64>(GuestAddress(address + 8)).unwrap(),
            expected,
            "{address:#x}"
        );
    }
    lazy.wait(&|| true);
}

#[test]
fn when_all_is_there_it_is_told_and_page_faults_are_the_kernels_again() {
    for memory in both_kinds(4) {
        let saved = Saved::chain(&memory);
        let (told, complete) = channel();
        let tell = move || told.send(()).unwrap();
        let lazy = LazyMemory::start(&memory, saved.image(), EarlyPages::default(), 2, confined(), tell).unwrap();
        complete.recv().unwrap();
        lazy.wait(&|| true);
        let total = 4 << 20;
        assert_eq!(lazy.progress(), Progress { done: total, total });
        assert!(
            CopyOnWrite::arm(&memory, confined()).is_ok(),
            "nobody else takes care of faults"
        );
        drop(lazy);
        assert!(content(&memory) == saved.content);
    }
}

#[test]
fn memory_that_is_being_filled_cannot_be_frozen() {
    let [memory, _] = both_kinds(4);
    let begun = Arc::new(Barrier::new(3));
    let both = begun.clone();
    let on_thread = Arc::new(move || {
        both.wait();
    });
    let lazy = filled_by(&memory, on_thread);
    assert!(matches!(CopyOnWrite::arm(&memory, confined()), Err(Unavailable::Busy)));
    begun.wait();
    lazy.wait(&|| true);
}

#[test]
fn memory_nobody_waits_for_any_more_is_given_up() {
    let [memory, _] = both_kinds(4);
    drop(start(&memory, Saved::chain(&memory).image(), 2));
}

#[test]
fn memory_can_be_filled_before_it_is_used() {
    for memory in both_kinds(4).into_iter().chain([two_slots()]) {
        let saved = Saved::chain(&memory);
        fill(&memory, &saved.image()).unwrap();
        assert!(content(&memory) == saved.content);
    }
}

#[test]
fn an_image_of_another_size_is_refused() {
    let saved = Saved::chain(&two_slots());
    let [memory, _] = both_kinds(4);
    let refused = LazyMemory::start(&memory, saved.image(), EarlyPages::default(), 1, confined(), || {});
    assert!(matches!(refused, Err(Error::MemoryImage { .. })));
    assert!(matches!(fill(&memory, &saved.image()), Err(Error::MemoryImage { .. })));
}

#[test]
fn a_damaged_chunk_ends_the_process_and_is_named() {
    if let Some(output) = in_another_process("lazy::a_damaged_chunk_ends_the_process_and_is_named") {
        assert_ended(&output, &["memory.pages", "damaged at byte 0"]);
        return;
    }
    let memory = two_slots();
    let saved = Saved::chain(&memory);
    let first = saved.store.path().join("snapshot-0/memory.pages");
    let file = OpenOptions::new().write(true).open(first).unwrap();
    file.write_all_at(&[0xff; 16], 0).unwrap();
    let lazy = start(&memory, saved.image(), 1);
    // Whoever reads the page gets nothing.
    let page: u8 = memory.read_obj(GuestAddress(3 << 12)).unwrap();
    lazy.wait(&|| true);
    unreachable!("a page of a damaged chunk is {page}");
}

#[test]
fn the_process_ends_when_memory_was_used_before_it_was_filled() {
    if let Some(output) = in_another_process("lazy::the_process_ends_when_memory_was_used_before_it_was_filled") {
        assert_ended(&output, &["used them too early"]);
        return;
    }
    let memory = two_slots();
    memory.write_obj(1_u8, GuestAddress(3 << 12)).unwrap();
    start(&memory, Saved::chain(&memory).image(), 1).wait(&|| true);
    unreachable!("memory was filled");
}

#[test]
fn the_process_ends_when_a_thread_that_fills_memory_panics() {
    if let Some(output) = in_another_process("lazy::the_process_ends_when_a_thread_that_fills_memory_panics") {
        assert_ended(&output, &["has panicked"]);
        return;
    }
    let memory = two_slots();
    let on_thread = Arc::new(|| panic!("on purpose"));
    let lazy = filled_by(&memory, on_thread);
    lazy.wait(&|| true);
    unreachable!("memory was filled");
}
