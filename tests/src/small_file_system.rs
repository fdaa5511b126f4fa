//! [`SmallFileSystem`]: a place that is soon full.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::environment::scratch;

/// A file system of a few MiB, unmounted when dropped.
pub struct SmallFileSystem {
    directory: TempDir,
}

impl SmallFileSystem {
    /// One with room for `size`, which has a unit.
    #[track_caller]
    pub fn new(size: &str) -> Self {
        let directory = scratch();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "small"])
            .arg(directory.path())
            .status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount a tmpfs");
        Self { directory }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // What cannot be unmounted goes with the machine at the latest.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
