//! Guests with the tools of a distribution at hand: `micro` guests that mount the `debian` image's file system
//! read-only and run its programs from there.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::peers;
use crate::environment::guest_file;
use crate::{Disk, Vm};

/// Guest memory.
pub const MEMORY_MIB: u32 = 256;

/// The serial number of the disk with the tools.
const SERIAL: &str = "tools";

/// Options of Cutover's disk with the tools.
pub fn disk_options() -> String {
    format!("readonly,serial={SERIAL}")
}

/// QEMU with the tools' disk.
pub fn qemu(root: &Disk) -> Command {
    let mut command = peers::qemu(&guest_file("micro/vmlinux"), &guest_file("micro/initrd"), MEMORY_MIB);
    peers::add_qemu_disk(&mut command, SERIAL, root.path(), "readonly=on");
    command
}

/// Mounts the tools in a guest that has booted.
pub fn mount(vm: &Vm) {
    let device = disk_device(vm, SERIAL);
    vm.check(&format!(
        "mkdir -p /mnt && mount -t ext4 -o ro,noload {device} /mnt && \
         for tree in dev proc sys tmp; do mount -o bind /$tree /mnt/$tree; done"
    ));
}

/// The device of the disk with `serial`: in which order disks appear is the monitor's choice.
pub fn disk_device(vm: &Vm, serial: &str) -> String {
    let found = vm.check(&format!("grep -lx {serial} /sys/block/vd?/serial"));
    let name = found.split('/').nth(3).unwrap_or_default();
    format!("/dev/{name}")
}

/// Runs one of the tools, which reports in JSON.
pub fn run_json(vm: &Vm, command: &str) -> Result<Value> {
    let output = vm.run(&format!("PATH=/usr/bin:/bin exec chroot /mnt {command}"));
    ensure!(
        output.exit_code == 0,
        "'{command}' failed in the guest: {}{}",
        output.stdout,
        output.stderr
    );
    serde_json::from_str(&output.stdout).with_context(|| format!("'{command}' printed: {}", output.stdout))
}
