//! Many guests of one snapshot.

use std::collections::BTreeSet;
use std::fs;

use cutover_tests::{ManagedVm, Shelf, Vm};

/// What the VM generation id is, as hexadecimal digits.
///
/// The kernel of the guest has no driver for it (`VIRT_DRIVERS` is off), and lets a program read the first MiB, where it is.
fn generation(vm: &Vm) -> String {
    const ID: u64 = 0xf_ff00;
    let id = vm.check(&format!(
        "dd if=/dev/mem bs=16 skip={} count=1 2>/dev/null | hexdump -v -e '16/1 \"%02x\"'",
        ID / 16
    ));
    assert_eq!(id.len(), 32, "no id: '{id}'");
    id
}

#[test]
fn clones_of_one_snapshot_run_side_by_side_and_do_not_see_each_other() {
    Shelf::new().check_clones(4);
}

#[test]
fn clones_of_a_trusted_snapshot_share_the_pages_that_they_do_not_change_and_know_that_they_are_clones() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.check("killall page-writer");
    managed
        .vm
        .check("head -c 96m /dev/urandom > /tmp/content; md5sum < /tmp/content > /tmp/sum");
    shelf.full(&managed, "s0");
    let mut generations = BTreeSet::from([generation(&managed.vm)]);
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
        generations.insert(generation(&clone.vm));
    }
    assert_eq!(generations.len(), 3, "{generations:?}");
}
