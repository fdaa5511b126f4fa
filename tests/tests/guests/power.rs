//! Power operations over the API: asked for nicely, by force, and built anew.

use cutover_tests::{Disk, Exit, Guest, ManagedVm, Network, Signal};
use serde_json::{Value, json};

use crate::seccomp;

fn power(managed: &ManagedVm, action: &str) {
    managed.api.put("/v1/power", &json!({ "action": action }));
}

fn power_within(managed: &ManagedVm, action: &str, timeout_ms: u64) {
    let body = json!({ "action": action, "timeout_ms": timeout_ms });
    managed.api.put("/v1/power", &body);
}

fn boots(managed: &ManagedVm) -> Value {
    managed.api.get("/v1/stats")["boots"].clone()
}

#[test]
fn a_guest_that_is_rebooted_or_cycled_finds_its_devices_again() {
    let (disk, network) = (Disk::blank(1 << 20), Network::new());
    let managed = Guest::micro().cpus(2).boot_managed(|api| {
        let path = disk.path();
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": path, "is_root_device": false, "is_read_only": false }),
        );
        api.put(
            "/network-interfaces/eth0",
            &json!({ "iface_id": "eth0", "host_dev_name": network.tap() }),
        );
        api.put("/entropy", &json!({}));
    });
    let vm = &managed.vm;
    let address = vm.check("cat /sys/class/net/eth0/address");
    vm.check("echo kept | dd of=/dev/vda conv=fsync");
    for (count, action) in [(2, "reboot"), (3, "cycle")] {
        vm.check("touch /tmp/lost");
        power(&managed, action);
        vm.wait_agent();
        assert_eq!(vm.run("test -e /tmp/lost").exit_code, 1, "after {action}");
        assert_eq!(vm.check("head -c 5 /dev/vda"), "kept\n", "after {action}");
        assert_eq!(vm.check("cat /sys/class/net/eth0/address"), address, "after {action}");
        vm.check(&network.guest_setup());
        assert_eq!(vm.check("cat /sys/class/net/eth0/carrier"), "1\n", "after {action}");
        vm.check("test -c /dev/hwrng");
        assert_eq!(boots(&managed), count);
        let modes = seccomp::modes(vm);
        assert!(modes.values().all(|mode| mode == "2"), "after {action}: {modes:?}");
    }
    power(&managed, "shutdown");
    assert_eq!(vm.wait(), Exit::Shutdown);
}

#[test]
fn a_guest_that_ignores_the_power_button_is_ended_by_force_at_the_time_limit() {
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.check("rmmod button");
    power_within(&managed, "reboot", 500);
    managed.vm.wait_agent();
    assert_eq!(boots(&managed), 2);
    managed.vm.check("rmmod button");
    power_within(&managed, "shutdown", 500);
    assert_eq!(managed.vm.wait(), Exit::Forced);
}

#[test]
fn a_second_power_operation_is_refused_with_the_reason_and_force_is_not() {
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.check("rmmod button");
    power_within(&managed, "shutdown", 3_600_000);
    let second = managed
        .api
        .request("PUT", "/v1/power", Some(&json!({ "action": "reboot" })));
    assert!(second.fault().contains("the VM is shutting down"), "{second:?}");
    power(&managed, "destroy");
    assert_eq!(managed.vm.wait(), Exit::Forced);
}

#[test]
fn signals_shut_a_rebooted_vm_down_as_the_first_one() {
    let managed = Guest::micro().boot_managed(|_| {});
    power(&managed, "cycle");
    managed.vm.wait_agent();
    managed.vm.monitor().signal(Signal::TERM);
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}
