//! Snapshots of guests that go on working, and guests made of them: nothing lost, nothing stale, nothing doubled.

mod busy;
mod clones;
mod damage;
mod database;
mod files;
mod kills;

use std::path::Path;

use cutover_tests::{Disk, Exit, Guest, ManagedVm, Shelf, Vm};
use serde_json::json;

/// MiB that the guest's program rewrites all the time.
const WRITTEN_MIB: u32 = 64;

/// Bytes of the disk.
const DISK: u64 = 64 << 20;

/// A guest with `disk`, called `data` and empty, whose program has begun to rewrite memory.
fn busy_guest(disk: &Disk) -> ManagedVm {
    let managed = Guest::micro().memory("256M").boot_managed(|api| {
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
        );
    });
    managed.vm.start_page_writer(WRITTEN_MIB, None);
    managed
}

/// Has `vm` write chunk number `number` of its disk, with content of its own, and permanently.
#[track_caller]
fn write_chunk(vm: &Vm, number: u32) {
    vm.check(&format!(
        "yes chunk {number} | head -c 65536 | dd of=/dev/vda bs=64k seek={number} conv=notrunc,fsync 2>/dev/null"
    ));
}

/// Checks that the disk of `vm` has what [`write_chunk`] wrote to all chunks below `count`, and nothing after them.
#[track_caller]
fn check_chunks(vm: &Vm, count: u32) {
    for number in 0..count {
        let sum = vm.check(&format!(
            "dd if=/dev/vda bs=64k skip={number} count=1 2>/dev/null | md5sum"
        ));
        let expected = vm.check(&format!("yes chunk {number} | head -c 65536 | md5sum"));
        assert_eq!(sum, expected, "chunk {number} of {count}");
    }
    let beyond = vm.check(&format!(
        "dd if=/dev/vda bs=64k skip={count} count=1 2>/dev/null | tr -d '\\0' | wc -c"
    ));
    assert_eq!(beyond.trim(), "0", "chunk {count} was written after the snapshot");
}

/// Restores snapshot `name` with its disk in a directory of its own, which must go on as it was.
#[track_caller]
fn restore(shelf: &Shelf, name: &str, disks: &Path) -> ManagedVm {
    let restored = shelf
        .restore(name)
        .arguments(["--disks".as_ref(), disks.as_os_str()])
        .start();
    let first = restored.vm.check_pages();
    let second = restored.vm.check_pages();
    assert!(second.pages > first.pages, "{name}: {first} and then {second}");
    restored
}

/// Restores snapshot `name`, which was made when `chunks` chunks were written; all is there and goes on, to its end.
#[track_caller]
fn check_snapshot(shelf: &Shelf, name: &str, chunks: u32) {
    let disks = tempfile::tempdir_in(shelf.directory().parent().expect("on tmpfs")).expect("a directory");
    let restored = restore(shelf, name, disks.path());
    check_chunks(&restored.vm, chunks);
    write_chunk(&restored.vm, chunks);
    check_chunks(&restored.vm, chunks + 1);
    restored.vm.check_pages();
    restored.vm.power_off();
    assert_eq!(restored.vm.wait(), Exit::Shutdown);
}
