//! The guest has the vCPUs it was given, and they all work.

use cutover_tests::Guest;

#[test]
fn the_guest_sees_and_uses_as_many_cpus_as_it_was_given() {
    for cpus in [1, 2, 4] {
        let vm = Guest::micro().cpus(cpus).boot();
        assert_eq!(vm.check("nproc"), format!("{cpus}\n"));
        let last = cpus - 1;
        let range = if last == 0 {
            "0\n".to_owned()
        } else {
            format!("0-{last}\n")
        };
        assert_eq!(vm.check("cat /sys/devices/system/cpu/online"), range);
        for cpu in 0..cpus {
            let ran_on = vm.check(&format!("taskset -c {cpu} awk '{{ print $39 }}' /proc/self/stat"));
            assert_eq!(ran_on, format!("{cpu}\n"), "with {cpus} vCPUs");
        }
    }
}

#[test]
fn cpus_are_cores_of_one_socket() {
    let vm = Guest::micro().cpus(4).boot();
    let topology = vm.check("cd /sys/devices/system/cpu; cat cpu?/topology/physical_package_id cpu?/topology/core_id");
    assert_eq!(topology, "0\n0\n0\n0\n0\n1\n2\n3\n");
}

#[test]
fn the_guest_keeps_time_by_the_hosts_clock() {
    let vm = Guest::micro().boot();
    let clock = vm.check("cat /sys/devices/system/clocksource/clocksource0/current_clocksource");
    assert!(
        ["kvm-clock\n", "tsc\n"].contains(&clock.as_str()),
        "clock source {clock}"
    );
    let seconds = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let before = seconds();
    let guest: u64 = vm.check("date +%s").trim().parse().unwrap();
    let after = seconds();
    // One second either way: the two clocks are read in whole seconds, and the guest's is set from a rounded one.
    assert!(
        (before - 1..=after + 1).contains(&guest),
        "guest {guest}, host {before} to {after}"
    );
}
