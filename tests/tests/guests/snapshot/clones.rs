//! Many guests of one snapshot.

use std::fs;

use cutover_tests::{Disk, ManagedVm, Shelf};

use super::{DISK, busy_guest, check_chunks, write_chunk};

const CLONES: u32 = 4;

#[test]
fn clones_of_one_snapshot_run_side_by_side_and_do_not_see_each_other() {
    let (shelf, disk) = (Shelf::new(), Disk::blank(DISK));
    let managed = busy_guest(&disk);
    write_chunk(&managed.vm, 0);
    shelf.full(&managed, "s0");
    drop(managed);
    let clones: Vec<ManagedVm> = (0..CLONES)
        .map(|number| {
            let disks = shelf.path(&format!("disks{number}"));
            fs::create_dir(&disks).expect("a new directory");
            shelf
                .restore("s0")
                .arguments(["--disks".as_ref(), disks.as_os_str()])
                .start()
        })
        .collect();
    for (number, clone) in (1..).zip(&clones) {
        write_chunk(&clone.vm, number);
    }
    for (number, clone) in (1..=CLONES).zip(&clones) {
        clone.vm.check_pages();
        // Its own chunk and the common one, and none of the others'.
        for other in 1..=CLONES {
            let written = clone.vm.check(&format!(
                "dd if=/dev/vda bs=64k skip={other} count=1 2>/dev/null | tr -d '\\0' | wc -c"
            ));
            let expected = if other == number { "65536" } else { "0" };
            assert_eq!(written.trim(), expected, "chunk {other} of clone {number}");
        }
    }
    check_chunks(&clones[0].vm, 2);
}

#[test]
fn clones_of_a_trusted_snapshot_share_the_pages_that_they_do_not_change() {
    let (shelf, disk) = (Shelf::new(), Disk::blank(DISK));
    let managed = busy_guest(&disk);
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
