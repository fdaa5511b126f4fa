//! A rate limiter lets its rate through: never more, and under load no less.
//!
//! What passes is counted and timed in the guest, by the guest's clock. A bucket begins full, so `size` passes at once,
//! and the rest at the rate:
//!
//! ```text
//!  passed ≤ size + rate · elapsed               exact, whatever the machine does (a frame received is paid for later)
//!  elapsed ≤ 105 % of (passed − size) / rate    unless the machine stood still at the wrong moment: tried again
//! ```
//! A guest that is held up for less than a bucket's refill time makes up for it.

use std::net::TcpListener;
use std::thread;

use cutover_guest::stream;
use cutover_tests::{Disk, Guest, Network, Vm, scratch};

/// Time for which the rate is watched, in seconds.
const WATCHED: f64 = 5.0;
/// Share of that time that may be lost.
const TOLERANCE: f64 = 0.05;
/// How often the machine may stand still at the wrong moment.
const ATTEMPTS: usize = 5;
/// Resolution of the clock that [`timed`] reads, at both ends.
const CLOCK_ERROR: f64 = 0.02;
/// Seconds in which every bucket here fills.
const REFILL: u64 = 2;

/// Runs `command` in the guest with full buckets; returns its time in seconds and the difference it makes to the number
/// that `count` prints.
fn timed(vm: &Vm, count: &str, command: &str) -> (f64, f64) {
    // Nothing but time fills a bucket.
    let printed = vm.check(&format!(
        "sleep {REFILL}; before=$({count}); read start rest < /proc/uptime
         {command} > /dev/null || exit 1
         read end rest < /proc/uptime; echo $start $end $before $({count})"
    ));
    let numbers: Vec<f64> = printed
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    let [start, end, before, after] = numbers[..] else {
        panic!("not four numbers: {printed}");
    };
    (end - start, after - before)
}

/// Has `measure` return seconds and tokens passed until they agree with a bucket of `size` tokens, of which the last
/// operation may take `overshoot` too many.
#[track_caller]
fn assert_holds_its_rate(what: &str, size: u64, overshoot: u64, mut measure: impl FnMut() -> (f64, f64)) {
    let [size, overshoot, refill] = [size, overshoot, REFILL].map(|number| number as f64);
    let rate = size / refill;
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let (elapsed, passed) = measure();
        let due = (passed - size) / rate;
        assert!(due >= 0.9 * WATCHED, "{what}: only {passed} were counted");
        assert!(
            elapsed + CLOCK_ERROR >= due - overshoot / rate,
            "{what}: {passed} passed in {elapsed} s, {due} s are due"
        );
        seen.push(format!("{elapsed:.2} s instead of {due:.2} s"));
        if elapsed <= due * (1.0 + TOLERANCE) {
            return;
        }
    }
    panic!("{what}: held back too long each time: {}", seen.join(", "));
}

/// A configuration file's `disks` or `nets`, as an argument; the rest of the file is replaced by other arguments.
fn configured(directory: &std::path::Path, devices: &str) -> [String; 2] {
    let path = directory.join("vm.json");
    let vm = format!(r#"{{ "cpus": 1, "memory": {{ "size": "128M" }}, "boot": {{ "kernel": "none" }}, {devices} }}"#);
    std::fs::write(&path, vm).unwrap();
    ["--config".to_owned(), path.display().to_string()]
}

#[test]
fn a_disk_passes_the_bytes_of_its_limit_and_no_more() {
    const SIZE: u64 = 1 << 20;
    for io in ["threads", "io-uring"] {
        let (directory, disk) = (scratch(), Disk::blank(64 << 20));
        let arguments = configured(
            directory.path(),
            &format!(
                r#""disks": [{{ "path": "{}", "io": "{io}", "rate_limiter":
                    {{ "bandwidth": {{ "size": {SIZE}, "refill_time_ms": {} }} }} }}]"#,
                disk.path().display(),
                REFILL * 1000
            ),
        );
        let vm = Guest::micro().arguments(arguments).boot();
        // The bucket, and then half as much again each second.
        let read = "dd if=/dev/vda of=/dev/null iflag=direct bs=64k count=56";
        let write = "dd if=/dev/zero of=/dev/vda oflag=direct bs=64k count=56";
        // Fields 3 and 7: sectors read and written.
        let sectors = "awk '{ printf \"%d\", ($3 + $7) * 512 }' /sys/block/vda/stat";
        for (direction, command) in [("reading", read), ("writing", write)] {
            assert_holds_its_rate(&format!("{direction} with {io}"), SIZE, 0, || {
                timed(&vm, sectors, command)
            });
        }
    }
}

#[test]
fn a_disk_passes_the_requests_of_its_limit_and_no_more() {
    let (directory, disk) = (scratch(), Disk::blank(64 << 20));
    let arguments = configured(
        directory.path(),
        &format!(
            r#""disks": [{{ "path": "{}", "rate_limiter": {{ "ops": {{ "size": 100, "refill_time_ms": {} }} }} }}]"#,
            disk.path().display(),
            REFILL * 1000
        ),
    );
    let vm = Guest::micro().arguments(arguments).boot();
    let read = "dd if=/dev/vda of=/dev/null iflag=direct bs=4k count=350";
    let requests = "awk '{ printf \"%d\", $1 + $5 }' /sys/block/vda/stat";
    assert_holds_its_rate("requests", 100, 0, || timed(&vm, requests, read));
}

#[test]
fn an_interface_passes_the_bytes_of_its_limits_in_both_directions_and_loses_no_frame() {
    const SIZE: u64 = 1 << 20;
    const SEED: u64 = 7;
    /// A little more than the bucket and two and a half times as much: [`WATCHED`] seconds of it.
    const TRANSFER: u64 = SIZE * 7 / 2;
    let (directory, network) = (scratch(), Network::new());
    let bucket = format!(
        r#"{{ "bandwidth": {{ "size": {SIZE}, "refill_time_ms": {} }} }}"#,
        REFILL * 1000
    );
    let arguments = configured(
        directory.path(),
        &format!(
            r#""nets": [{{ "tap": {{ "name": "{}" }}, "host_ip": "{}/24", "rx_rate_limiter": {bucket},
                "tx_rate_limiter": {bucket} }}]"#,
            network.tap(),
            network.host()
        ),
    );
    let vm = Guest::micro().arguments(arguments).boot();
    vm.check(&network.guest_setup());
    // What is sent has left, but for 64 KiB.
    vm.check("echo 4096 16384 65536 > /proc/sys/net/ipv4/tcp_wmem");
    let listener = TcpListener::bind((network.host(), 0)).unwrap();
    let address = listener.local_addr().unwrap();

    // The kernel counts frames as the limiter does: with their headers, and a large one before it is cut.
    let sent = "cat /sys/class/net/eth0/statistics/tx_bytes";
    assert_holds_its_rate("sending", SIZE, 0, || {
        let listener = listener.try_clone().unwrap();
        let host = thread::spawn(move || stream::receive(&mut listener.accept().unwrap().0).unwrap());
        let measured = timed(&vm, sent, &format!("tcp-stream send {address} {SEED} {TRANSFER}"));
        assert_eq!(host.join().unwrap().bytes, TRANSFER);
        measured
    });
    assert_eq!(vm.check("cat /sys/class/net/eth0/statistics/tx_dropped"), "0\n");

    let received = "cat /sys/class/net/eth0/statistics/rx_bytes";
    assert_holds_its_rate("receiving", SIZE, 64 << 10, || {
        let listener = listener.try_clone().unwrap();
        let host = thread::spawn(move || stream::send(&mut listener.accept().unwrap().0, SEED, TRANSFER).unwrap());
        let measured = timed(&vm, received, &format!("tcp-stream receive {address}"));
        assert_eq!(host.join().unwrap().bytes, TRANSFER);
        measured
    });
}
