//! Locks on disk images: whoever writes an image has it alone, those who only read share it.
//!
//! They are locks of the open file (flock(2)), so that they end with it however the process ends. On NFS, Linux makes them
//! byte-range locks at the server, which all hosts see; taking one also has this host see what the last owner wrote, and
//! giving it back has the server know of it. A mount with `nolock` or `local_lock=flock` locks out only this host.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock, major, minor};
use rustix::io::Errno;

use super::DeviceError;

/// Where the kernel lists the locks there are (proc_locks(5)).
const LOCKS: &str = "/proc/locks";

/// Keeps other monitors off `file`, the image at `path`, for as long as it is open: all of them while it is written,
/// writers while it is read.
///
/// # Errors
/// Somebody is in the way.
pub fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), DeviceError> {
    let operation = if readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(file, operation) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(in_use(file, path)),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the disk image cannot be locked against other users");
            Ok(())
        }
    }
}

/// Lets others have `file`.
///
/// # Errors
/// The system refused.
pub fn unlock(file: &File) -> io::Result<()> {
    Ok(flock(file, FlockOperation::Unlock)?)
}

/// That `file`, the image at `path`, is locked by somebody else, who is named if that can be found out.
pub fn in_use(file: &File, path: &Path) -> DeviceError {
    let user = match holder(file) {
        Some(pid) if pid == std::process::id() => "another disk of this VM".to_owned(),
        Some(pid) => match fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(name) => format!("process {pid} ({})", name.trim_end()),
            Err(_) => format!("process {pid}"),
        },
        None => "another process, host or disk".to_owned(),
    };
    DeviceError::DiskInUse {
        path: path.to_owned(),
        user,
    }
}

/// The process that has locked `file`, if it is of this host.
fn holder(file: &File) -> Option<u32> {
    let metadata = file.metadata().ok()?;
    let device = metadata.dev();
    let identity = format!("{:02x}:{:02x}:{}", major(device), minor(device), metadata.ino());
    holder_among(&fs::read_to_string(LOCKS).ok()?, &identity)
}

/// The process that has the lock on the file that `locks` calls `identity`.
fn holder_among(locks: &str, identity: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        // 3: FLOCK  ADVISORY  WRITE 4321 08:02:917 0 EOF; who waits for one has "->" behind the number.
        let mut words = line.split_ascii_whitespace().skip(1);
        let is_flock = words.next()? == "FLOCK";
        let mut words = words.skip(2);
        let process = words.next()?.parse().ok().filter(|&process| process > 0);
        process.filter(|_| is_flock && words.next() == Some(identity))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found_among_all_locks() {
        let locks = "1: POSIX  ADVISORY  READ  700 08:02:917 1073741826 1073742335\n\
                     2: FLOCK  ADVISORY  WRITE 4321 08:02:917 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 4322 08:02:918 0 EOF\n\
                     3: FLOCK  ADVISORY  READ -1 00:2e:5 0 EOF\n\
                     cut off\n";
        assert_eq!(holder_among(locks, "08:02:917"), Some(4321));
        for unknown in ["08:02:918", "00:2e:5", "08:02:91"] {
            assert_eq!(holder_among(locks, unknown), None, "{unknown}");
        }
    }

    #[test]
    fn who_is_in_the_way_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let again = || File::options().write(true).open(file.path()).unwrap();
        let own = again();
        lock(&own, file.path(), false).unwrap();
        let refused = lock(&again(), file.path(), false).unwrap_err().to_string();
        assert!(
            refused.contains("is in use by another disk of this VM;") || refused.contains("by another process"),
            "{refused}"
        );
        unlock(&own).unwrap();
        lock(&again(), file.path(), false).unwrap();
    }
}
