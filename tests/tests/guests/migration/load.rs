//! Guests that write memory while they move.

use cutover_tests::{Exit, Guest, ManagedVm, Receiver};
use serde_json::{Value, json};

/// MiB that the guest's program rewrites.
const WRITTEN_MIB: u32 = 32;

/// Has the guest's program begin anew at another pace.
fn write_pages(vm: &ManagedVm, pages_per_second: Option<u32>) {
    vm.vm.run("killall page-writer && rm /run/page-writer.sock");
    vm.vm.start_page_writer(WRITTEN_MIB, pages_per_second);
}

#[test]
fn a_guest_moves_four_times_in_a_row_the_faster_it_writes_and_no_page_is_lost() {
    let mut managed = Guest::micro().cpus(2).boot_managed(|_| {});
    for rate in [None, Some(20_000), Some(2_000), Some(200)] {
        write_pages(&managed, rate);
        (managed, _) = managed.move_to(Receiver::start(), &json!({ "streams": 4 }));
    }
    let messages = managed.vm.check("dmesg");
    for complaint in ["soft lockup", "stall", "clocksource: timekeeping watchdog", "hung"] {
        assert!(!messages.contains(complaint), "{messages}");
    }
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}

/// Bytes in each second that are too few for a guest in a hurry: it rewrites all it has in half the time that this takes.
const SLOW: u64 = 8 << 20;
/// Long enough to stop a guest, and too short for all that one in a hurry has written, even without the limit.
const DOWNTIME_MS: u64 = 60;

/// A guest that writes as fast as it can, and has written all there is once.
fn guest_in_a_hurry() -> ManagedVm {
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.start_page_writer(WRITTEN_MIB, None);
    managed.vm.check_pages();
    managed
}

/// Moves a guest that writes as fast as it can over a link that is too slow for that.
fn move_over_a_slow_link(mut options: Value) -> Value {
    options["bandwidth"] = json!(SLOW);
    options["compression"] = json!("never");
    options["downtime_ms"] = json!(DOWNTIME_MS);
    guest_in_a_hurry().move_to(Receiver::start(), &options).1
}

#[test]
fn a_guest_that_outruns_the_link_is_slowed_down_until_it_has_moved() {
    let report = move_over_a_slow_link(json!({}));
    assert!(report["throttle_percent_max"].as_u64() > Some(0), "{report}");
}

#[test]
fn a_guest_that_outruns_the_link_goes_ahead_of_its_memory_if_that_is_allowed() {
    let report = move_over_a_slow_link(json!({ "throttle": false, "post_copy": "allow" }));
    assert!(report["pages_pulled"].as_u64() > Some(0), "{report}");
}

#[test]
fn a_guest_that_may_neither_be_slowed_down_nor_go_ahead_of_its_memory_stays_and_says_why() {
    let managed = guest_in_a_hurry();
    let receiver = Receiver::start();
    let options = json!({ "compression": "never", "throttle": false, "bandwidth": SLOW, "downtime_ms": DOWNTIME_MS });
    let fault = managed.migrate(receiver.address(), &options).fault();
    assert!(fault.contains("out of reach: the guest dirties"), "{fault}");
    managed.check_goes_on();
    assert_eq!(receiver.managed.vm.wait(), Exit::Error);
}

#[test]
fn a_guest_goes_ahead_of_its_memory_when_that_is_asked_for() {
    let managed = Guest::micro().cpus(2).boot_managed(|_| {});
    write_pages(&managed, Some(20_000));
    let (managed, _) = managed.move_to(Receiver::start(), &json!({ "post_copy": "now" }));
    // And back, now that all of its memory has come.
    managed.move_to(Receiver::start(), &json!({ "post_copy": "now" }));
}

#[test]
fn a_paused_guest_stays_paused_where_it_goes() {
    let managed = Guest::micro().boot_managed(|_| {});
    write_pages(&managed, Some(2_000));
    managed.pause();
    let receiver = Receiver::start();
    managed.migrate(receiver.address(), &json!({})).success();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
    assert_eq!(receiver.managed.api.get("/")["state"], "Paused");
    receiver.managed.resume();
    receiver.managed.check_goes_on();
}
