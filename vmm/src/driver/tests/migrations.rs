//! Real VMs that move from one monitor to another, both in this process.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cutover_migration::Error as MigrationError;
use cutover_migration::options::{Options as Wishes, PostCopy};
use cutover_migration::transport::Endpoint;
use tempfile::TempDir;

use super::snapshots::{COUNTING, Shelf, moment, wait_for_a_round};
use super::*;
use crate::migration::{MigrateRequest, MigratedDisks, MigrationReport, MigrationStatus, ReceiveRequest};
use crate::snapshot::Kind;

/// A place to meet for two monitors.
struct Rendezvous(TempDir);

/// A monitor that waits for a VM.
struct Receiver {
    status: Arc<MigrationStatus>,
    /// The VM, or why none came.
    arrival: JoinHandle<Result<RunningVm, Error>>,
}

impl Rendezvous {
    fn new() -> Self {
        Self(TempDir::new().expect("temporary directory"))
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Has a monitor wait at `name` for a VM that it admits if `admit` says so.
    fn receive(&self, name: &str, admit: impl FnMut(&VmSpec) -> Result<(), String> + Send + 'static) -> Receiver {
        self.receive_with(name, BTreeMap::new(), admit)
    }

    /// As [`receive`](Self::receive), with other files for disks.
    fn receive_with(
        &self,
        name: &str,
        disks: BTreeMap<String, PathBuf>,
        mut admit: impl FnMut(&VmSpec) -> Result<(), String> + Send + 'static,
    ) -> Receiver {
        let socket = self.socket(name);
        let request = ReceiveRequest {
            listen: Endpoint::Unix(socket.clone()),
            tls: None,
            name: None,
            nets: BTreeMap::new(),
            disks,
            disks_dir: None,
            vsock: None,
            serial: SerialSpec::Null,
        };
        let status = Arc::<MigrationStatus>::default();
        let shared = status.clone();
        let arrival = std::thread::spawn(move || {
            try_start(true, move |options| {
                Vmm::receive(&request, options, &shared, &mut admit)
            })
        });
        let end = Instant::now() + PATIENCE;
        while !listens(&socket) {
            assert!(Instant::now() < end, "nobody listens at {}", socket.display());
            std::thread::yield_now();
        }
        Receiver { status, arrival }
    }

    fn request(&self, name: &str) -> MigrateRequest {
        MigrateRequest {
            to: Endpoint::Unix(self.socket(name)),
            tls: None,
            // Whatever else this machine is doing.
            options: Wishes {
                downtime: PATIENCE,
                ..Wishes::default()
            },
            disks: MigratedDisks::Shared,
        }
    }

    /// Moves `guest`, whose monitor ends, to another that waits at `name`.
    fn migrate(&self, guest: RunningVm, name: &str) -> (RunningVm, MigrationReport) {
        self.migrate_as(guest, self.request(name), name)
    }

    /// The same, as `request` says.
    fn migrate_as(&self, guest: RunningVm, request: MigrateRequest, name: &str) -> (RunningVm, MigrationReport) {
        let receiver = self.receive(name, |_| Ok(()));
        let report = guest
            .vm
            .migrate(request)
            .unwrap_or_else(|error| panic!("{}", chain_of(&error)));
        let (exit, happened) = guest.exit();
        assert_eq!(exit, Exit::Migrated);
        assert_eq!(states(&happened).last(), Some(&"ended"));
        (receiver.arrived(), report)
    }
}

/// Whether somebody listens at `socket`: it is there before, to be given its permissions.
fn listens(socket: &Path) -> bool {
    // Among the flags of a socket that does, in hexadecimal (`__SO_ACCEPTCON`).
    const LISTENS: &str = " 00010000 ";
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("Linux tells");
    let path = socket.to_str().expect("it was made here");
    sockets
        .lines()
        .any(|line| line.ends_with(path) && line.contains(LISTENS))
}

impl Receiver {
    fn arrived(self) -> RunningVm {
        match self.arrival.join().expect("no panic") {
            Ok(vm) => vm,
            Err(error) => panic!("nothing arrived: {}", chain_of(&error)),
        }
    }

    /// Why nothing has arrived.
    fn refused(self) -> String {
        match self.arrival.join().expect("no panic") {
            Ok(_) => panic!("a VM arrived"),
            Err(error) => chain_of(&error),
        }
    }
}

/// An error with its causes.
fn chain_of(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The first of the counters of `guest`, all of which are of one moment.
fn counted(guest: &RunningVm, shelf: &Shelf, name: &str) -> u32 {
    let request = shelf.request(name, Kind::Full);
    guest.vm.snapshot(request).expect("a snapshot");
    moment(&shelf.counters(name))
}

#[test]
fn a_running_guest_goes_on_under_another_monitor_where_it_was() {
    let Some(mut guest) = run(COUNTING, true) else { return };
    let (shelf, rendezvous) = (Shelf::new(), Rendezvous::new());
    wait_for_a_round(&guest.vm);
    let mut last = counted(&guest, &shelf, "source");
    for round in 0..4 {
        let name = format!("round-{round}");
        let (arrived, report) = rendezvous.migrate(guest, &name);
        assert!(report.pages.total() >= 256, "{report:?}");
        assert!(states(&arrived.happened()).ends_with(&["running"]));
        assert!(arrived.happened().contains(&EventKind::Migrated));
        wait_for_a_round(&arrived.vm);
        let now = counted(&arrived, &shelf, &name);
        assert!(now > last, "{now} after {last}");
        last = now;
        guest = arrived;
    }
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn a_paused_guest_arrives_paused_as_it_was() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (shelf, rendezvous) = (Shelf::new(), Rendezvous::new());
    wait_for_a_round(&guest.vm);
    guest.vm.pause().expect("a running VM can be paused");
    let before = counted(&guest, &shelf, "before");
    let (arrived, _) = rendezvous.migrate(guest, "there");
    assert_eq!(arrived.vm.state().expect("it lives"), State::Paused);
    assert_eq!(counted(&arrived, &shelf, "after"), before);
    assert_eq!(shelf.counters("after"), shelf.counters("before"));
    arrived.vm.resume().expect("a paused VM can be resumed");
    wait_for_a_round(&arrived.vm);
    arrived.vm.destroy().expect("a running VM can be destroyed");
    arrived.exit();
}

/// A counting guest with a disk at `path`, filled with something.
fn guest_with_disk(path: &Path) -> Option<RunningVm> {
    let content: Vec<u8> = (0..3_u32 << 20).map(|byte| (byte >> 12).to_le_bytes()[0]).collect();
    std::fs::write(path, content).expect("writable");
    run_with(COUNTING, true, |spec| {
        let disk = serde_json::json!({ "path": path });
        spec.disks = vec![serde_json::from_value(disk).expect("a disk")];
    })
}

#[test]
fn disks_move_with_their_guest_and_of_older_copies_only_what_differs() {
    let rendezvous = Rendezvous::new();
    let (here, there) = (rendezvous.socket("here.img"), rendezvous.socket("there.img"));
    let Some(guest) = guest_with_disk(&here) else { return };
    let content = std::fs::read(&here).expect("it is there");
    let mut older = content.clone();
    older[1 << 20..(1 << 20) + 4096].fill(0xee);
    std::fs::write(&there, &older).expect("writable");

    let disks = BTreeMap::from([("disk0".to_owned(), there.clone())]);
    let request = |name: &str| MigrateRequest {
        disks: MigratedDisks::Moved,
        ..rendezvous.request(name)
    };
    // As it was, if nothing comes of it.
    let receiver = rendezvous.receive_with("full", disks.clone(), |_| Err("the inn is full".to_owned()));
    guest.vm.migrate(request("full")).expect_err("refused");
    receiver.refused();
    assert!(std::fs::read(&there).expect("it is there") == older);

    let receiver = rendezvous.receive_with("free", disks, |_| Ok(()));
    let report = guest
        .vm
        .migrate(request("free"))
        .unwrap_or_else(|error| panic!("{}", chain_of(&error)));
    assert_eq!(guest.exit().0, Exit::Migrated);
    let arrived = receiver.arrived();
    assert!(std::fs::read(&there).expect("it is there") == content);
    // One chunk of the disk's 768 pages, and memory of which few are touched.
    assert!(report.pages.total() < 700, "{report:?}");
    wait_for_a_round(&arrived.vm);
    arrived.vm.destroy().expect("a running VM can be destroyed");
    arrived.exit();
}

#[test]
fn a_disk_that_somebody_uses_where_it_is_to_go_is_not_replaced() {
    let rendezvous = Rendezvous::new();
    let here = rendezvous.socket("here.img");
    let Some(guest) = guest_with_disk(&here) else { return };
    // Its own, for one.
    let receiver = rendezvous.receive("same", |_| Ok(()));
    let request = MigrateRequest {
        disks: MigratedDisks::Moved,
        ..rendezvous.request("same")
    };
    let error = chain_of(&guest.vm.migrate(request).expect_err("it is in use"));
    assert!(error.contains("here.img"), "{error}");
    receiver.refused();
    wait_for_a_round(&guest.vm);
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn a_guest_that_is_refused_goes_on_where_it_is_and_can_be_migrated_again() {
    let Some(guest) = run(COUNTING, true) else { return };
    let rendezvous = Rendezvous::new();
    let receiver = rendezvous.receive("full", |_| Err("the inn is full".to_owned()));
    let error = guest.vm.migrate(rendezvous.request("full")).expect_err("refused");
    assert!(chain_of(&error).contains("the inn is full"), "{}", chain_of(&error));
    receiver.refused();
    wait_for_a_round(&guest.vm);
    assert_eq!(guest.vm.state().expect("it lives"), State::Running);
    let failed = |kind: &EventKind| matches!(kind, EventKind::MigrationFailed { .. });
    assert!(guest.happened().iter().any(failed));
    let (arrived, _) = rendezvous.migrate(guest, "free");
    wait_for_a_round(&arrived.vm);
    arrived.vm.destroy().expect("a running VM can be destroyed");
    arrived.exit();
}

#[test]
fn nobody_listens_and_nothing_has_happened() {
    let Some(guest) = run(COUNTING, true) else { return };
    let rendezvous = Rendezvous::new();
    guest
        .vm
        .migrate(rendezvous.request("nowhere"))
        .expect_err("nobody is there");
    wait_for_a_round(&guest.vm);
    assert_eq!(refusal(guest.vm.cancel_migration()), Refusal::NoMigrationUnderWay);
    assert_eq!(refusal(guest.vm.reclaim()), Refusal::NotHandedOver);
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn a_reception_that_is_cancelled_ends_without_a_vm() {
    let receiver = Rendezvous::new().receive("alone", |_| Ok(()));
    receiver.status.cancel();
    receiver.refused();
}

#[test]
fn memory_that_is_a_file_is_handed_over_and_no_page_moves() {
    let Some(guest) = run_with(COUNTING, true, |spec| spec.memory.shared = true) else {
        return;
    };
    let (shelf, rendezvous) = (Shelf::new(), Rendezvous::new());
    wait_for_a_round(&guest.vm);
    let before = counted(&guest, &shelf, "before");
    let (arrived, report) = rendezvous.migrate(guest, "there");
    assert_eq!(report.pages.total(), 0, "{report:?}");
    wait_for_a_round(&arrived.vm);
    let after = counted(&arrived, &shelf, "after");
    assert!(after > before, "{after} after {before}");
    // It can be handed over again.
    let (arrived, _) = rendezvous.migrate(arrived, "back");
    wait_for_a_round(&arrived.vm);
    arrived.vm.destroy().expect("a running VM can be destroyed");
    arrived.exit();
}

#[test]
fn a_guest_that_goes_ahead_of_its_memory_has_all_of_it_in_the_end() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (shelf, rendezvous) = (Shelf::new(), Rendezvous::new());
    wait_for_a_round(&guest.vm);
    let before = counted(&guest, &shelf, "before");
    let mut request = rendezvous.request("there");
    request.options.downtime = Duration::ZERO;
    request.options.post_copy = PostCopy::Always;
    let (arrived, _) = rendezvous.migrate_as(guest, request, "there");
    wait_for_a_round(&arrived.vm);
    let after = counted(&arrived, &shelf, "after");
    assert!(after > before, "{after} after {before}");
    let (arrived, _) = rendezvous.migrate(arrived, "on");
    wait_for_a_round(&arrived.vm);
    arrived.vm.destroy().expect("a running VM can be destroyed");
    arrived.exit();
}

/// What comes of migrating `guest` if `meanwhile` happens to it once the migration is under way: what the source says,
/// and what the destination has.
fn migrate_while(
    guest: &RunningVm,
    meanwhile: impl FnOnce(&Controller) + Send + 'static,
) -> (Result<MigrationReport, Error>, Result<RunningVm, Error>) {
    let rendezvous = Rendezvous::new();
    let (vm, mut meanwhile) = (guest.vm.clone(), Some(meanwhile));
    let receiver = rendezvous.receive("there", move |_| {
        if let Some(meanwhile) = meanwhile.take() {
            meanwhile(&vm);
        }
        Ok(())
    });
    let outcome = guest.vm.migrate(rendezvous.request("there"));
    (outcome, receiver.arrival.join().expect("no panic"))
}

fn is_cancelled(outcome: &Result<MigrationReport, Error>) -> bool {
    matches!(outcome, Err(Error::Migration(MigrationError::Cancelled)))
}

#[test]
fn a_migration_that_is_cancelled_leaves_the_guest_where_it_is() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (outcome, arrival) = migrate_while(&guest, |vm| vm.cancel_migration().expect("it is under way"));
    assert!(is_cancelled(&outcome), "{outcome:?}");
    assert!(arrival.is_err());
    wait_for_a_round(&guest.vm);
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn a_vm_is_migrated_to_one_place_at_a_time() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (outcome, arrival) = migrate_while(&guest, |vm| {
        let second = vm.migrate(Rendezvous::new().request("elsewhere"));
        assert!(
            matches!(second, Err(Error::Refused(Refusal::MigrationUnderWay))),
            "{second:?}"
        );
    });
    outcome.expect("the first goes on");
    assert_eq!(guest.exit().0, Exit::Migrated);
    let arrived = arrival.unwrap_or_else(|error| panic!("{}", chain_of(&error)));
    wait_for_a_round(&arrived.vm);
    arrived.vm.destroy().expect("a running VM can be destroyed");
    arrived.exit();
}

#[test]
fn a_guest_that_is_paused_while_it_migrates_arrives_paused() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (outcome, arrival) = migrate_while(&guest, |vm| vm.pause().expect("a running VM can be paused"));
    outcome.expect("paused VMs migrate too");
    assert_eq!(guest.exit().0, Exit::Migrated);
    let arrived = arrival.unwrap_or_else(|error| panic!("{}", chain_of(&error)));
    assert_eq!(arrived.vm.state().expect("it lives"), State::Paused);
    arrived.vm.destroy().expect("a paused VM can be destroyed");
    arrived.exit();
}

#[test]
fn a_vm_that_is_built_anew_while_it_migrates_stays() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (outcome, arrival) = migrate_while(&guest, |vm| vm.cycle().expect("a running VM can be cycled"));
    assert!(is_cancelled(&outcome), "{outcome:?}");
    assert!(arrival.is_err());
    guest.wait_until_booted(2);
    wait_for_a_round(&guest.vm);
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}

#[test]
fn a_vm_that_is_destroyed_while_it_migrates_is_nowhere() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (outcome, arrival) = migrate_while(&guest, |vm| vm.destroy().expect("a running VM can be destroyed"));
    assert!(is_cancelled(&outcome), "{outcome:?}");
    assert!(arrival.is_err());
    assert_eq!(guest.exit().0, Exit::Ended);
}

#[test]
fn a_guest_that_is_to_shut_down_does_so_where_it_is() {
    let Some(guest) = run(COUNTING, true) else { return };
    let (outcome, arrival) = migrate_while(&guest, |vm| {
        vm.shutdown(PATIENCE).expect("a running VM can be shut down")
    });
    let error = chain_of(&outcome.expect_err("it is shutting down"));
    assert!(error.contains("shutting down"), "{error}");
    assert!(arrival.is_err());
    guest.vm.destroy().expect("a VM that shuts down can be destroyed");
    guest.exit();
}

#[test]
fn a_snapshot_that_is_made_while_a_guest_migrates_is_of_one_moment() {
    let Some(guest) = run(COUNTING, true) else { return };
    let shelf = Arc::new(Shelf::new());
    let there = shelf.clone();
    let (outcome, arrival) = migrate_while(&guest, move |vm| {
        vm.snapshot(there.request("beside", Kind::Full)).expect("a snapshot");
    });
    outcome.expect("it moves");
    assert_eq!(guest.exit().0, Exit::Migrated);
    let arrived = arrival.unwrap_or_else(|error| panic!("{}", chain_of(&error)));
    wait_for_a_round(&arrived.vm);
    let (beside, after) = (moment(&shelf.counters("beside")), counted(&arrived, &shelf, "after"));
    assert!(after > beside, "{after} after {beside}");
    arrived.vm.destroy().expect("a running VM can be destroyed");
    arrived.exit();
}

/// Passes on what two monitors say to each other, and cuts the link when it has passed on so many bytes.
pub struct Cutter {
    thread: JoinHandle<()>,
}

/// Which way bytes are counted.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    ToDestination,
    ToSource,
}

impl Cutter {
    /// Between `front`, where it waits for one connection, and `back`.
    pub fn between(front: PathBuf, back: PathBuf, way: Way, bytes: u64) -> Self {
        let listener = UnixListener::bind(front).expect("a socket");
        let thread = std::thread::spawn(move || {
            let (source, _) = listener.accept().expect("the source connects");
            let destination = UnixStream::connect(back).expect("the destination waits");
            let (to_destination, to_source) = match way {
                Way::ToDestination => (bytes, u64::MAX),
                Way::ToSource => (u64::MAX, bytes),
            };
            std::thread::scope(|scope| {
                scope.spawn(|| pass(&source, &destination, to_destination));
                scope.spawn(|| pass(&destination, &source, to_source));
            });
        });
        Self { thread }
    }
}

/// Passes on at most `bytes`, then cuts both connections.
fn pass(from: &UnixStream, mut to: &UnixStream, bytes: u64) {
    // Whatever the reason is for which it ends.
    let _ = std::io::copy(&mut from.take(bytes), &mut to);
    for end in [from, to] {
        let _ = end.shutdown(Shutdown::Both);
    }
}

#[test]
fn wherever_the_link_is_cut_one_of_the_two_goes_on_from_where_it_was() {
    let Some(mut guest) = run(COUNTING, true) else { return };
    let (shelf, rendezvous) = (Shelf::new(), Rendezvous::new());
    wait_for_a_round(&guest.vm);
    let mut last = counted(&guest, &shelf, "first");
    let to_destination =
        [0, 10, 100, 1_500, 20_000, 900_000, 1_080_000, 1_200_000].map(|bytes| (Way::ToDestination, bytes));
    let to_source = (0..8).map(|step| (Way::ToSource, step * 25));
    for (number, (way, bytes)) in to_destination.into_iter().chain(to_source).enumerate() {
        let [front, back, saved] = ["front", "back", "saved"].map(|name| format!("{name}-{number}"));
        let receiver = rendezvous.receive(&back, |_| Ok(()));
        let cutter = Cutter::between(rendezvous.socket(&front), rendezvous.socket(&back), way, bytes);
        let outcome = guest.vm.migrate(rendezvous.request(&front));
        cutter.thread.join().expect("no panic");
        // One that was cut off before it knew what came waits for the next.
        receiver.status.cancel();
        let arrival = receiver.arrival.join().expect("no panic");
        guest = match (outcome, arrival) {
            (Ok(_), Ok(arrived)) => {
                assert_eq!(guest.exit().0, Exit::Migrated);
                arrived
            }
            (Err(Error::Migration(MigrationError::OutcomeUnknown(_))), arrival) => {
                let state = guest.vm.state().expect("it has not ended");
                assert!(matches!(state, State::HandedOver { .. }), "{state}");
                assert_eq!(refusal(guest.vm.resume()), Refusal::HandedOver);
                match arrival {
                    Ok(arrived) => {
                        guest.vm.destroy().expect("a VM that was handed over can be destroyed");
                        guest.exit();
                        arrived
                    }
                    Err(_) => {
                        guest.vm.reclaim().expect("a VM that was handed over can be had back");
                        guest.vm.resume().expect("a paused VM can be resumed");
                        guest
                    }
                }
            }
            (Err(error), Err(_)) => {
                let state = guest.vm.state().expect("it lives");
                assert_eq!(state, State::Running, "after {}", chain_of(&error));
                guest
            }
            (Ok(_), Err(error)) => panic!("{way:?} {bytes}: it is nowhere: {}", chain_of(&error)),
            (Err(error), Ok(_)) => panic!("{way:?} {bytes}: two of it: {}", chain_of(&error)),
        };
        wait_for_a_round(&guest.vm);
        let now = counted(&guest, &shelf, &saved);
        assert!(now > last, "{way:?} {bytes}: {now} after {last}");
        last = now;
    }
    guest.vm.destroy().expect("a running VM can be destroyed");
    guest.exit();
}
