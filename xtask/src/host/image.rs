//! What a nested host boots: the distribution's full kernel and a small initramfs that hands over to a command.

use std::path::PathBuf;

use anyhow::Result;

use super::exit_after_injection;
use crate::guest::kernel::{Kernel, Use};
use crate::guest::{Ingredients, build_if_changed};
use crate::initramfs::Initramfs;
use crate::workspace::Workspace;

const INIT: &str = include_str!("../../../resources/host/init");
const MODULES: &str = include_str!("../../../resources/host/modules");

/// A bootable nested host.
pub struct Image {
    /// Its kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// The kernel's module folder.
    pub modules: PathBuf,
}

/// Builds the image, unless it is there already.
pub fn build(workspace: &Workspace) -> Result<Image> {
    let kernel = Kernel::fetch(workspace, Use::NestedHost)?;
    let directory = workspace.guests().join("host");
    let initrd = directory.join("initrd");
    let mut ingredients = Ingredients::new();
    ingredients.add(&kernel.package);
    ingredients.add_contents("init", INIT.as_bytes());
    ingredients.add_contents("modules", MODULES.as_bytes());
    ingredients.add_contents(exit_after_injection::PATH, exit_after_injection::SOURCE.as_bytes());
    build_if_changed(&directory, &ingredients, || {
        let tree = Initramfs::new()?;
        tree.add_busybox()?;
        tree.write("init", INIT, 0o755)?;
        tree.add_modules(&kernel, MODULES)?;
        tree.write(exit_after_injection::PATH, exit_after_injection::build(&kernel)?, 0o644)?;
        tree.pack(&initrd)
    })?;
    Ok(Image {
        kernel: kernel.image(),
        initrd,
        modules: kernel.modules_directory(),
    })
}
