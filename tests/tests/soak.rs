//! What is repeated for long, by `cargo xtask soak`.

use std::ffi::OsString;
use std::thread;
use std::time::Duration;

use cutover_tests::{
    Disk, Exit, Group, Guest, ManagedVm, Network, ParallelJob, Protection, Receiver, Shelf, Trouble, cli,
};
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
/// What happens to a group, one after the other.
const TROUBLES: usize = 21;
/// Cuts of a group that become permanent.
const CUTS: u64 = 1000;

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

#[test]
fn a_job_has_the_same_result_through_twenty_one_troubles_in_a_row() {
    let mut group = Group::boot(2, &[0, 0, 1, 1], Guest::micro);
    start_page_writers(&group, 200);
    group.protect_as(&Protection {
        interval: "100ms",
        ..Protection::PATIENT
    });
    for number in 0..TROUBLES {
        let trouble = Trouble::number(number, group.vms.len());
        eprintln!("{number}: {trouble:?}; {}", group.summary());
        let mut job = ParallelJob::begin(&group.members(), "is", "S", 4);
        job.check_next();
        // At any moment of a cut, and between two.
        thread::sleep(Duration::from_millis(number as u64 * 37 % 300));
        trouble.befall(&mut group);
        job.check_rest();
        check_pages(&group);
    }
}

#[test]
fn a_job_has_the_same_result_at_every_interval() {
    let mut group = Group::boot(2, &[0, 0, 1, 1], Guest::micro);
    for interval in ["400ms", "200ms", "100ms", "25ms"] {
        group.protect_as(&Protection {
            interval,
            ..Protection::PATIENT
        });
        for (kernel, class) in [("ep", "S"), ("ep", "W"), ("is", "S")] {
            ParallelJob::begin(&group.members(), kernel, class, 2).check_rest();
        }
        eprintln!("{interval}: {}", group.summary());
        group.unprotect();
    }
}

#[test]
fn a_thousand_cuts_of_busy_guests_lose_no_page() {
    let mut group = Group::boot(2, &[0, 1], Guest::micro);
    start_page_writers(&group, 2000);
    group.protect_as(&Protection {
        interval: "25ms",
        ..Protection::PATIENT
    });
    for cuts in (0..=CUTS).step_by(100) {
        group.wait_until("more cuts are permanent", |status| {
            status["cuts"].as_u64() >= Some(cuts)
        });
        check_pages(&group);
    }
    eprintln!("{}", group.summary());
    Trouble::Power(1).befall(&mut group);
    check_pages(&group);
}

/// Has every member rewrite its pages.
fn start_page_writers(group: &Group, pages_per_second: u32) {
    for vm in &group.vms {
        vm.start_page_writer(8, Some(pages_per_second));
    }
}

/// Checks that no member has lost a page.
fn check_pages(group: &Group) {
    for vm in &group.vms {
        vm.check_pages();
    }
}
