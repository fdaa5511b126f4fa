//! The guest has the memory it was given; the host has what the guest uses.

use std::fs;

use cutover_tests::{Guest, HugePages, PAGE_SIZE, Vm, poll_until};

const MIB: u64 = 1 << 20;

/// Bytes of RAM in the memory map the guest was given.
fn ram(vm: &Vm) -> u64 {
    let map = vm.check("cd /sys/firmware/memmap; for e in *; do echo $(cat $e/start $e/end) $(cat $e/type); done");
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    map.lines()
        .filter(|line| line.ends_with("System RAM"))
        .map(|line| {
            let mut fields = line.split(' ');
            let start = hex(fields.next().unwrap());
            hex(fields.next().unwrap()) - start + 1
        })
        .sum()
}

/// A value of `/proc/PID/status` of the monitor, in bytes.
pub(crate) fn status(vm: &Vm, key: &str) -> u64 {
    let status = fs::read_to_string(vm.monitor().proc("status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// Boots with `mib` MiB and checks that the guest sees them all but for what the first megabyte and ACPI take.
fn boot_and_check(mib: u64) -> Vm {
    let vm = Guest::micro().memory(&format!("{mib}M")).boot();
    let seen = ram(&vm);
    assert!(
        seen <= mib * MIB && seen > (mib - 2) * MIB,
        "{mib} MiB given, {seen} bytes seen"
    );
    vm
}

#[test]
fn a_small_guest_sees_its_memory() {
    boot_and_check(96);
}

#[test]
fn a_guest_that_ends_below_the_mmio_gap_sees_its_memory() {
    boot_and_check(3072);
}

#[test]
fn a_guest_larger_than_the_mmio_gap_uses_memory_above_it_and_the_host_allocates_only_what_is_touched() {
    let vm = boot_and_check(5120);
    // Linux takes from the zone above 4 GiB first.
    vm.check("head -c 64m /dev/urandom > /tmp/a && cp /tmp/a /tmp/b && cmp /tmp/a /tmp/b");
    let above: u64 = vm
        .check("awk '/zone *Normal/ { normal = 1 } normal && /present/ { print $2; exit }' /proc/zoneinfo")
        .trim()
        .parse()
        .unwrap();
    assert!(above > 0, "no memory above 4 GiB in use");
    let resident = status(&vm, "VmRSS");
    assert!(
        resident < 1024 * MIB,
        "{resident} bytes resident for a 5 GiB guest that uses a few hundred MiB"
    );
}

#[test]
fn a_guest_on_huge_pages_takes_its_memory_from_the_hosts_pool_and_gives_back_what_it_reports_as_free() {
    for arguments in [&["--hugepages"][..], &["--hugepages", "--memory-shared"]] {
        let _pool = HugePages::reserve(96);
        let guest = Guest::micro().memory("192M").arguments(arguments);
        let vm = guest.arguments(["--balloon", "reporting"]).boot();
        vm.check("head -c 16m /dev/urandom > /tmp/a && cp /tmp/a /tmp/b && cmp /tmp/a /tmp/b");
        let (huge, small) = (status(&vm, "HugetlbPages"), status(&vm, "VmRSS"));
        assert!(huge >= 32 * MIB, "{arguments:?}: {huge} bytes of huge pages in use");
        assert!(small < 16 * MIB, "{arguments:?}: {small} bytes of small pages in use");
        vm.check("rm /tmp/a /tmp/b");
        poll_until("what is free in the guest is in the pool again", || {
            (status(&vm, "HugetlbPages") + 16 * MIB < huge).then_some(())
        });
    }
}

#[test]
fn what_the_guest_writes_is_seen_in_its_memory_and_a_paused_guest_writes_nothing() {
    // Lines of 16 bytes fill pages evenly.
    let page: [u8; PAGE_SIZE] = b"sixteen-letters\n".repeat(PAGE_SIZE / 16).try_into().unwrap();
    for arguments in [&[][..], &["--memory-shared"]] {
        let vm = Guest::micro().arguments(arguments).boot();
        vm.check("yes sixteen-letters | head -c 4096000 > /tmp/pages");

        vm.pause();
        let memory = vm.memory();
        assert!(memory.len() >= 128 << 20, "only {} bytes found", memory.len());
        let found = memory.count_pages(&page);
        assert!(found >= 1000, "{found} of 1000 pages found");
        assert!(memory == vm.memory(), "a paused guest wrote memory");

        vm.resume();
        assert_eq!(vm.check("sort -u /tmp/pages"), "sixteen-letters\n");
        assert!(memory != vm.memory(), "a running guest wrote nothing");
    }
}
