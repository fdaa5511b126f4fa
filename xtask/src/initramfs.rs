//! A tree of files in the making, packed in the end as an initramfs (an uncompressed newc cpio archive).
//!
//! Uncompressed, because a virtual machine loads it from memory: unpacking a compressed one costs more than reading it.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::guest::kernel::Kernel;
use crate::process;

/// Where Debian's and Ubuntu's busybox-static put the program.
const BUSYBOX: &str = "/bin/busybox";

/// The tree; paths in it are relative to its root, without a leading slash.
pub struct Initramfs {
    root: TempDir,
}

impl Initramfs {
    /// A tree with the empty directories every init needs to mount things on.
    pub fn new() -> Result<Self> {
        let tree = Self {
            root: TempDir::new().context("cannot make a temporary directory")?,
        };
        for directory in ["bin", "sbin", "etc", "dev", "proc", "sys", "run", "tmp", "root", "mnt"] {
            fs::create_dir(tree.root.path().join(directory))?;
        }
        fs::set_permissions(tree.root.path(), Permissions::from_mode(0o755))?;
        Ok(tree)
    }

    /// Adds a file with the given contents and mode.
    pub fn write(&self, path: &str, contents: impl AsRef<[u8]>, mode: u32) -> Result<()> {
        let to = self.place(path)?;
        fs::write(&to, contents).with_context(|| format!("cannot write {}", to.display()))?;
        fs::set_permissions(&to, Permissions::from_mode(mode))?;
        Ok(())
    }

    /// Adds an executable that exists outside.
    pub fn add_program(&self, from: &Path, path: &str) -> Result<()> {
        let to = self.place(path)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        fs::set_permissions(&to, Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Adds busybox, with its applets linked under `bin` and `sbin`.
    pub fn add_busybox(&self) -> Result<()> {
        self.add_program(Path::new(BUSYBOX), "bin/busybox")?;
        for applet in process::read(Command::new(BUSYBOX).arg("--list-full"))?.lines() {
            let path = applet.strip_prefix("usr/").unwrap_or(applet);
            if self.root.path().join(path).symlink_metadata().is_err() {
                self.link(BUSYBOX, path)?;
            }
        }
        Ok(())
    }

    /// Adds a symbolic link at `path` to the absolute path `target`.
    pub fn link(&self, target: &str, path: &str) -> Result<()> {
        let link = self.place(path)?;
        symlink(target, &link).with_context(|| format!("cannot link {}", link.display()))
    }

    /// Adds the modules named in `recipe` (one a line, `#` starts a comment) with what they depend on, uncompressed,
    /// and `etc/modules`, the list of their paths in load order.
    pub fn add_modules(&self, kernel: &Kernel, recipe: &str) -> Result<()> {
        let mut list = String::new();
        for module in kernel.modules(recipe_lines(recipe))? {
            let (path, contents) = kernel.read_module(&module)?;
            self.write(&path, contents, 0o644)?;
            list.push_str(&format!("/{path}\n"));
        }
        self.write("etc/modules", list, 0o644)
    }

    /// Writes the archive to `archive`, all at once: a half-written one is never seen under that name.
    pub fn pack(&self, archive: &Path) -> Result<()> {
        let partial = archive.with_extension("partial");
        let mut cpio = Command::new("cpio")
            .args([
                "--create",
                "--format=newc",
                "--owner=+0:+0",
                "--reproducible",
                "--quiet",
            ])
            .current_dir(self.root.path())
            .stdin(Stdio::piped())
            .stdout(File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?)
            .spawn()
            .context("cannot run cpio")?;
        let names = process::read(Command::new("find").arg(".").current_dir(self.root.path()))?;
        let mut names: Vec<&str> = names.lines().collect();
        names.sort_unstable();
        if let Some(mut stdin) = cpio.stdin.take() {
            stdin
                .write_all(names.join("\n").as_bytes())
                .context("cpio stopped reading")?;
        }
        let status = cpio.wait()?;
        if !status.success() {
            bail!("cpio failed to write {}: {status}", partial.display());
        }
        fs::rename(&partial, archive).with_context(|| format!("cannot write {}", archive.display()))
    }

    fn place(&self, path: &str) -> Result<PathBuf> {
        let place = self.root.path().join(path);
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        Ok(place)
    }
}

/// The meaningful lines of a recipe: no comments, no blank lines.
pub fn recipe_lines(recipe: &str) -> impl Iterator<Item = &str> {
    recipe
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_may_hold_comments_and_blank_lines() {
        let lines: Vec<_> = recipe_lines("# disks\nvirtio_blk # the transport comes along\n\n  ext4\n").collect();
        assert_eq!(lines, ["virtio_blk", "ext4"]);
    }

    #[test]
    fn a_packed_tree_lists_its_files_with_their_paths() {
        let tree = Initramfs::new().unwrap();
        tree.write("etc/deep/file", "contents", 0o644).unwrap();
        let out = TempDir::new().unwrap();
        let archive = out.path().join("initrd");
        tree.pack(&archive).unwrap();
        let bytes = fs::read(&archive).unwrap();
        assert!(bytes.starts_with(b"070701"), "newc magic");
        assert!(bytes.windows(13).any(|window| window == b"etc/deep/file"));
    }
}
