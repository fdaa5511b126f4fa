//! How a VM ends, and what the monitor's exit code says of it.

use cutover_tests::{Exit, Guest, Signal};

#[test]
fn a_guest_that_powers_itself_off_is_told_from_one_that_reboots() {
    let vm = Guest::micro().boot();
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);

    let vm = Guest::micro().boot();
    vm.run_to_the_end("reboot -f");
    assert_eq!(vm.wait(), Exit::Reboot);
}

#[test]
fn a_guest_panic_is_reported() {
    let vm = Guest::micro().cpus(2).boot();
    vm.run_to_the_end("echo c > /proc/sysrq-trigger");
    assert_eq!(vm.wait(), Exit::Panic);
    assert!(vm.console().text().contains("Kernel panic - not syncing"));
}

#[test]
fn a_triple_fault_is_a_panic() {
    // With reboot=t the kernel resets the machine by a triple fault.
    let vm = Guest::micro().cmdline("reboot=t").boot();
    vm.run_to_the_end("reboot -f");
    assert_eq!(vm.wait(), Exit::Panic);
    assert!(vm.log().contains("triple fault"), "{}", vm.log());
}

#[test]
fn sigterm_and_sigint_press_the_power_button() {
    for signal in [Signal::TERM, Signal::INT] {
        let vm = Guest::micro().boot();
        vm.monitor().signal(signal);
        assert_eq!(vm.wait(), Exit::Shutdown, "after {signal:?}");
    }
}

#[test]
fn a_second_signal_ends_a_guest_that_ignores_the_power_button() {
    let vm = Guest::micro().boot();
    vm.check("rmmod button");
    // Two different ones: two of the same kind may reach the monitor as one.
    vm.monitor().signal(Signal::TERM);
    vm.monitor().signal(Signal::INT);
    assert_eq!(vm.wait(), Exit::Forced);
}

#[test]
fn a_paused_vm_goes_on_where_it_was() {
    let vm = Guest::micro().boot();
    vm.check("echo kept > /tmp/file");
    vm.pause();
    vm.resume();
    assert_eq!(vm.check("cat /tmp/file"), "kept\n");
}
