//! Real VMs of which cuts are taken, and that go back to them.

use cutover_devices::GuestMemory;
use cutover_migration::pages::PageBits;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use super::snapshots::{COUNTING, Shelf, moment, wait_for_a_round};
use super::*;
use crate::dirty::Baseline;
use crate::migration::{MemoryImage, MovingDisks};
use crate::protection::{CutReport, Disks, Notice, Protection, Seeded, SharedCuts, copy_pages};
use crate::snapshot::{CutSnapshot, Kind};

/// Where the counters of the guest are that counts.
const COUNTERS: u64 = 0x20_0000;
const COUNTERS_COUNT: u64 = 256;

/// A guest that counts, as protected as it can be without a standby.
struct Member {
    guest: RunningVm,
    protection: Protection,
    memory: GuestMemory,
    notices: Receiver<Notice>,
}

impl Member {
    fn run(program: &[u8]) -> Option<Self> {
        Self::run_with(program, |_| {})
    }

    fn run_with(program: &[u8], change: impl FnOnce(&mut VmSpec)) -> Option<Self> {
        Self::run_until(program, change, wait_for_a_round)
    }

    /// Runs `program` on what `change` makes of a VM, until `runs` returns.
    fn run_until(program: &[u8], change: impl FnOnce(&mut VmSpec), runs: impl FnOnce(&Controller)) -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        let kernel = kernel(program);
        let mut spec = tiny_spec(kernel.path());
        change(&mut spec);
        let (tell, notices) = channel();
        let (made, protection) = channel();
        let guest = start(true, move |options| {
            let mut vmm = Vmm::build(&spec, options)?;
            let protection = vmm.protect(tell)?;
            let memory = vmm.machine.memory().clone();
            let member = vmm.driver.member.as_mut().expect("somebody speaks for it");
            member.guard(seeded(&spec, &vmm.machine)?);
            made.send((protection, memory)).expect("the test listens");
            Ok(vmm)
        });
        let (protection, memory) = protection.recv().expect("the VM is built");
        runs(&guest.vm);
        Some(Self {
            guest,
            protection,
            memory,
            notices,
        })
    }

    fn counters(&self) -> Vec<u32> {
        let addresses = (0..COUNTERS_COUNT).map(|page| GuestAddress(COUNTERS + (page << 12)));
        addresses
            .map(|address| self.memory.read_obj(address).expect("RAM"))
            .collect()
    }

    fn take(&mut self, epoch: u64) -> CutReport {
        self.protection.block(epoch).expect("it is protected");
        self.protection.take(epoch).expect("it can be taken")
    }

    /// Takes a cut that everybody takes and relies on.
    fn cut(&mut self, epoch: u64) -> CutReport {
        let report = self.take(epoch);
        self.protection.validate(epoch).expect("it was taken");
        self.protection.permanent(epoch).expect("it is valid");
        report
    }

    fn count_on(&self) {
        wait_for_a_round(&self.guest.vm);
    }
}

/// What seeding leaves: a shadow that has all of memory.
fn seeded(spec: &VmSpec, machine: &Machine) -> Result<Seeded, Error> {
    let changes = machine.tracker.register(Baseline::Now)?;
    let guest = MemoryImage::of(machine.memory());
    let shadow = MemoryImage::of(&crate::memory::map(&spec.memory)?);
    let pages = cutover_migration::vm::Image::pages(&guest);
    copy_pages(&guest, &shadow, &PageBits::full(pages))?;
    Ok(Seeded {
        changes,
        cuts: SharedCuts::new(Arc::new(shadow)),
        disks: Disks::Watched {
            moving: MovingDisks::of(&machine.devices),
            left: Vec::new(),
        },
        group: Arc::default(),
        to: "nowhere".to_owned(),
    })
}

#[test]
fn a_vm_that_goes_back_has_the_memory_of_the_cut_to_the_last_counter() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    member.cut(1);
    member.count_on();
    member.guest.vm.pause().expect("it runs");
    let at_cut = member.counters();
    member.cut(2);
    member.guest.vm.resume().expect("it is paused");
    member.count_on();
    // Neither what is in a cut that is not decided nor what no cut has is left.
    member.take(3);
    member.count_on();
    member.protection.roll_back(2).expect("it is permanent");
    assert_eq!(member.counters(), at_cut);
    member.protection.resume().expect("it stands still");
    member.guest.vm.resume().expect("it was paused at the cut");
    member.count_on();
    assert!(member.counters()[0] > at_cut[0]);
}

#[test]
fn a_vm_goes_back_again_and_again_and_on_from_a_moment_at_which_it_ran() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    let mut last = 0;
    for epoch in 1..=3 {
        let report = member.cut(epoch);
        assert!(report.dirty_pages >= COUNTERS_COUNT, "{report:?}");
        member.count_on();
        member.protection.roll_back(epoch).expect("it is permanent");
        let first = moment(&member.counters());
        assert!(first >= last, "it counts on from the cut before");
        member.protection.resume().expect("it stands still");
        member.count_on();
        last = first;
    }
    let status = member.protection.status().expect("it is protected");
    assert_eq!((status.cuts, status.permanent, status.lag), (3, 3, 0));
    let states = states(&member.guest.happened());
    assert_eq!(states.iter().filter(|state| **state == "rolled_back").count(), 3);
}

#[test]
fn disks_are_cut_and_go_back_with_memory() {
    let image = NamedTempFile::new().expect("temporary file");
    image.as_file().set_len(1 << 20).expect("sparse");
    let disk = disk(&image, DiskIo::Auto);
    let Some(mut member) = Member::run_with(COUNTING, |spec| spec.disks.push(disk)) else {
        return;
    };
    let first = member.take(1);
    assert_eq!(first.disk_bytes, 1 << 20, "nobody has anything of it yet");
    member.protection.invalidate(1).expect("it is protected");
    assert_eq!(member.cut(2).disk_bytes, 1 << 20);
    assert_eq!(member.cut(3).disk_bytes, 0, "nothing was written");
    member.protection.roll_back(3).expect("it is permanent");
    member.protection.resume().expect("it stands still");
    member.count_on();
    assert_eq!(member.cut(4).disk_bytes, 0);
    member.protection.unprotect().expect("it runs");
}

#[test]
fn a_cut_that_does_not_count_is_covered_by_the_next() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    member.take(1);
    member.guest.vm.pause().expect("it runs");
    member.protection.invalidate(1).expect("it is protected");
    let at_cut = member.counters();
    // Nothing was written since the first one: all that this has is what that had.
    let report = member.cut(2);
    assert!(report.dirty_pages >= COUNTERS_COUNT, "{report:?}");
    member.guest.vm.resume().expect("it is paused");
    member.count_on();
    member.protection.roll_back(2).expect("it is permanent");
    assert_eq!(member.counters(), at_cut);
}

#[test]
fn there_is_no_way_back_before_the_first_permanent_cut_and_the_vm_stands_still() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    member.take(1);
    let refused = member.protection.roll_back(1);
    assert!(matches!(refused, Err(Error::NoSuchCut { cut: 1 })), "{refused:?}");
    assert_eq!(states(&member.guest.happened()).last(), Some(&"fenced"));
}

#[test]
fn a_fenced_vm_goes_on_when_its_group_says_so_and_not_before() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    member.cut(1);
    member.protection.fence().expect("it runs");
    let counters = member.counters();
    let fenced = State::Fenced { ran: true };
    assert_eq!(refusal(member.guest.vm.resume()), Refusal::StandsStill(fenced));
    assert!(matches!(
        member.protection.take(2),
        Err(Error::Refused(Refusal::StandsStill(_)))
    ));
    assert_eq!(member.counters(), counters, "nothing runs");
    member.protection.resume().expect("it is fenced");
    member.count_on();
    member.cut(2);
}

#[test]
fn what_would_end_its_protection_is_refused_until_the_vm_has_left_its_group() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    for request in [Request::Cycle, Request::Reboot { timeout: PATIENCE }] {
        let (answer, answered) = channel();
        let asked = |reply| Command::Lifecycle(request, reply);
        member
            .guest
            .vm
            .submit(asked, move |done: Result<(), Error>| drop(answer.send(done)));
        let refused = answered.recv().expect("an answer");
        assert_eq!(refusal(refused), Refusal::Protected, "{request:?}");
    }
    let (tell, _notices) = channel();
    assert!(matches!(
        member.guest.vm.protect(tell),
        Err(Error::Refused(Refusal::Protected))
    ));
    member.protection.unprotect().expect("it runs");
    assert!(matches!(
        member.protection.take(1),
        Err(Error::Refused(Refusal::NotProtected))
    ));
    member.guest.vm.cycle().expect("nobody protects it");
}

#[test]
fn a_vm_that_nobody_speaks_for_any_more_is_fenced() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    member.cut(1);
    drop(member.protection);
    let happened = member
        .guest
        .wait_until(|happened| states(happened).last() == Some(&"fenced"));
    assert!(happened.contains(&EventKind::Protected {
        to: "nowhere".to_owned()
    }));
}

#[test]
fn a_guest_that_powers_off_is_there_until_its_group_lets_go_of_it() {
    let Some(mut member) = Member::run_until(OBEDIENT, |_| {}, |_| {}) else {
        return;
    };
    member.cut(1);
    member.guest.vm.press_power_button().expect("it runs");
    let told = member.notices.recv_timeout(PATIENCE).expect("it is told");
    assert!(matches!(told, Notice::GuestEnded(_)), "{told:?}");
    // The group may go back to when it had not ended.
    member.protection.roll_back(1).expect("it is permanent");
    member.protection.resume().expect("it stands still");
    member.guest.vm.press_power_button().expect("it runs");
    let again = member.notices.recv_timeout(PATIENCE).expect("it is told");
    assert!(matches!(again, Notice::GuestEnded(_)), "{again:?}");
    member.protection.unprotect().expect("what it has sent leaves");
    drop(member.protection);
    assert_eq!(member.guest.exit().0, Exit::Shutdown);
}

#[test]
fn the_end_of_a_guest_is_told_and_whether_it_failed() {
    let Some(member) = Member::run(COUNTING) else { return };
    member.guest.vm.destroy().expect("it runs");
    let told = member.notices.recv_timeout(PATIENCE).expect("it is told");
    assert!(matches!(told, Notice::GuestEnded(_)), "{told:?}");
}

/// A snapshot of a cut, on `shelf`, in the chain "chains/vm".
fn of_a_cut(shelf: &Shelf, name: &str) -> CutSnapshot {
    CutSnapshot {
        id: Uuid::new_v4(),
        root: shelf.path(""),
        chain: "chains/vm".into(),
        name: name.to_owned(),
        full: false,
        compress: None,
    }
}

impl Member {
    fn prepare(&mut self, snapshot: &CutSnapshot) {
        let prepared = self.protection.prepare_snapshot(snapshot.clone());
        prepared.expect("no other is being made");
        let told = self.notices.recv_timeout(PATIENCE).expect("it is told");
        assert_eq!(told, Notice::SnapshotPrepared(snapshot.id));
    }

    /// What comes of `snapshot`.
    fn outcome(&self, snapshot: &CutSnapshot) -> Result<SnapshotReport, String> {
        match self.notices.recv_timeout(PATIENCE).expect("it is told") {
            Notice::SnapshotOver(id, outcome) if id == snapshot.id => outcome.map(|report| *report),
            other => panic!("something else: {other:?}"),
        }
    }

    /// Makes `snapshot` of cut `cut`, which everybody relies on.
    fn store(&mut self, snapshot: &CutSnapshot, cut: u64) -> SnapshotReport {
        self.prepare(snapshot);
        self.protection.snapshot_at(cut).expect("it is prepared");
        self.cut(cut);
        self.outcome(snapshot).expect("a snapshot")
    }
}

#[test]
fn a_snapshot_of_a_cut_has_what_the_vm_goes_back_to() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    let shelf = Shelf::new();
    member.cut(1);
    let snapshot = of_a_cut(&shelf, "first");
    member.prepare(&snapshot);
    // Of these it is not.
    member.count_on();
    member.cut(2);
    member.protection.snapshot_at(4).expect("it is prepared");
    member.cut(3);
    member.count_on();
    let pause_ns = member.cut(4).pause_ns;
    member.count_on();
    let report = member.outcome(&snapshot).expect("a snapshot");
    assert_eq!((report.kind, report.pause_ns), (Kind::Full, pause_ns));
    assert_eq!(report.path, shelf.path("chains/vm/first"));
    let kept = shelf.counters("chains/vm/first");
    moment(&kept);
    member.protection.roll_back(4).expect("it is permanent");
    assert_eq!(member.counters(), kept);
}

#[test]
fn snapshots_of_cuts_are_built_on_each_other_where_that_can_be() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    let shelf = Shelf::new();
    let kinds = [("a", false), ("b", false), ("c", true), ("d", false)].map(|(name, full)| {
        let snapshot = CutSnapshot {
            full,
            ..of_a_cut(&shelf, name)
        };
        member.count_on();
        let report = member.store(&snapshot, u64::from(name.as_bytes()[0]));
        moment(&shelf.counters(&format!("chains/vm/{name}")));
        (report.kind, report.parent)
    });
    let parent = |name: &str| Some(name.to_owned());
    assert_eq!(
        kinds,
        [
            (Kind::Full, None),
            (Kind::Incremental, parent("a")),
            (Kind::Full, None),
            (Kind::Incremental, parent("c")),
        ]
    );
    // What is not there is not built on.
    std::fs::remove_dir_all(shelf.path("chains/vm/d")).expect("it is there");
    let report = member.store(&of_a_cut(&shelf, "e"), 200);
    assert_eq!((report.kind, report.parent), (Kind::Full, None));
}

#[test]
fn a_snapshot_that_waits_for_a_cut_is_given_up_when_it_is_not_wanted_or_the_vm_goes_back() {
    let Some(mut member) = Member::run(COUNTING) else {
        return;
    };
    let shelf = Shelf::new();
    member.cut(1);
    let unwanted = of_a_cut(&shelf, "unwanted");
    member.prepare(&unwanted);
    let another = member.protection.prepare_snapshot(of_a_cut(&shelf, "another"));
    assert!(another.is_err(), "one at a time");
    member.protection.no_snapshot(unwanted.id).expect("it runs");
    assert!(member.outcome(&unwanted).is_err());
    let undone = of_a_cut(&shelf, "undone");
    member.prepare(&undone);
    member.protection.snapshot_at(2).expect("it is prepared");
    member.protection.roll_back(1).expect("it is permanent");
    assert!(member.outcome(&undone).is_err());
    member.protection.resume().expect("it stands still");
    member.count_on();
    assert!(member.protection.snapshot_at(3).is_err(), "none is prepared");
    let mut left = std::fs::read_dir(shelf.path("chains/vm")).expect("it was made");
    assert!(left.next().is_none(), "nothing is left of them");
    assert_eq!(member.store(&of_a_cut(&shelf, "whole"), 3).kind, Kind::Full);
    // Somewhere that is not there, nothing is made.
    let nowhere = CutSnapshot {
        root: shelf.path("nowhere"),
        ..of_a_cut(&shelf, "nowhere")
    };
    let begun = member.protection.prepare_snapshot(nowhere.clone());
    begun.expect("that shows later");
    let reason = member.outcome(&nowhere).expect_err("there is no such directory");
    assert!(
        reason.contains("nowhere: cannot open it as a directory of checkpoints"),
        "{reason}"
    );
}
