//! Pausing and resuming over the API: what the guest notices of it, which is its clock and nothing else.

use std::thread::sleep;
use std::time::{Duration, SystemTime};

use cutover_tests::{Disk, Exit, Guest, ManagedVm};
use serde_json::json;

/// By how many seconds the guest's wall clock is ahead of the host's: at least, and at most.
fn ahead(managed: &ManagedVm) -> (f64, f64) {
    let now = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let before = now();
    let guest: f64 = managed.vm.check("date +%s").trim().parse().unwrap();
    // It shows whole seconds, of which nearly another may have passed.
    (guest - now(), guest + 1.0 - before)
}

/// Seconds that the guest's monotonic clock has counted.
fn uptime(managed: &ManagedVm) -> f64 {
    let uptime = managed.vm.check("cat /proc/uptime");
    uptime.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_pause_is_no_lockup_to_the_guest_and_its_clocks_go_on() {
    /// Longer than the guest's watchdog puts up with.
    const PAUSE: Duration = Duration::from_secs(12);
    let managed = Guest::micro().cpus(2).boot_managed(|_| {});
    // It calls twice as many seconds a lockup.
    managed.vm.check("echo 5 > /proc/sys/kernel/watchdog_thresh");
    let ((least, most), uptime_before) = (ahead(&managed), uptime(&managed));
    managed.pause();
    sleep(PAUSE);
    managed.resume();
    let ((least_now, most_now), uptime_now) = (ahead(&managed), uptime(&managed));
    assert!(
        least_now <= most && least <= most_now,
        "the guest's clock was ahead by {least} to {most} s, and is by {least_now} to {most_now} s"
    );
    assert!(
        uptime_now - uptime_before >= PAUSE.as_secs_f64(),
        "{uptime_before} {uptime_now}"
    );
    let messages = managed.vm.check("dmesg");
    for complaint in ["soft lockup", "stall", "clocksource: timekeeping watchdog", "hung"] {
        assert!(!messages.contains(complaint), "{messages}");
    }
}

#[test]
fn pauses_and_resumes_in_a_row_lose_nothing() {
    const SIZE: usize = 8 << 20;
    const PAUSES: usize = 20;
    let disk = Disk::blank(SIZE as u64);
    let managed = Guest::micro().cpus(2).boot_managed(|api| {
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
        );
    });
    let vm = &managed.vm;
    vm.check("dd if=/dev/urandom of=/tmp/data bs=1M count=8");
    vm.check("(dd if=/tmp/data of=/dev/vda bs=64k oflag=direct; sync; touch /tmp/written) >/dev/null 2>&1 &");
    for _ in 0..PAUSES {
        managed.pause();
        managed.resume();
    }
    vm.check("while ! test -e /tmp/written; do sleep 1; done");
    let expected = vm.check("sha256sum < /tmp/data");
    assert_eq!(disk.sha256(SIZE), expected.split(' ').next().unwrap());
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
}
