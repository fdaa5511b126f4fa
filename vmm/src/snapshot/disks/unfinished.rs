//! Names of disks that are not complete, and what becomes of those that a killed monitor left.
//!
//! A monitor that is killed while it fills a disk leaves `.NAME.…partial`. The next one that fills a disk of this name
//! removes it. That nobody uses such a file any more is told by the kernel, which grants a read lease (`fcntl(2)`,
//! `F_SETLEASE`) only on what no process has open for writing; and its monitor has it open so from the moment it is there.
//! Locks could not tell: the block device takes one only when the machine is built.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use crate::snapshot::directory_of;

/// What the name of a disk ends with that is not complete.
const SUFFIX: &str = ".partial";
/// What the name of one ends with that is complete, but could not be given its own name.
const SET_ASIDE: &str = "complete";

/// Creates the file that is going to be the disk at `path`.
///
/// # Errors
/// The system refuses.
pub fn create(path: &Path) -> std::io::Result<NamedTempFile> {
    let (prefix, directory) = (prefix(path), directory_of(path));
    remove_abandoned(directory, &prefix);
    Builder::new().prefix(&prefix).suffix(SUFFIX).tempfile_in(directory)
}

/// Gives a disk that is complete, at `path`, a name with which it is not taken for an abandoned one; returns where it is.
pub fn set_aside(path: PathBuf) -> PathBuf {
    let aside = path.with_extension(SET_ASIDE);
    match fs::rename(&path, &aside) {
        Ok(()) => aside,
        Err(_) => path,
    }
}

/// What the name of the disk for `path` begins with until it is complete.
fn prefix(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!(".{name}.")
}

/// Removes what was left of disks whose names begin with `prefix`. What cannot be looked at or removed stays: it is in
/// nobody's way.
fn remove_abandoned(directory: &Path, prefix: &str) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| is_unfinished(&entry.file_name(), prefix)) {
        let path = entry.path();
        match File::open(&path) {
            Ok(file) if is_written_by_nobody(&file) && fs::remove_file(&path).is_ok() => {
                tracing::info!(path = %path.display(), "removed a disk that a killed monitor had not completed");
            }
            _ => tracing::debug!(path = %path.display(), "a disk is being filled by another monitor"),
        }
    }
}

/// Whether a file of this name is going to be the disk that `prefix` is for. Of disks `a` and `a.b`, the names of the
/// second one's begin so too, but have another dot.
fn is_unfinished(name: &OsStr, prefix: &str) -> bool {
    let middle = name
        .to_str()
        .and_then(|name| name.strip_prefix(prefix)?.strip_suffix(SUFFIX));
    middle.is_some_and(|middle| !middle.is_empty() && !middle.contains('.'))
}

/// Whether no process has `file` open for writing.
fn is_written_by_nobody(file: &File) -> bool {
    // SAFETY: the descriptor is open, and this operation takes a number; the lease ends when the file is closed.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_nobody_fills_any_more_is_removed_and_no_other_file() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("data.img");
        let used = create(&disk).unwrap();
        let (_, abandoned) = create(&disk).unwrap().keep().unwrap();
        let others = [
            "data.img",
            ".data.img.partial",
            ".data.img.b.123456.partial",
            ".data.img.123456.complete",
        ];
        for name in others {
            fs::write(directory.path().join(name), "somebody's").unwrap();
        }
        let next = create(&disk).unwrap();
        assert!(!abandoned.exists());
        assert!(used.path().exists() && next.path().exists());
        for name in others {
            assert!(directory.path().join(name).exists(), "{name}");
        }
    }
}
