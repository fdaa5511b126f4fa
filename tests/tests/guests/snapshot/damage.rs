//! Damaged snapshots: nothing of them ever reaches a guest.

use std::fs;
use std::os::unix::fs::FileExt;

use cutover_tests::cli::{Finished, cutover, finish};
use cutover_tests::{Exit, ManagedVm, Monitor, Shelf, SmallFileSystem};

/// Flips a bit of every page of a file.
fn damage(shelf: &Shelf, file: &str) {
    let path = shelf.path("s0").join(file);
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .expect("a file of the snapshot");
    let length = file.metadata().expect("a file").len();
    let mut byte = [0];
    for offset in (0..length).step_by(4 << 10) {
        file.read_exact_at(&mut byte, offset).expect("within the file");
        file.write_all_at(&[byte[0] ^ 1], offset).expect("within the file");
    }
}

fn restore(shelf: &Shelf, arguments: &[&str]) -> Finished {
    let mut command = Monitor::command();
    command.args(["snapshot", "restore"]).arg(shelf.path("s0"));
    command.args(arguments).arg("--disks").arg(shelf.directory());
    finish(command)
}

#[test]
fn a_damaged_page_ends_the_guest_before_it_sees_it_and_the_place_is_named() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    shelf.full(&managed, "s0");
    drop(managed);
    damage(&shelf, "memory.pages");
    for arguments in [&[][..], &["--verify"]] {
        let ended = restore(&shelf, arguments);
        assert_eq!(ended.exit, Exit::Error, "{ended:?}");
        assert!(
            ended.stderr.contains("memory.pages: damaged at byte "),
            "{arguments:?}: {ended:?}"
        );
    }
    let path = shelf.path("s0");
    let verified = cutover(["snapshot".as_ref(), "verify".as_ref(), path.as_os_str()]);
    assert_eq!(verified.exit, Exit::Error, "{verified:?}");
    let told = verified.stdout + &verified.stderr;
    assert!(told.contains("memory.pages: damaged at byte "), "{told}");
}

#[test]
fn damaged_state_is_refused_before_anything_is_created() {
    for file in ["state.bin", "manifest.json"] {
        let shelf = Shelf::new();
        let (managed, _disk) = ManagedVm::busy();
        shelf.full(&managed, "s0");
        drop(managed);
        damage(&shelf, file);
        let ended = restore(&shelf, &[]);
        assert_eq!(ended.exit, Exit::Error, "{ended:?}");
        assert!(ended.stderr.contains(file), "{file}: {ended:?}");
        assert!(!shelf.path("data.img").exists(), "{file}: a disk was created");
    }
}

#[test]
fn a_full_disk_is_told_of_and_the_guest_and_older_snapshots_live_on() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    shelf.full(&managed, "s0");
    let small = SmallFileSystem::new("24M");
    let body = serde_json::json!({ "store": small.path(), "name": "s1", "kind": "full" });
    let fault = managed.api.request("POST", "/v1/snapshots", Some(&body)).fault();
    assert!(fault.contains("the disk is full"), "{fault}");
    let left = fs::read_dir(small.path()).expect("a directory").count();
    assert_eq!(left, 0, "something is left");
    managed.vm.check_pages();
    // What the failed one would have had is in the next.
    shelf.incremental(&managed, "s1");
    managed.vm.check_pages();
    drop(managed);
    shelf.check_busy("s1", 0);
}
