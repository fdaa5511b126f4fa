//! A snapshot made on one host and restored on another, whose clock began elsewhere.

use std::fs;

use cutover_tests::{Exit, ManagedVm, Restore, Shelf, cli, legacy, scratch};

/// The file that the snapshot travels as.
const FILE: &str = "busy.cutover";
/// The file that tells which host it is from.
const HOST: &str = "busy.host";

/// What no two hosts have in common.
fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("Linux has one")
}

#[test]
fn a_snapshot_is_exported_to_a_file_that_travels() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.write_chunk(0);
    shelf.full(&managed, "s0");
    managed.vm.write_chunk(1);
    shelf.incremental(&managed, "s1");
    drop(managed);
    let (from, to) = (shelf.path("s1"), legacy().join(FILE));
    let exported = cli::cutover(["snapshot".as_ref(), "export".as_ref(), from.as_os_str(), to.as_os_str()]);
    assert_eq!(exported.exit, Exit::Shutdown, "{exported:?}");
    fs::write(legacy().join(HOST), host()).expect("the directory can be written");
}

#[test]
fn a_guest_goes_on_on_a_later_host_where_it_was() {
    let from = fs::read_to_string(legacy().join(HOST)).expect("a snapshot was exported before");
    if std::env::var("CUTOVER_HOST").is_ok() {
        assert_ne!(from, host(), "this is the same host");
    }
    let disks = scratch();
    let restored = Restore::of(&legacy().join(FILE))
        .arguments(["--disks".as_ref(), disks.path().as_os_str()])
        .start();
    let first = restored.vm.check_pages();
    restored.vm.check_chunks(2);
    let second = restored.vm.check_pages();
    assert!(second.pages > first.pages, "{first} and then {second}");
    restored.vm.power_off();
    assert_eq!(restored.vm.wait(), Exit::Shutdown);
}
