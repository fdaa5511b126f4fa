//! Guests with disks: on files that both hosts see, or that move with them.

use std::path::Path;

use cutover_tests::{
    Disk, Exit, Fault, Guest, Link, ManagedVm, Receiver, Shelf, SmallFileSystem, Toward, poll_until, scratch,
};
use serde_json::json;

/// Bytes of the disk.
const DISK: u64 = 32 << 20;

/// A guest whose memory and disk tell when something is lost.
pub fn guest_with_disk() -> (ManagedVm, Disk) {
    let disk = Disk::blank(DISK);
    let managed = Guest::micro().boot_managed(|api| {
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
        );
    });
    managed.vm.start_page_writer(16, Some(2_000));
    (managed, disk)
}

/// Writes to the whole disk again and again, each time something else, until told to stop.
const WRITES: &str = r#"
cat >/tmp/writes <<'END'
n=0
while ! [ -e /tmp/stop ]; do
    n=$((n+1))
    yes pass $n | head -c 1m >/tmp/part
    dd if=/tmp/part of=/dev/vda bs=64k seek=$((n % 32 * 16)) conv=notrunc oflag=direct 2>/dev/null
    md5sum </tmp/part >/tmp/sum$((n % 32))
    echo $n >/tmp/count
done
touch /tmp/stopped
END
sh /tmp/writes >/dev/null 2>&1 &
"#;

/// Stops the writes, and says how many parts of the disk are not what was written last.
const CHECK: &str = r#"
touch /tmp/stop
while ! [ -e /tmp/stopped ]; do sleep 0.1; done
echo 3 >/proc/sys/vm/drop_caches
wrong=0
for n in $(seq 0 31); do
    [ -e /tmp/sum$n ] || continue
    [ "$(dd if=/dev/vda bs=64k skip=$((n * 16)) count=16 2>/dev/null | md5sum)" = "$(cat /tmp/sum$n)" ] || wrong=$((wrong+1))
done
echo $wrong
"#;

fn wait_for_writes(vm: &ManagedVm, count: u32) {
    vm.vm.check(&format!(
        "while ! [ -e /tmp/count ] || [ $(cat /tmp/count) -lt {count} ]; do sleep 0.1; done"
    ));
}

#[test]
fn a_disk_that_both_hosts_see_goes_on_under_the_guest_that_writes_to_it() {
    let (managed, disk) = guest_with_disk();
    managed.vm.write_chunk(0);
    let (managed, _) = managed.move_to(Receiver::start(), &json!({ "disks": "shared" }));
    managed.vm.write_chunk(1);
    let (managed, _) = managed.move_to(Receiver::start(), &json!({ "disks": "shared" }));
    managed.vm.check_chunks(2);
    managed.vm.check(WRITES);
    wait_for_writes(&managed, 4);
    let (managed, _) = managed.move_to(Receiver::start(), &json!({ "disks": "shared" }));
    assert_eq!(managed.vm.check(CHECK), "0\n");
    drop(disk);
}

#[test]
fn a_disk_that_moves_with_its_guest_has_every_write_and_the_old_one_has_none_of_the_later_ones() {
    let (managed, old) = guest_with_disk();
    managed.vm.check(WRITES);
    wait_for_writes(&managed, 4);
    let (small, directory) = (SmallFileSystem::new("1M"), scratch());
    let to = |directory: &Path| Receiver::start_with(["--disks".as_ref(), directory.as_os_str()]);
    let receiver = to(small.path());
    let fault = managed.migrate(receiver.address(), &json!({ "disks": "move" })).fault();
    assert!(fault.contains("has room for 1M"), "{fault}");
    receiver.check_given_up();

    // While it moves it stays the disk it is.
    let receiver = to(directory.path());
    let link = Link::failing(receiver.address(), Toward::Destination, 1 << 20, Fault::Silence);
    let mut moving = managed.begin_to_migrate(link.address(), &json!({ "disks": "move" }));
    link.wait_for_fault();
    let other = json!({ "drive_id": "data", "path_on_host": Disk::blank(DISK).path() });
    let fault = managed.api.request("PATCH", "/drives/data", Some(&other)).fault();
    assert!(fault.contains("is being migrated"), "{fault}");
    link.heal();
    moving.answer().success();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
    let managed = receiver.managed;
    managed.check_goes_on();
    let (length, left) = (usize::try_from(DISK).unwrap(), old.path().to_owned());
    let before = old.sha256(length);
    wait_for_writes(&managed, 40);
    assert_eq!(managed.vm.check(CHECK), "0\n");
    assert_eq!(
        old.sha256(length),
        before,
        "{} was written after the guest had left",
        left.display()
    );
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}

#[test]
fn snapshots_before_during_and_after_a_move_are_whole() {
    /// Bytes in each second, so that the move lasts longer than the snapshot.
    const SLOW: u64 = 16 << 20;
    let shelf = Shelf::new();
    // A snapshot that copies disks has to wait for the end of the move.
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.start_page_writer(16, Some(2_000));
    shelf.full(&managed, "before");
    let receiver = Receiver::start();
    let options = json!({ "bandwidth": SLOW, "compression": "never" });
    let mut moving = managed.begin_to_migrate(receiver.address(), &options);
    poll_until("memory is being sent", || {
        (managed.migration()["under_way"]["phase"] == "pre_copy").then_some(())
    });
    shelf.incremental(&managed, "during");
    moving.answer().success();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
    receiver.managed.check_goes_on();
    shelf.full(&receiver.managed, "after");
    drop(receiver);
    for name in ["before", "during", "after"] {
        shelf.restore(name).start().check_goes_on();
    }
}
