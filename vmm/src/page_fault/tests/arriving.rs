//! Memory that comes while it is used has what it had where it comes from.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use cutover_devices::GuestMemory;
use cutover_migration::pages::PageBits;
use cutover_migration::vm::ArrivingMemory;
use cutover_snapshot::image::Progress;
use vm_memory::{Bytes, GuestAddress};

use super::super::*;
use super::{SLOT_1, assert_ended, both_kinds, confined, content, in_another_process, layout, two_slots};
use crate::dirty::PAGE_SIZE;
use crate::seccomp::{self, ThreadKind};
use crate::testing::{POKE, TinyGuest};

/// Where the tiny guest has its program.
const PROGRAM: u64 = (299 << 12) + 0x800;
/// How long faults are waited for at a time.
const PATIENCE: Duration = Duration::from_millis(20);

/// The host that memory comes from.
struct Origin {
    /// What the guest has in its memory there.
    content: Vec<u8>,
    /// Which of that is not here.
    missing: PageBits,
}

impl Origin {
    /// Memory in which every third page was never touched, and of which every second page is missing.
    fn of(memory: &GuestMemory) -> Self {
        let pages = layout(memory).pages();
        let mut content = vec![0; usize::try_from(pages * PAGE_SIZE).unwrap()];
        let mut missing = PageBits::empty(pages);
        for (number, page) in (0..pages).zip(content.chunks_mut(4096)) {
            if number % 3 != 0 {
                page.fill(number.to_le_bytes()[0] | 1);
                page[..8].copy_from_slice(&number.to_le_bytes());
                if number % 2 == 0 {
                    missing.insert(number);
                }
            }
        }
        Self { content, missing }
    }

    fn bytes(&self, pages: Range<u64>) -> &[u8] {
        let at = |number| usize::try_from(number * PAGE_SIZE).unwrap();
        &self.content[at(pages.start)..at(pages.end)]
    }

    /// Writes to `memory` what came before the guest did: all that is not missing, and, as it was before, every fourth
    /// page that is.
    fn send_before(&self, memory: &GuestMemory) {
        for slot in layout(memory).slots() {
            for index in 0..slot.pages {
                let (number, address) = (slot.first_number + index, GuestAddress(slot.start + index * PAGE_SIZE));
                if !self.missing.contains(number) && number % 3 != 0 {
                    memory.write_slice(self.bytes(number..number + 1), address).unwrap();
                } else if self.missing.contains(number) && number % 4 == 0 {
                    memory.write_slice(&[0xee; 4096], address).unwrap();
                }
            }
        }
    }

    /// Sends what is wanted, until `done`; returns that in order.
    fn answer(&self, arriving: &Arriving, done: &AtomicBool) -> Vec<u64> {
        let mut sent = Vec::new();
        while !done.load(Ordering::Acquire) {
            for page in arriving.wanted(PATIENCE) {
                self.send(arriving, page..page + 1);
                sent.push(page);
            }
        }
        sent
    }

    fn send(&self, arriving: &Arriving, pages: Range<u64>) {
        arriving.arrive(pages.clone(), self.bytes(pages)).unwrap();
    }
}

/// Memory of which something is to come, and where from.
fn begin(memory: &GuestMemory) -> (Arriving, Origin) {
    let origin = Origin::of(memory);
    origin.send_before(memory);
    let arriving = Arriving::start(memory, &origin.missing).unwrap();
    (arriving, origin)
}

/// Has `use_memory` done while what it touches comes, by a thread that is confined as those of a migration.
fn while_it_comes(arriving: &Arriving, origin: &Origin, use_memory: impl FnOnce()) -> Vec<u64> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let answers = scope.spawn(|| {
            seccomp::confine_or_abort(ThreadKind::Migration);
            origin.answer(arriving, &done)
        });
        use_memory();
        done.store(true, Ordering::Release);
        answers.join().unwrap()
    })
}

#[test]
fn whoever_reads_memory_finds_what_it_has_where_it_comes_from() {
    for memory in both_kinds(4).into_iter().chain([two_slots()]) {
        let (arriving, origin) = begin(&memory);
        let sent = while_it_comes(&arriving, &origin, || assert!(content(&memory) == origin.content));
        let mut all = sent.clone();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), sent.len(), "nothing is wanted twice");
        assert!(all.into_iter().eq(origin.missing.iter()), "nothing else is wanted");
        let all = origin.content.len() as u64;
        assert_eq!(arriving.progress(), Progress { done: all, total: all });
        arriving.complete();
        arriving.wait(&|| true);
        assert!(
            CopyOnWrite::arm(&memory, confined()).is_ok(),
            "nobody else takes care of faults"
        );
        assert!(content(&memory) == origin.content);
    }
}

#[test]
fn what_is_pushed_by_several_streams_and_pulled_meanwhile_comes_once() {
    let memory = two_slots();
    let (arriving, origin) = begin(&memory);
    let pages = layout(&memory).pages();
    while_it_comes(&arriving, &origin, || {
        thread::scope(|scope| {
            for stream in 0..3 {
                let (arriving, origin) = (&arriving, &origin);
                scope.spawn(move || {
                    seccomp::confine_or_abort(ThreadKind::Migration);
                    // Overlapping, across the gap between the slots, and in other orders.
                    for step in 0..pages / 7 {
                        let first = (step * 7 + stream * 100) % (pages - 20);
                        origin.send(arriving, first..first + 20);
                    }
                    origin.send(arriving, pages - 20..pages);
                });
            }
            assert!(content(&memory) == origin.content);
            for slot in layout(&memory).slots() {
                memory.write_obj(0xdead_u64, GuestAddress(slot.start)).unwrap();
            }
        });
    });
    arriving.complete();
    // What the guest has written is not overwritten by what comes again.
    origin.send(&arriving, 0..pages);
    let mut expected = origin.content;
    for first in [0, 300 << 12] {
        expected[first..first + 8].copy_from_slice(&0xdead_u64.to_le_bytes());
    }
    assert!(content(&memory) == expected);
}

#[test]
fn pages_that_turn_out_to_be_zero_are() {
    let memory = two_slots();
    let pages = layout(&memory).pages();
    memory.write_slice(&[0xee; 8192], GuestAddress(0)).unwrap();
    let arriving = Arriving::start(&memory, &PageBits::full(pages)).unwrap();
    arriving.arrive_zero(0..pages).unwrap();
    arriving.complete();
    assert!(content(&memory).iter().all(|byte| *byte == 0));
}

#[test]
fn nobody_is_asked_for_pages_that_were_never_touched() {
    for memory in both_kinds(4) {
        let mut missing = PageBits::empty(layout(&memory).pages());
        missing.insert(500);
        let arriving = Arriving::start(&memory, &missing).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let asked = scope.spawn(|| {
                let mut asked = Vec::new();
                while !done.load(Ordering::Acquire) {
                    asked.extend(arriving.wanted(PATIENCE));
                }
                asked
            });
            for page in (0..480).step_by(3) {
                let address = GuestAddress(page * PAGE_SIZE);
                assert_eq!(memory.read_obj::<u64>(address).unwrap(), 0);
                memory.write_obj(page, address).unwrap();
            }
            done.store(true, Ordering::Release);
            assert_eq!(asked.join().unwrap(), [0; 0]);
        });
    }
}

#[test]
fn a_page_that_is_waited_for_is_wanted_before_those_around_it() {
    let memory = two_slots();
    let pages = layout(&memory).pages();
    let arriving = Arriving::start(&memory, &PageBits::full(pages)).unwrap();
    thread::scope(|scope| {
        let reads = scope.spawn(|| memory.read_obj::<u8>(GuestAddress(SLOT_1 + (70 << 12))).unwrap());
        let mut wanted = Vec::new();
        while wanted.is_empty() {
            wanted = arriving.wanted(PATIENCE);
        }
        // The last block of the second slot, which ends with the slot.
        let mut expected = vec![370];
        expected.extend((364..377).filter(|page| *page != 370));
        assert_eq!(wanted, expected);
        arriving.arrive(370..371, &[7; 4096]).unwrap();
        assert_eq!(reads.join().unwrap(), 7);
    });
    assert_eq!(arriving.wanted(Duration::ZERO), [0; 0]);
}

#[test]
fn a_guest_runs_on_memory_that_comes_from_elsewhere() {
    let template = two_slots();
    let Some(guest) = TinyGuest::boot(&template, PROGRAM, POKE) else {
        return;
    };
    drop(guest);
    let memory = two_slots();
    let (arriving, origin) = begin(&memory);
    while_it_comes(&arriving, &origin, || {
        let mut guest = TinyGuest::boot(&memory, PROGRAM, POKE).unwrap();
        for (address, number) in [(0x4000, 4_u64), (SLOT_1 + 0x4000, 304), (SLOT_1 + 0x3000, 303)] {
            let mut sregs = guest.vcpu.get_sregs().unwrap();
            sregs.es.base = address + 8;
            guest.vcpu.set_sregs(&sregs).unwrap();
            guest.run_to_stop();
            let at = usize::try_from(number * PAGE_SIZE).unwrap();
            let mut expected = origin.content[at..at + 4096].to_vec();
            expected[8] = 0;
            let mut page = vec![0xaa; 4096];
            memory.read_slice(&mut page, GuestAddress(address)).unwrap();
            assert!(page == expected, "{address:#x}");
        }
    });
}

#[test]
fn what_cannot_be_is_refused_and_memory_is_waited_for_on() {
    let memory = two_slots();
    let pages = layout(&memory).pages();
    let other = Arriving::start(&memory, &PageBits::full(pages + 1)).map(drop);
    assert!(other.unwrap_err().to_string().contains("memory"));
    let (arriving, origin) = begin(&memory);
    let refused = |pages, bytes: usize| arriving.arrive(pages, &vec![1; bytes]).unwrap_err();
    refused(pages - 1..pages + 1, 8192);
    refused(u64::MAX - 1..u64::MAX, 4096);
    assert!(arriving.arrive_zero(pages..pages + 1).is_err());
    let read = while_it_comes(&arriving, &origin, || assert!(content(&memory) == origin.content));
    assert!(!read.is_empty());
}

#[test]
fn memory_that_is_still_to_come_can_be_given_up() {
    let memory = two_slots();
    let (arriving, origin) = begin(&memory);
    let there = origin.content.len() as u64 - origin.missing.len() * PAGE_SIZE;
    assert_eq!(arriving.progress().done, there);
    arriving.wait(&|| false);
    drop(arriving);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(2 << 12)).unwrap(), 0);
}

#[test]
fn the_process_ends_when_the_rest_will_not_come_and_says_how_much_that_is() {
    if let Some(output) =
        in_another_process("arriving::the_process_ends_when_the_rest_will_not_come_and_says_how_much_that_is")
    {
        assert_ended(&output, &["the VM is lost: 40K of its memory", "the link broke"]);
        return;
    }
    let memory = two_slots();
    let mut missing = PageBits::empty(layout(&memory).pages());
    missing.insert_range(100..110);
    Arriving::start(&memory, &missing).unwrap().lost("the link broke");
}

#[test]
fn the_process_ends_when_less_came_than_was_missing() {
    if let Some(output) = in_another_process("arriving::the_process_ends_when_less_came_than_was_missing") {
        assert_ended(&output, &["the VM is lost", "says that it has sent all"]);
        return;
    }
    let memory = two_slots();
    let (arriving, origin) = begin(&memory);
    origin.send(&arriving, 0..200);
    arriving.complete();
}
