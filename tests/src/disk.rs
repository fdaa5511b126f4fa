//! Disk images for guests, on tmpfs.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::environment::{guest_file, scratch};

/// A disk image, removed when dropped.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    _directory: TempDir,
}

impl Disk {
    /// A sparse image of `size` bytes.
    #[track_caller]
    pub fn blank(size: u64) -> Self {
        let disk = Self::nothing_yet();
        let file = File::create(&disk.path).expect("a new directory takes a file");
        file.set_len(size).expect("a sparse file takes any size");
        disk
    }

    /// An image with the given contents.
    #[track_caller]
    pub fn holding(contents: &[u8]) -> Self {
        let disk = Self::nothing_yet();
        fs::write(&disk.path, contents).unwrap_or_else(|error| panic!("cannot write {}: {error}", disk.path.display()));
        disk
    }

    /// A copy of the `debian` guest's root file system.
    #[track_caller]
    pub fn debian_root() -> Self {
        let disk = Self::nothing_yet();
        // cp keeps the holes; the image is mostly holes.
        let root = guest_file("debian/root.ext4");
        command(
            "cp",
            &["--sparse=always".as_ref(), root.as_os_str(), disk.path.as_os_str()],
        );
        disk
    }

    /// The image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first `length` bytes.
    #[track_caller]
    pub fn beginning(&self, length: usize) -> Vec<u8> {
        let mut contents = vec![0; length];
        File::open(&self.path)
            .and_then(|file| file.read_exact_at(&mut contents, 0))
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", self.path.display()));
        contents
    }

    /// SHA-256 of the first `length` bytes, as `sha256sum` prints it.
    #[track_caller]
    pub fn sha256(&self, length: usize) -> String {
        let digest = Sha256::digest(self.beginning(length));
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Bytes of the host's storage the image takes.
    #[track_caller]
    pub fn allocated(&self) -> u64 {
        /// Unit of `st_blocks`.
        const BLOCK: u64 = 512;
        fs::metadata(&self.path).expect("the image is there").blocks() * BLOCK
    }

    /// A block device of the host with the image's contents.
    #[track_caller]
    pub fn block_device(&self) -> BlockDevice {
        command("modprobe", &["loop".as_ref()]);
        let name = command(
            "losetup",
            &["--find".as_ref(), "--show".as_ref(), self.path.as_os_str()],
        );
        BlockDevice {
            path: name.trim_end().into(),
        }
    }

    fn nothing_yet() -> Self {
        let directory = scratch();
        Self {
            path: directory.path().join("disk"),
            _directory: directory,
        }
    }
}

/// A loop device, detached when dropped.
#[derive(Debug)]
pub struct BlockDevice {
    path: PathBuf,
}

impl BlockDevice {
    /// The device's node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        command("losetup", &["--detach".as_ref(), self.path.as_os_str()]);
    }
}

/// What a program that must succeed prints.
#[track_caller]
fn command(program: &str, arguments: &[&OsStr]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {told}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
