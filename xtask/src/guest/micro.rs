//! The `micro` guest: a stock cloud kernel and an initramfs with busybox, the virtio modules and the test programs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::kernel::{Kernel, Use};
use super::{Ingredients, build_if_changed};
use crate::initramfs::Initramfs;
use crate::workspace::{Executable, Workspace, cargo};

/// The modules in the initramfs.
const MODULES: &str = include_str!("../../../resources/guest/micro/modules");

/// The program the kernel starts.
const INIT: &str = "guest-init";

/// The target triple is named so that the flags below do not reach build scripts and procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the image and returns its directory.
pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let programs = guest_programs(workspace)?;
    let kernel = Kernel::fetch(workspace, Use::Guest)?;
    let directory = workspace.guests().join("micro");
    let mut ingredients = Ingredients::new();
    ingredients.add(&kernel.package);
    ingredients.add_contents("modules", MODULES.as_bytes());
    for program in &programs {
        ingredients.add_file(&program.path)?;
    }
    build_if_changed(&directory, &ingredients, || {
        let vmlinuz = directory.join("vmlinuz");
        fs::copy(kernel.image(), &vmlinuz).with_context(|| format!("cannot write {}", vmlinuz.display()))?;
        kernel.extract_vmlinux(&directory.join("vmlinux"))?;
        let tree = Initramfs::new()?;
        for program in &programs {
            tree.add_program(&program.path, &format!("bin/{}", program.name))?;
        }
        tree.link(&format!("/bin/{INIT}"), "init")?;
        tree.add_busybox()?;
        tree.add_modules(&kernel, MODULES)?;
        tree.pack(&directory.join("initrd"))
    })?;
    Ok(directory)
}

/// Builds the programs that run inside guests, statically linked.
fn guest_programs(workspace: &Workspace) -> Result<Vec<Executable>> {
    let programs = workspace.build(
        cargo()
            .args([
                "build",
                "--release",
                "--package=cutover-guest",
                "--bins",
                "--target",
                TARGET,
            ])
            .env("RUSTFLAGS", "-C target-feature=+crt-static"),
    )?;
    ensure!(
        programs.iter().any(|program| program.name == INIT),
        "the package cutover-guest has no program {INIT}"
    );
    Ok(programs)
}
