//! The kernel module that mends a fault of the emulator; its source (`resources/host`) says which and how.

use std::fs;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::guest::kernel::Kernel;
use crate::{process, setup};

/// The module's source.
pub const SOURCE: &str = include_str!("../../../resources/host/exit_after_injection.c");

/// Where the module is in the host's initramfs.
pub const PATH: &str = "lib/exit_after_injection.ko";

const NAME: &str = "exit_after_injection";

/// Builds the module for `kernel`, against the distribution's headers.
pub fn build(kernel: &Kernel) -> Result<Vec<u8>> {
    let headers = format!("linux-headers-{}", kernel.release);
    setup::ensure_installed(&["make", &headers])?;
    let directory = TempDir::new().context("cannot make a temporary directory")?;
    let write = |name: &str, contents: &str| {
        let file = directory.path().join(name);
        fs::write(&file, contents).with_context(|| format!("cannot write {}", file.display()))
    };
    write(&format!("{NAME}.c"), SOURCE)?;
    write("Kbuild", &format!("obj-m := {NAME}.o\n"))?;
    process::run(
        process::command("make", ["--quiet", "-C", &format!("/usr/src/{headers}"), "modules"])
            .arg(format!("M={}", directory.path().display())),
    )?;
    let module = directory.path().join(format!("{NAME}.ko"));
    fs::read(&module).with_context(|| format!("cannot read {}", module.display()))
}
