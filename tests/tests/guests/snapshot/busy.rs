//! Snapshots of guests under load.

use std::net::TcpListener;
use std::thread;

use cutover_guest::stream;
use cutover_tests::{Disk, Exit, Guest, Network, Shelf, cli};
use serde_json::json;

use super::{DISK, busy_guest, check_snapshot, write_chunk};

#[test]
fn every_snapshot_of_a_busy_guest_is_of_one_moment() {
    const INCREMENTS: u32 = 5;
    let (shelf, disk) = (Shelf::new(), Disk::blank(DISK));
    let managed = busy_guest(&disk);
    write_chunk(&managed.vm, 0);
    let report = shelf.full(&managed, "s0");
    assert_eq!(report["method"], "copy_on_write", "{report}");
    for number in 1..=INCREMENTS {
        write_chunk(&managed.vm, number);
        let report = shelf.incremental(&managed, &format!("s{number}"));
        assert_eq!(report["parent"], format!("s{}", number - 1), "{report}");
        assert_eq!(report["method"], "copy_on_write", "{report}");
    }
    managed.vm.check_pages();
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);

    for (name, chunks) in [("s0", 1), ("s3", 4), ("s5", 6)] {
        check_snapshot(&shelf, name, chunks);
    }
    let merged = cli::cutover([
        "snapshot".as_ref(),
        "merge".as_ref(),
        shelf.path("s4").as_os_str(),
        shelf.path("merged").as_os_str(),
    ]);
    assert_eq!(merged.exit, Exit::Shutdown, "{merged:?}");
    check_snapshot(&shelf, "merged", 5);
    // What was merged is still built on.
    check_snapshot(&shelf, "s5", 6);
}

#[test]
fn the_last_of_a_chain_of_ten_has_everything_and_so_has_one_built_on_a_restored_guest() {
    let (shelf, disk) = (Shelf::new(), Disk::blank(DISK));
    let managed = busy_guest(&disk);
    write_chunk(&managed.vm, 0);
    shelf.full(&managed, "s0");
    for number in 1..10 {
        write_chunk(&managed.vm, number);
        shelf.incremental(&managed, &format!("s{number}"));
    }
    drop(managed);
    let disks = tempfile::tempdir_in(shelf.directory().parent().expect("on tmpfs")).expect("a directory");
    let restored = shelf
        .restore("s9")
        .arguments(["--track", "--disks"])
        .arguments([disks.path()])
        .start();
    restored.vm.check_pages();
    write_chunk(&restored.vm, 10);
    let report = shelf.incremental(&restored, "s10");
    assert_eq!(report["parent"], "s9", "{report}");
    restored.vm.check_pages();
    drop(restored);
    check_snapshot(&shelf, "s10", 11);
}

#[test]
fn files_written_while_snapshots_are_made_are_whole_in_each() {
    const SNAPSHOTS: usize = 3;
    let (shelf, disk) = (Shelf::new(), Disk::blank(DISK));
    let managed = busy_guest(&disk);
    // The disk is never idle: each file is checked by what was noted of it before it is replaced.
    managed
        .vm
        .check("mkdir /data && mke2fs -q -F /dev/vda 2>/dev/null && mount /dev/vda /data");
    managed.vm.check(
        "(n=0; while :; do n=$((n+1)); head -c 1m /dev/urandom > /tmp/part; md5sum < /tmp/part > /tmp/sum; \
         cat /tmp/part > /data/part$((n%8)); cat /tmp/sum > /data/sum$((n%8)); sync; echo $n > /tmp/count; done) \
         >/dev/null 2>&1 &",
    );
    managed
        .vm
        .check("while ! [ -e /tmp/count ] || [ $(cat /tmp/count) -lt 8 ]; do sleep 0.1; done");
    shelf.full(&managed, "s0");
    for number in 1..SNAPSHOTS {
        shelf.incremental(&managed, &format!("s{number}"));
    }
    drop(managed);
    for number in 0..SNAPSHOTS {
        let disks = tempfile::tempdir_in(shelf.directory().parent().expect("on tmpfs")).expect("a directory");
        let restored = super::restore(&shelf, &format!("s{number}"), disks.path());
        let before: u32 = restored.vm.check("cat /tmp/count").trim().parse().expect("a number");
        restored.vm.check(&format!(
            "while [ $(cat /tmp/count) -le {} ]; do sleep 0.1; done",
            before + 8
        ));
        restored
            .vm
            .check("killall sh 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches");
        // At most the one that was being written does not fit.
        let wrong = restored.vm.check(
            "wrong=0; for n in 0 1 2 3 4 5 6 7; do [ \"$(md5sum < /data/part$n)\" = \"$(cat /data/sum$n)\" ] || \
             wrong=$((wrong+1)); done; echo $wrong",
        );
        assert!(
            ["0", "1"].contains(&wrong.trim()),
            "{wrong} files of s{number} are not whole"
        );
        assert_eq!(
            restored
                .vm
                .check("dmesg | grep -ci 'I/O error\\|EXT2-fs error' || :")
                .trim(),
            "0"
        );
    }
}

#[test]
fn a_tcp_stream_goes_on_through_snapshots_with_no_byte_lost() {
    const TRANSFER: u64 = 64 << 20;
    const SEED: u64 = 0x5a5a;
    let (shelf, network) = (Shelf::new(), Network::new());
    let _tap = network.make_tap();
    let managed = Guest::micro().memory("256M").boot_managed(|api| {
        api.put(
            "/network-interfaces/eth0",
            &json!({ "iface_id": "eth0", "host_dev_name": network.tap() }),
        );
    });
    managed.vm.check(&network.guest_setup());
    let listener = TcpListener::bind((network.host(), 0)).expect("the tap has the host's address");
    let address = listener.local_addr().expect("bound");
    let host = thread::spawn(move || stream::receive(&mut listener.accept().expect("a client").0).expect("a stream"));
    managed.vm.check(&format!(
        "(tcp-stream send {address} {SEED} {TRANSFER} > /tmp/sent; touch /tmp/done) >/dev/null 2>&1 &"
    ));
    shelf.full(&managed, "s0");
    for number in 1..=5 {
        shelf.incremental(&managed, &format!("s{number}"));
    }
    managed.vm.check("while ! [ -e /tmp/done ]; do sleep 0.1; done");
    let received = host.join().expect("the receiver does not panic");
    assert_eq!(managed.vm.check("cat /tmp/sent"), format!("{received}\n"));
}

#[test]
fn there_is_one_snapshot_at_a_time_and_a_second_is_refused() {
    let (shelf, disk) = (Shelf::new(), Disk::blank(DISK));
    let managed = busy_guest(&disk);
    let slow = json!({ "store": shelf.directory(), "name": "slow", "kind": "full", "compress": 19 });
    thread::scope(|scope| {
        let first = scope.spawn(|| managed.api.request("POST", "/v1/snapshots", Some(&slow)));
        cutover_tests::poll_until("the snapshot is being copied", || {
            let progress = managed.api.get("/v1/snapshots/current");
            (progress["done_bytes"].as_u64() > Some(0)).then_some(())
        });
        let refusal = shelf.ask(&managed.api, "second", "full").fault();
        assert!(refusal.contains("a snapshot is being made"), "{refusal}");
        managed.api.request("DELETE", "/v1/snapshots/current", None).success();
        let fault = first.join().expect("it does not panic").fault();
        assert!(fault.contains("cancelled") || fault.contains("given up"), "{fault}");
    });
    assert!(!shelf.path("slow").exists());
    managed.vm.check_pages();
    shelf.full(&managed, "s0");
    drop(managed);
    check_snapshot(&shelf, "s0", 0);
}
