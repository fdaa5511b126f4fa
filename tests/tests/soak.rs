//! What is repeated for long, by `cargo xtask soak`.

use std::ffi::OsString;
use std::time::Duration;

use cutover_tests::{Disk, Exit, Guest, ManagedVm, Network, Receiver, Shelf, cli};
use serde_json::json;

/// Boots in a row.
const BOOTS: u32 = 100;
/// Pauses in a row.
const PAUSES: u32 = 200;
/// Incremental snapshots in a row.
const SNAPSHOTS: u32 = 50;
/// Incremental snapshots built on each other.
const CHAIN: u32 = 10;
/// Guests of one snapshot at the same time.
const CLONES: u32 = 20;
/// Monitors killed while they make a snapshot.
const KILLS: u64 = 30;
/// Migrations in a row.
const MIGRATIONS: u32 = 100;

#[test]
fn a_guest_boots_and_powers_off_a_hundred_times_in_a_row() {
    let (disk, network) = (Disk::blank(1 << 20), Network::new());
    let guest = Guest::micro().disk(&disk).net(&network).arguments(["--rng"]);
    for boot in 1..=BOOTS {
        // Alternately with one and two vCPUs.
        let cpus = 1 + boot % 2;
        let vm = guest.clone().cpus(cpus).boot();
        assert_eq!(vm.check("nproc"), format!("{cpus}\n"), "boot {boot}");
        vm.check("dd if=/dev/vda of=/dev/vda count=1 conv=fsync");
        vm.power_off();
        assert_eq!(vm.wait(), Exit::Shutdown, "boot {boot}");
    }
}

#[test]
fn two_hundred_pauses_and_resumes_in_a_row_lose_nothing() {
    let disk = Disk::blank(1 << 20);
    let managed = Guest::micro().cpus(2).boot_managed(|api| {
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
        );
    });
    // Whatever is written is read again and compared, until told to stop.
    managed.vm.check(
        "dd if=/dev/urandom of=/tmp/data bs=64k count=16
         (while ! test -e /tmp/stop; do
             dd if=/tmp/data of=/dev/vda bs=64k oflag=direct && dd if=/dev/vda bs=64k iflag=direct | cmp - /tmp/data ||
                 touch /tmp/wrong
             echo >> /tmp/rounds
         done; touch /tmp/stopped) > /dev/null 2>&1 &",
    );
    for _ in 0..PAUSES {
        managed.pause();
        managed.resume();
    }
    managed
        .vm
        .check("touch /tmp/stop; while ! test -e /tmp/stopped; do sleep 1; done; test -s /tmp/rounds");
    assert_eq!(managed.vm.run("test -e /tmp/wrong").exit_code, 1, "something was lost");
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}

#[test]
fn fifty_snapshots_in_a_row_of_a_busy_guest_are_each_of_one_moment() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.write_chunk(0);
    shelf.full(&managed, "s0");
    for number in 1..=SNAPSHOTS {
        managed.vm.write_chunk(number);
        shelf.incremental(&managed, &format!("s{number}"));
        managed.vm.check_pages();
        if number % CHAIN == 0 {
            shelf.check_busy(&format!("s{number}"), number + 1);
            // A tmpfs has no room for all of them.
            let next = format!("f{number}");
            shelf.full(&managed, &next);
            let keep = ["snapshot", "prune", "--keep", &next].map(OsString::from);
            let pruned = cli::cutover(keep.into_iter().chain([shelf.directory().into()]));
            assert_eq!(pruned.exit, Exit::Shutdown, "{pruned:?}");
        }
    }
}

#[test]
fn many_clones_of_one_snapshot_run_side_by_side() {
    Shelf::new().check_clones(CLONES);
}

#[test]
fn monitors_killed_at_thirty_moments_of_a_snapshot_leave_the_older_ones_whole() {
    for kill in 0..KILLS {
        // Closer together at the beginning, where more happens.
        Shelf::new().check_kill(Duration::from_millis(kill * kill / 2));
    }
}

#[test]
fn a_busy_guest_moves_a_hundred_times_in_a_row_and_loses_nothing() {
    let (mut managed, _disk) = ManagedVm::busy();
    for number in 0..MIGRATIONS {
        managed.vm.write_chunk(number);
        // Every fourth time the guest goes ahead of its memory.
        let post_copy = if number % 4 == 3 { "now" } else { "never" };
        (managed, _) = managed.move_to(Receiver::start(), &json!({ "post_copy": post_copy }));
        managed.vm.check_chunks(number + 1);
    }
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}
