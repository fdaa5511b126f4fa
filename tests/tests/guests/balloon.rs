//! The memory balloon: what a guest does not need, its host has; and where the guest goes on, so does the balloon.

use cutover_tests::{Api, Guest, ManagedVm, Receiver, Shelf, Vm, poll_until};
use serde_json::{Value, json};

use crate::memory::status;

const MIB: u64 = 1 << 20;
/// What the guest has, in MiB; what it fills and frees; what is asked of it.
const MEMORY: &str = "192M";
const FILLED: u64 = 64;
const AMOUNT: u64 = 112;
/// Least of what is filled that the host has again: the guest may give memory that it has not filled.
const RETURNED: u64 = 24;

/// Fills memory of the guest, and frees it; returns what the host has for it then.
fn fill_and_free(vm: &Vm) -> u64 {
    vm.check(&format!("dd if=/dev/zero of=/tmp/fill bs=1M count={FILLED} 2>&1"));
    let resident = status(vm, "VmRSS");
    assert!(resident > FILLED * MIB, "{resident} bytes resident");
    vm.check("rm /tmp/fill");
    resident
}

/// Waits until the host has at least [`RETURNED`] MiB less for `vm` than `before`.
fn wait_until_returned(vm: &Vm, before: u64) {
    poll_until("memory of the guest is the host's again", || {
        (status(vm, "VmRSS") + RETURNED * MIB < before).then_some(())
    });
}

fn statistics(api: &Api) -> Value {
    api.get("/balloon/statistics")
}

/// Asks for `mib` MiB in the balloon, and waits until they are.
fn inflate(managed: &ManagedVm, mib: u64) {
    managed.api.patch("/balloon", &json!({ "amount_mib": mib }));
    poll_until("the balloon has what was asked for", || {
        (statistics(&managed.api)["actual_mib"] == json!(mib)).then_some(())
    });
}

/// Waits for statistics of which the guest's free memory is as it should be.
fn wait_for_free(api: &Api, is_so: impl Fn(u64) -> bool) {
    poll_until("the guest tells of its free memory", || {
        statistics(api)["free_memory"].as_u64().filter(|free| is_so(*free))
    });
}

/// Checks that the guest has what it had, and all of the balloon.
fn check_inflated(managed: &ManagedVm, sum: &str) {
    assert_eq!(managed.vm.check("sha256sum /tmp/kept"), sum);
    let told = statistics(&managed.api);
    assert_eq!(
        (&told["actual_mib"], &told["target_mib"]),
        (&json!(AMOUNT), &json!(AMOUNT))
    );
    assert_eq!(managed.api.get("/balloon")["amount_mib"], json!(AMOUNT));
    // Its driver goes on telling.
    wait_for_free(&managed.api, |free| free < (192 - AMOUNT) * MIB);
}

#[test]
fn a_balloon_gives_memory_to_the_host_and_goes_with_its_guest() {
    let shelf = Shelf::new();
    let original = Guest::micro().memory(MEMORY).boot_managed(|api| {
        let device = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
        api.put("/balloon", &device);
    });
    original.vm.check("seq 300000 > /tmp/kept");
    let sum = original.vm.check("sha256sum /tmp/kept");
    let resident = fill_and_free(&original.vm);
    wait_for_free(&original.api, |free| free > FILLED * MIB);
    let total = statistics(&original.api)["total_memory"].as_u64().unwrap();
    assert!(total > 128 * MIB && total <= 192 * MIB, "{total} bytes of memory");
    let refused = original
        .api
        .request("PATCH", "/balloon", Some(&json!({ "amount_mib": 193 })));
    assert_eq!(refused.status, 400);
    inflate(&original, AMOUNT);
    wait_until_returned(&original.vm, resident);
    check_inflated(&original, &sum);

    shelf.full(&original, "s0");
    drop(original);
    let restored = shelf.restore("s0").start();
    check_inflated(&restored, &sum);
    let receiver = Receiver::start();
    restored.migrate(receiver.address(), &json!({})).success();
    let moved = receiver.managed;
    check_inflated(&moved, &sum);
    inflate(&moved, 0);
    // What was in the balloon is the guest's.
    let resident = fill_and_free(&moved.vm);
    inflate(&moved, AMOUNT);
    wait_until_returned(&moved.vm, resident);
    check_inflated(&moved, &sum);
}

#[test]
fn free_pages_that_a_guest_reports_are_the_hosts_without_a_balloon_that_is_inflated() {
    let vm = Guest::micro()
        .memory(MEMORY)
        .arguments(["--balloon", "reporting"])
        .boot();
    vm.check("seq 300000 > /tmp/kept");
    let sum = vm.check("sha256sum /tmp/kept");
    let resident = fill_and_free(&vm);
    wait_until_returned(&vm, resident);
    assert_eq!(vm.check("sha256sum /tmp/kept"), sum);
}
