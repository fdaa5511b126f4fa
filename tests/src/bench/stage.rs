//! Copies on tmpfs of everything that contestants read, so that no measurement waits for a slower file system.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::environment::{guest_file, monitor_binary, scratch};

/// The copies, removed when dropped.
pub struct Stage {
    /// An ELF kernel.
    pub kernel: PathBuf,
    /// The initramfs of the `micro` guest.
    pub initrd: PathBuf,
    /// The program under test.
    pub cutover: PathBuf,
    /// Firecracker, if it takes part.
    pub firecracker: Option<PathBuf>,
    directory: TempDir,
}

impl Stage {
    /// Copies kernel, initramfs and programs.
    pub fn new(firecracker: Option<&Path>) -> Result<Self> {
        let directory = scratch();
        let copy = |from: &Path| {
            let to = directory.path().join(from.file_name().context("a program has a name")?);
            fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            Ok::<_, anyhow::Error>(to)
        };
        Ok(Self {
            kernel: copy(&guest_file("micro/vmlinux"))?,
            initrd: copy(&guest_file("micro/initrd"))?,
            cutover: copy(&monitor_binary())?,
            firecracker: firecracker.map(copy).transpose()?,
            directory,
        })
    }

    /// A place for further files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}
