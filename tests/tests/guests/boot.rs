//! Every way to boot ends in user space.

use std::fs;

use cutover_tests::{Exit, Guest, Vm, guest_file, scratch};

/// What a kernel says of its loader (`bootloader_type`) when it was booted by the Linux protocol: type "undefined".
const LINUX_PROTOCOL: &str = "255\n";
/// … and when it was booted through its PVH entry (arch/x86/platform/pvh/enlighten.c).
const PVH: &str = "176\n";

fn loader(vm: &Vm) -> String {
    vm.check("cat /proc/sys/kernel/bootloader_type")
}

#[test]
fn a_stock_kernel_boots_from_its_bzimage() {
    let vm = Guest::micro().cmdline("a.parameter=seen").boot();
    assert_eq!(
        vm.check("cat /proc/cmdline"),
        "console=ttyS0 quiet panic=-1 a.parameter=seen\n"
    );
    assert_eq!(loader(&vm), LINUX_PROTOCOL);
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
}

#[test]
fn an_elf_kernel_with_a_pvh_note_boots_through_its_pvh_entry() {
    let vm = Guest::micro()
        .kernel(&guest_file("micro/vmlinux"))
        .cmdline("a.parameter=seen")
        .boot();
    assert_eq!(
        vm.check("cat /proc/cmdline"),
        "console=ttyS0 quiet panic=-1 a.parameter=seen\n"
    );
    assert_eq!(loader(&vm), PVH);
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
}

#[test]
fn an_elf_kernel_without_a_pvh_note_boots_by_the_linux_protocol() {
    let mut kernel = fs::read(guest_file("micro/vmlinux")).unwrap();
    // Note of owner "Xen" (4 bytes), with an 8-byte descriptor, of type XEN_ELFNOTE_PHYS32_ENTRY (18).
    let note = *b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
    let at = kernel
        .windows(note.len())
        .position(|bytes| bytes == note)
        .expect("the kernel has a PVH note");
    kernel[at + 12..at + 15].copy_from_slice(b"Not");
    let directory = scratch();
    let path = directory.path().join("vmlinux");
    fs::write(&path, kernel).unwrap();

    let vm = Guest::micro().kernel(&path).boot();
    assert_eq!(loader(&vm), LINUX_PROTOCOL);
}
