//! The command lines of Cutover's peers, for the same guest: same kernel, initramfs, memory, kernel command line.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::Vm;

/// Everybody's kernel command line. Firecracker adds `pci=off` by itself, so all have it.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 pci=off";

/// QEMU's machine made for quick starts, less every device that the guest can do without (QEMU manual, "microvm").
const QEMU_MACHINE: &str = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on";

/// QEMU with 1 vCPU and the console on standard input and output.
pub fn qemu(kernel: &Path, initrd: &Path, memory_mib: u32) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", QEMU_MACHINE, "-accel", "kvm", "-cpu", "host", "-smp", "1"]);
    command.args(["-m", &memory_mib.to_string(), "-append", CMDLINE]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
    ]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    command
}

/// Adds a raw disk to QEMU's command line.
pub fn add_qemu_disk(command: &mut Command, serial: &str, path: &Path, options: &str) {
    let path = path.display();
    command
        .arg("-drive")
        .arg(format!("if=none,id={serial},format=raw,file={path},{options}"));
    command
        .arg("-device")
        .arg(format!("virtio-blk-device,drive={serial},serial={serial}"));
}

/// Starts `micro` under another monitor, whose console is its standard input and output.
pub fn boot(command: Command) -> Vm {
    let vm = Vm::start(command);
    vm.wait_agent();
    vm
}

/// Completes a command that runs Firecracker, with 1 vCPU; its configuration goes into the file `config`.
///
/// Without seccomp filters, because builds for glibc have none; Cutover runs with its own.
pub fn add_firecracker_arguments(
    command: &mut Command,
    config: &Path,
    kernel: &Path,
    initrd: &Path,
    memory_mib: u32,
) -> Result<()> {
    let contents = json!({
        "boot-source": { "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": CMDLINE },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": memory_mib },
        "drives": [],
    });
    fs::write(config, contents.to_string()).with_context(|| format!("cannot write {}", config.display()))?;
    command.args(["--no-api", "--no-seccomp", "--config-file"]).arg(config);
    Ok(())
}
