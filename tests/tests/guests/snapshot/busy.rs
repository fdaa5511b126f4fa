//! Snapshots of guests under load.

use std::net::TcpListener;
use std::thread;

use cutover_guest::stream;
use cutover_tests::{Exit, Guest, ManagedVm, Network, Shelf, cli, scratch};
use serde_json::json;

#[test]
fn every_snapshot_of_a_busy_guest_is_of_one_moment() {
    const INCREMENTS: u32 = 5;
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.write_chunk(0);
    let report = shelf.full(&managed, "s0");
    assert_eq!(report["method"], "copy_on_write", "{report}");
    for number in 1..=INCREMENTS {
        managed.vm.write_chunk(number);
        let report = shelf.incremental(&managed, &format!("s{number}"));
        assert_eq!(report["parent"], format!("s{}", number - 1), "{report}");
        assert_eq!(report["method"], "copy_on_write", "{report}");
    }
    managed.vm.check_pages();
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);

    for (name, chunks) in [("s0", 1), ("s3", 4), ("s5", 6)] {
        shelf.check_busy(name, chunks);
    }
    let merged = cli::cutover([
        "snapshot".as_ref(),
        "merge".as_ref(),
        shelf.path("s4").as_os_str(),
        shelf.path("merged").as_os_str(),
    ]);
    assert_eq!(merged.exit, Exit::Shutdown, "{merged:?}");
    shelf.check_busy("merged", 5);
    // What was merged is still built on.
    shelf.check_busy("s5", 6);
}

#[test]
fn the_last_of_a_chain_of_ten_has_everything_and_so_has_one_built_on_a_restored_guest() {
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.write_chunk(0);
    shelf.full(&managed, "s0");
    for number in 1..10 {
        managed.vm.write_chunk(number);
        shelf.incremental(&managed, &format!("s{number}"));
    }
    drop(managed);
    let disks = scratch();
    let restored = shelf
        .restore("s9")
        .arguments(["--track", "--disks"])
        .arguments([disks.path()])
        .start();
    restored.vm.check_pages();
    restored.vm.write_chunk(10);
    let report = shelf.incremental(&restored, "s10");
    assert_eq!(report["parent"], "s9", "{report}");
    restored.vm.check_pages();
    drop(restored);
    shelf.check_busy("s10", 11);
}

/// Writes files of 1 MiB to a disk, one after the other, each with its checksum, until there is no room or a stop.
const FILE_WRITES: &str = r#"
set -e
mkdir /data
mke2fs -q -F /dev/vda
mount /dev/vda /data
cat >/tmp/writes <<'END'
n=0
while [ $n -lt 48 ] && ! [ -e /tmp/stop ]; do
    n=$((n+1))
    head -c 1m /dev/urandom >/tmp/part
    cp /tmp/part /data/part$n
    md5sum </tmp/part >/data/sum$n
    sync
    echo $n >/tmp/count
done
touch /tmp/stopped
END
sh /tmp/writes >/dev/null 2>&1 &
"#;

/// Stops the writes, and says how many files are not what their checksums say, of all there should be.
const FILE_CHECK: &str = r#"
touch /tmp/stop
while ! [ -e /tmp/stopped ]; do sleep 0.1; done
echo 3 >/proc/sys/vm/drop_caches
wrong=0
for n in $(seq $(cat /tmp/count)); do
    [ "$(md5sum </data/part$n)" = "$(cat /data/sum$n)" ] || wrong=$((wrong+1))
done
echo $wrong
"#;

#[test]
fn files_written_while_snapshots_are_made_are_whole_in_each() {
    const SNAPSHOTS: u32 = 3;
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
    managed.vm.check(FILE_WRITES);
    for number in 0..SNAPSHOTS {
        let written = 4 * (number + 1);
        managed.vm.check(&format!(
            "while ! [ -e /tmp/count ] || [ $(cat /tmp/count) -lt {written} ]; do sleep 0.1; done"
        ));
        let kind = if number == 0 { "full" } else { "incremental" };
        shelf.ask(&managed.api, &format!("s{number}"), kind).success();
    }
    assert_eq!(managed.vm.check(FILE_CHECK), "0\n");
    drop(managed);
    for number in 0..SNAPSHOTS {
        let (restored, _disks) = shelf.restore_busy(&format!("s{number}"));
        let count: u32 = restored.vm.check("cat /tmp/count").trim().parse().expect("a number");
        assert!(count >= 4 * (number + 1), "{count} files in s{number}");
        assert_eq!(restored.vm.check(FILE_CHECK), "0\n", "s{number}");
        assert_eq!(
            restored
                .vm
                .check("dmesg | grep -ci 'I/O error\\|EXT[24]-fs error' || :"),
            "0\n"
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
    let shelf = Shelf::new();
    let (managed, _disk) = ManagedVm::busy();
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
    shelf.check_busy("s0", 0);
}
