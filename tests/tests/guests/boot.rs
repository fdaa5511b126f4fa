//! Every way to boot ends in user space.

use cutover_tests::{Exit, Guest, guest_file};

#[test]
fn a_stock_kernel_boots_from_its_bzimage() {
    let vm = Guest::micro().boot();
    assert!(vm.check("cat /proc/cmdline").starts_with("console=ttyS0 quiet"));
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
}

#[test]
fn a_stock_kernel_boots_from_its_elf_file() {
    let vm = Guest::micro().kernel(&guest_file("micro/vmlinux")).boot();
    assert!(vm.check("cat /proc/cmdline").starts_with("console=ttyS0 quiet"));
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
}
