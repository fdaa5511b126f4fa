//! Many guests of one snapshot.

use std::fs;

use cutover_tests::{ManagedVm, Shelf};

#[test]
fn clones_of_one_snapshot_run_side_by_side_and_do_not_see_each_other() {
    Shelf::new().check_clones(4);
}

#[test]
fn clones_of_a_trusted_snapshot_share_the_pages_that_they_do_not_change() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.check("killall page-writer");
    managed
        .vm
        .check("head -c 96m /dev/urandom > /tmp/content; md5sum < /tmp/content > /tmp/sum");
    shelf.full(&managed, "s0");
    drop(managed);
    let clones: Vec<ManagedVm> = (0..2)
        .map(|number| {
            let disks = shelf.path(&format!("disks{number}"));
            fs::create_dir(&disks).expect("a new directory");
            shelf
                .restore("s0")
                .arguments(["--trusted", "--disks"])
                .arguments([&disks])
                .start()
        })
        .collect();
    for clone in &clones {
        clone.vm.check("md5sum < /tmp/content | cmp - /tmp/sum");
    }
    for clone in &clones {
        let rollup = fs::read_to_string(clone.vm.monitor().proc("smaps_rollup")).expect("the kernel tells");
        let kib = |name: &str| -> u64 {
            let line = rollup.lines().find(|line| line.starts_with(name)).expect("such a line");
            line.split_whitespace()
                .nth(1)
                .expect("a number")
                .parse()
                .expect("a number")
        };
        let shared = kib("Shared_Clean:") + kib("Shared_Dirty:");
        assert!(shared >= 90 << 10, "{shared} KiB are shared: {rollup}");
    }
}
