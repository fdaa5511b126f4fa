//! Why a process could not be confined: which step failed, on what, and what it takes.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

/// Why a process could not be confined. It must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step that concerns no file.
    #[error("cannot {action}, which takes {needs}")]
    Step {
        /// What was to be done.
        action: &'static str,
        /// The privilege or the kernel that it takes.
        needs: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A step that concerns a file.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// The file, as it is called outside of the jail.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Root, or nobody.
    #[error("{0} is no user or group for a monitor: it is from 1 to 4294967294, and best that of no other VM")]
    Id(u32),
    /// Not one component of a path.
    #[error("'{0}' cannot be the name of a folder: it is one name without '/', and not '.' or '..'")]
    Name(String),
    /// Others could exchange what is in the base.
    #[error(
        "{} is not safe for jails: {} is writable by others than root, or not root's; \
         give --chroot a folder that only root can write, as all above it",
        .base.display(), .at.display()
    )]
    BaseNotSafe {
        /// The folder of jails.
        base: PathBuf,
        /// It, or what it is in.
        at: PathBuf,
    },
    /// A monitor runs in the same folder.
    #[error("a jail called {id} is in use already ({} is locked): choose another --id, or end that VM", .folder.display())]
    InUse {
        /// Its name.
        id: String,
        /// Its folder.
        folder: PathBuf,
    },
    /// A file cannot be where it is wanted.
    #[error("--file {}: it cannot be at {} in the jail: {reason}; choose another place with at=PATH", .path.display(), .at.display())]
    Place {
        /// The file.
        path: PathBuf,
        /// Where it was to be.
        at: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The user of the jail may not use a file that is given to it.
    #[error(
        "--file {}: user {uid} of group {gid} may not {access} it: give it to that user (chown {uid}:{gid} {})",
        .path.display(), .path.display()
    )]
    NotAllowed {
        /// The file.
        path: PathBuf,
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// What for.
        access: &'static str,
    },
    /// There is no file system of control groups, version 2.
    #[error("limits by --cgroup take control groups of version 2, and none are mounted here (mount -t cgroup2 …)")]
    NoCgroups,
    /// A controller cannot be had.
    #[error(
        "the controller '{controller}' is not available in {}: the kernel lacks it, version 1 of control groups uses \
         it, or the group above does not hand it down",
        .group.display()
    )]
    NoController {
        /// Its name.
        controller: String,
        /// Where it was looked for.
        group: PathBuf,
    },
    /// Landlock cannot be had.
    #[error(
        "Landlock is what confines a monitor without root, and {0}; run `cutover jail` as root instead, with --uid and --gid"
    )]
    NoLandlock(&'static str),
    /// The process that was to be confined said why it is not.
    #[error("{0}")]
    NotConfined(String),
    /// The process that was to be confined said nothing.
    #[error("the monitor's process has ended before it was confined")]
    Died,
    /// Whoever waits for the monitor has gone.
    #[error("the process that started the monitor has ended")]
    Abandoned,
}

impl Error {
    /// The whole of it, for another process.
    pub(crate) fn told(&self) -> String {
        match self.source() {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }

    /// The error of a step that takes `needs`.
    pub(crate) fn step<E: Into<io::Error>>(action: &'static str, needs: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Step {
            action,
            needs,
            source: error.into(),
        }
    }

    /// The error of a step that concerns the file at `path`.
    pub(crate) fn file<E: Into<io::Error>>(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |error| Self::File {
            action,
            path,
            source: error.into(),
        }
    }
}
