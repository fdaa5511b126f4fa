//! Every thread of the monitor is confined, unless that is switched off.

use std::collections::BTreeMap;
use std::fs;

use cutover_tests::{Disk, Guest, Network, Vm};

/// The seccomp mode of each thread, by thread name (see proc_pid_status(5): 2 is "filter").
pub fn modes(vm: &Vm) -> BTreeMap<String, String> {
    let field = |status: &str, key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().to_owned()
    };
    fs::read_dir(vm.monitor().proc("task"))
        .unwrap()
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            (field(&status, "Name:"), field(&status, "Seccomp:"))
        })
        .collect()
}

fn guest_with_every_device() -> (Guest, Disk, Disk, Network) {
    let (first, second, network) = (Disk::blank(1 << 20), Disk::blank(1 << 20), Network::new());
    let guest = Guest::micro()
        .cpus(2)
        .disk_with(&first, "io=threads")
        .disk(&second)
        .net(&network)
        .arguments(["--rng"]);
    (guest, first, second, network)
}

#[test]
fn every_thread_is_confined() {
    let (guest, _first, _second, network) = guest_with_every_device();
    let vm = guest.boot();
    vm.check("dd if=/dev/zero of=/dev/vda bs=64k count=16 conv=fsync && dd if=/dev/vdb of=/dev/null");
    vm.check(&network.guest_setup());
    vm.check(&format!("ping -c 1 {}", network.host()));
    let modes = modes(&vm);
    for thread in ["cutover", "vcpu-0", "vcpu-1", "devices"] {
        assert!(modes.contains_key(thread), "no thread {thread} in {modes:?}");
    }
    let unconfined: Vec<_> = modes.iter().filter(|(_, mode)| *mode != "2").collect();
    assert!(unconfined.is_empty(), "not confined: {unconfined:?}");
}

#[test]
fn confinement_can_be_switched_off_to_debug() {
    let vm = Guest::micro().arguments(["--no-seccomp"]).boot();
    let modes = modes(&vm);
    assert!(modes.values().all(|mode| mode == "0"), "{modes:?}");
}
