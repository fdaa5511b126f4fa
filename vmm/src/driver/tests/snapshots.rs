//! Snapshots of real VMs that go on running, and VMs made of them.

use std::path::PathBuf;

use cutover_snapshot::chain::Chain;
use cutover_snapshot::manifest::MEMORY_IMAGE;
use tempfile::TempDir;

use super::*;
use crate::page_fault::tests::external::handler;
use crate::snapshot::{ClockPolicy, Disks, Kind, Method, Source, Target, Trust};

/// Adds one to a counter in each of 256 pages, in order, over and over.
pub const COUNTING: &[u8] = &[
    0x31, 0xff, // xor edi, edi
    0xff, 0x87, 0x00, 0x00, 0x20, 0x00, // again: inc dword [rdi + 0x20_0000]
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xe7, 0xff, 0xff, 0x0f, 0x00, // and edi, 0xf_ffff
    0xe6, 0x80, // out 0x80, al
    0xeb, 0xea, // jmp again
];
/// Page of the first counter.
const COUNTERS: u64 = 0x20_0000 / 4096;
const COUNTERS_COUNT: u64 = 256;

/// A directory for snapshots.
pub struct Shelf(TempDir);

impl Shelf {
    pub fn new() -> Self {
        Self(TempDir::new().expect("temporary directory"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn request(&self, name: &str, kind: Kind) -> SnapshotRequest {
        SnapshotRequest {
            target: Target::Store {
                store: self.0.path().to_owned(),
                name: name.to_owned(),
            },
            kind,
            disks: Disks::Copied,
            compress: None,
        }
    }

    /// The counters in the snapshot called `name`.
    pub fn counters(&self, name: &str) -> Vec<u32> {
        let chain = Chain::open(&self.path(name)).expect("a snapshot");
        let image = chain.image(MEMORY_IMAGE).expect("memory");
        let mut reader = image.reader().expect("a reader");
        let counter = |page| {
            let found = reader.at(page).expect("undamaged").expect("a page");
            found.bytes.map_or(0, |bytes| {
                u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"))
            })
        };
        (COUNTERS..COUNTERS + COUNTERS_COUNT).map(counter).collect()
    }

    fn restore(&self, name: &str, change: impl FnOnce(&mut RestoreRequest)) -> RunningVm {
        let mut request = RestoreRequest {
            source: Source::Snapshot(self.path(name)),
            endpoints: Vec::new(),
            trust: Trust::VerifyOnRead,
            clock: ClockPolicy::Corrected,
            name: None,
            nets: Default::default(),
            disks: Default::default(),
            disks_dir: None,
            vsock: None,
            replace_disks: false,
            serial: SerialSpec::Null,
            hugepages: None,
            track: true,
            paused: false,
        };
        change(&mut request);
        start(true, move |options| Vmm::restore(&request, options))
    }
}

/// Checks that the counters are those of one moment, and returns the first one.
pub fn moment(counters: &[u32]) -> u32 {
    let first = counters[0];
    let behind = counters.iter().position(|&counter| counter != first);
    let rest = &counters[behind.unwrap_or(counters.len())..];
    assert!(rest.iter().all(|&counter| counter + 1 == first), "{counters:?}");
    first
}

/// Waits until the guest has written all counters another time.
pub fn wait_for_a_round(vm: &Controller) {
    // The first to ask is told of nothing.
    let mut written = 0;
    while written < 2 * COUNTERS_COUNT {
        written += vm.dirty_rate().expect("a running VM tells").pages;
    }
}

fn cancelled(result: &Result<SnapshotReport, Error>) -> bool {
    matches!(result, Err(Error::SnapshotCancelled))
}

#[test]
fn snapshots_of_a_running_guest_are_of_one_moment_each_and_in_order() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    let mut last = 0;
    for (name, kind) in [
        ("full", Kind::Full),
        ("one", Kind::Incremental),
        ("two", Kind::Incremental),
        ("whole", Kind::Full),
        ("three", Kind::Incremental),
    ] {
        wait_for_a_round(&guest.vm);
        let report = guest.vm.snapshot(shelf.request(name, kind)).expect("a snapshot");
        assert_eq!((&report.path, report.kind), (&shelf.path(name), kind));
        assert_eq!(report.method, Method::CopyOnWrite, "{:?}", report.method_reason);
        let first = moment(&shelf.counters(name));
        assert!(first > last, "{name}: {first} after {last}");
        last = first;
    }
    let built_on = |name: &str| {
        let chain = Chain::open(&shelf.path(name)).expect("a snapshot");
        let names = chain.snapshots().iter().map(|snapshot| snapshot.name.clone());
        names.collect::<Vec<_>>()
    };
    assert_eq!(built_on("two"), ["two", "one", "full"]);
    assert_eq!(built_on("three"), ["three", "whole"]);
    guest.vm.destroy().expect("a running VM can be destroyed");
    let (_, happened) = guest.exit();
    let finished = happened
        .iter()
        .filter(|kind| matches!(kind, EventKind::SnapshotFinished { .. }));
    assert_eq!(finished.count(), 5);
}

#[test]
fn a_restored_guest_goes_on_where_it_was_and_can_be_saved_again() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    wait_for_a_round(&guest.vm);
    guest
        .vm
        .snapshot(shelf.request("full", Kind::Full))
        .expect("a snapshot");
    wait_for_a_round(&guest.vm);
    guest
        .vm
        .snapshot(shelf.request("next", Kind::Incremental))
        .expect("a snapshot");
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
    for (trust, from, to) in [
        (Trust::VerifyOnRead, "full", "full-lazy"),
        (Trust::VerifyOnRead, "next", "next-lazy"),
        (Trust::VerifyFirst, "full", "full-verified"),
        (Trust::Trusted, "full", "full-trusted"),
    ] {
        let restored = shelf.restore(from, |request| request.trust = trust);
        wait_for_a_round(&restored.vm);
        restored
            .vm
            .snapshot(shelf.request(to, Kind::Incremental))
            .expect("a snapshot");
        let (before, after) = (moment(&shelf.counters(from)), moment(&shelf.counters(to)));
        assert!(after > before, "{to}: {after} after {before}");
        restored.vm.destroy().expect("a running VM can be destroyed");
        restored.exit();
    }
}

#[test]
fn a_paused_guest_stays_paused_and_is_the_same_in_all_its_snapshots_and_restored() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    wait_for_a_round(&guest.vm);
    guest.vm.pause().expect("a running VM can be paused");
    let report = guest
        .vm
        .snapshot(shelf.request("full", Kind::Full))
        .expect("a snapshot");
    assert_eq!(report.pause_ns, 0);
    guest
        .vm
        .snapshot(shelf.request("same", Kind::Incremental))
        .expect("a snapshot");
    assert_eq!(guest.vm.state().expect("it lives"), State::Paused);
    guest.vm.destroy().expect("a paused VM can be destroyed");
    guest.exit();
    let restored = shelf.restore("same", |request| request.paused = true);
    restored
        .vm
        .snapshot(shelf.request("again", Kind::Full))
        .expect("a snapshot");
    assert_eq!(shelf.counters("same"), shelf.counters("full"));
    assert_eq!(shelf.counters("again"), shelf.counters("full"));
    restored.vm.destroy().expect("a paused VM can be destroyed");
    restored.exit();
}

#[test]
fn a_snapshot_that_cannot_be_made_leaves_nothing_and_the_next_has_what_it_would_have_had() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    let refused = guest.vm.snapshot(shelf.request("early", Kind::Incremental));
    assert!(matches!(refused, Err(Error::NoBase)), "{refused:?}");
    guest
        .vm
        .snapshot(shelf.request("full", Kind::Full))
        .expect("a snapshot");
    wait_for_a_round(&guest.vm);
    // The name is taken.
    let failed = guest.vm.snapshot(shelf.request("full", Kind::Incremental));
    assert!(matches!(failed, Err(Error::Snapshot(_))), "{failed:?}");
    guest.vm.pause().expect("a running VM can be paused");
    guest
        .vm
        .snapshot(shelf.request("next", Kind::Incremental))
        .expect("a snapshot");
    guest
        .vm
        .snapshot(shelf.request("whole", Kind::Full))
        .expect("a snapshot");
    assert_eq!(shelf.counters("next"), shelf.counters("whole"));
    guest.vm.destroy().expect("a paused VM can be destroyed");
    let (_, happened) = guest.exit();
    assert!(
        happened
            .iter()
            .any(|kind| matches!(kind, EventKind::SnapshotFailed { .. }))
    );
}

#[test]
fn there_is_one_snapshot_at_a_time_and_it_can_be_cancelled() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    assert_eq!(refusal(guest.vm.cancel_snapshot()), Refusal::NoSnapshotUnderWay);
    let (answer, answered) = channel();
    let request = shelf.request("first", Kind::Full);
    guest.vm.submit(
        |reply| Command::Snapshot { request, reply },
        move |result| answer.send(result).expect("the test listens"),
    );
    let second = guest.vm.snapshot(shelf.request("second", Kind::Full));
    let cancel = guest.vm.cancel_snapshot();
    let first = answered.recv().expect("an answer");
    // Whichever was faster, each is as it was told.
    match &second {
        Err(Error::Refused(Refusal::SnapshotUnderWay)) => {}
        second => assert!(first.is_ok() && second.is_ok(), "{first:?} {second:?}"),
    }
    assert_eq!(shelf.path("first").exists(), first.is_ok());
    assert!(
        first.is_ok() || (cancelled(&first) && cancel.is_ok()),
        "{first:?} {cancel:?}"
    );
    guest
        .vm
        .snapshot(shelf.request("third", Kind::Full))
        .expect("a snapshot");
    moment(&shelf.counters("third"));
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn the_end_of_a_vm_ends_its_snapshot_and_leaves_nothing_of_it() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    let (answer, answered) = channel();
    let request = shelf.request("never", Kind::Full);
    guest.vm.submit(
        |reply| Command::Snapshot { request, reply },
        move |result| answer.send(result).expect("the test listens"),
    );
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
    let outcome = answered.recv().expect("an answer");
    assert!(outcome.is_ok() || cancelled(&outcome), "{outcome:?}");
    let left = std::fs::read_dir(shelf.0.path()).expect("a directory").count();
    assert_eq!(left, usize::from(outcome.is_ok()));
}

#[test]
fn two_files_hold_a_vm_as_firecracker_has_it() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    let files = |name: &str, kind| SnapshotRequest {
        target: Target::Files {
            state: shelf.path(&format!("{name}.state")),
            memory: shelf.path(&format!("{name}.memory")),
        },
        disks: Disks::Referenced,
        ..shelf.request(name, kind)
    };
    wait_for_a_round(&guest.vm);
    guest.vm.pause().expect("a running VM can be paused");
    guest.vm.snapshot(files("full", Kind::Full)).expect("a snapshot");
    guest
        .vm
        .snapshot(shelf.request("whole", Kind::Full))
        .expect("a snapshot");
    guest.vm.destroy().expect("a paused VM can be destroyed");
    guest.exit();
    let memory = std::fs::read(shelf.path("full.memory")).expect("memory");
    assert_eq!(memory.len(), 32 << 20);
    let page = |number: u64| &memory[usize::try_from(number * 4096).expect("small")..][..4];
    let counters = (COUNTERS..COUNTERS + COUNTERS_COUNT)
        .map(|number| u32::from_le_bytes(page(number).try_into().expect("four bytes")));
    assert!(counters.eq(shelf.counters("whole")));
    let restored = shelf.restore("", |request| {
        request.source = Source::Files {
            state: shelf.path("full.state"),
            memory: shelf.path("full.memory"),
        };
    });
    wait_for_a_round(&restored.vm);
    restored.vm.pause().expect("a running VM can be paused");
    restored
        .vm
        .snapshot(files("diff", Kind::Incremental))
        .expect("a snapshot");
    restored
        .vm
        .snapshot(shelf.request("after", Kind::Full))
        .expect("a snapshot");
    let (before, after) = (moment(&shelf.counters("whole")), moment(&shelf.counters("after")));
    assert!(after > before, "{after} after {before}");
    // What the difference has over what was before is what is now.
    let difference = std::fs::read(shelf.path("diff.memory")).expect("memory");
    assert_eq!(difference.len(), memory.len());
    restored.vm.destroy().expect("a paused VM can be destroyed");
    restored.exit();
}

#[test]
fn memory_that_another_process_has_yet_to_fill_is_in_a_snapshot_as_it_will_be() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Shelf::new();
    let (state, memory) = (shelf.path("saved.state"), shelf.path("saved.memory"));
    wait_for_a_round(&guest.vm);
    guest
        .vm
        .snapshot(SnapshotRequest {
            target: Target::Files {
                state: state.clone(),
                memory: memory.clone(),
            },
            disks: Disks::Referenced,
            ..shelf.request("", Kind::Full)
        })
        .expect("a snapshot");
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
    let memory = std::fs::read(memory).expect("memory");
    let first = &memory[usize::try_from(COUNTERS * 4096).expect("small")..][..4];
    let before = u32::from_le_bytes(first.try_into().expect("four bytes"));
    let (_dir, socket) = handler(move |told| told.serve(&memory));
    let restored = shelf.restore("", |request| {
        request.source = Source::Served { state, socket };
        request.paused = true;
    });
    let report = restored.vm.snapshot(shelf.request("served", Kind::Full));
    assert_eq!(report.expect("a snapshot").method, Method::Paused);
    assert_eq!(moment(&shelf.counters("served")), before);
    restored.vm.destroy().expect("a paused VM can be destroyed");
    restored.exit();
}
