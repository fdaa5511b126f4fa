//! Monitors that are killed while they make a snapshot, and what is left.

use std::thread;
use std::time::Duration;

use cutover_tests::{Disk, Exit, Shelf, Signal, cli};
use serde_json::json;

use super::{DISK, busy_guest, check_snapshot, write_chunk};

#[test]
fn a_monitor_killed_while_it_makes_a_snapshot_leaves_the_older_ones_whole() {
    // From the beginning of the preparation to the end of the copying.
    for delay in [5, 60, 250] {
        let (shelf, disk) = (Shelf::new(), Disk::blank(DISK));
        let managed = busy_guest(&disk);
        write_chunk(&managed.vm, 0);
        shelf.full(&managed, "s0");
        write_chunk(&managed.vm, 1);
        let body = json!({ "store": shelf.directory(), "name": "s1", "kind": "incremental" });
        let mut connection = managed.api.connect();
        connection.ask("POST", "/v1/snapshots", Some(&body));
        // Any moment will do.
        thread::sleep(Duration::from_millis(delay));
        managed.vm.monitor().signal(Signal::KILL);
        assert!(matches!(managed.vm.wait(), Exit::Signal(_)));
        drop(managed);

        let path = shelf.path("s0");
        let verified = cli::cutover(["snapshot".as_ref(), "verify".as_ref(), path.as_os_str()]);
        assert_eq!(verified.exit, Exit::Shutdown, "{verified:?}");
        let pruned = cli::cutover(["snapshot".as_ref(), "prune".as_ref(), shelf.directory().as_os_str()]);
        assert_eq!(pruned.exit, Exit::Shutdown, "{pruned:?}");
        check_snapshot(&shelf, "s0", 1);
        if shelf.path("s1").exists() {
            check_snapshot(&shelf, "s1", 2);
        }
    }
}
