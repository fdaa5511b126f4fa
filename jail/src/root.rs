//! The root of a jail: an empty file system of its own, with little in it.
//!
//! ```text
//!  /                 memory, read-only, nothing in it can be executed
//!   ├ dev/kvm, dev/net/tun, dev/userfaultfd     the monitor's
//!   ├ proc           of the monitor's own process, read-only
//!   ├ run            BASE/ID/root/run on the host
//!   └ …              each file that is given
//! ```
//! It lies in a folder of that file system, not at its top: where a process's root is not that of its mount namespace, the
//! kernel makes it no user namespace (user_namespaces(7)), in which it would have capabilities again.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatVfsMountFlags, chownat, fstat, fstatvfs, mknodat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, mount_remount, move_mount,
    open_tree, unmount,
};
use rustix::process::{Gid, Uid, chdir, chroot, fchdir, pivot_root};

use crate::files::names;
use crate::folder::{Folder, make_folder};
use crate::{Access, Error, SharedFile, User};

/// What monitors use.
const DEVICES: [&str; 3] = [NEEDED, "/dev/net/tun", "/dev/userfaultfd"];
/// What they cannot do without.
const NEEDED: &str = "/dev/kvm";
/// The folder of the file system that is the root of the jail.
const JAIL: &str = "jail";
/// Room for folders, device nodes and what files are mounted over.
const SIZE: &str = "1m";

/// What it takes to mount something, in errors.
const MOUNTING: &str = "CAP_SYS_ADMIN and Linux 5.8";

/// The root of a jail, which nobody is in yet.
pub(crate) struct Root {
    /// The top of the file system.
    top: OwnedFd,
    /// The folder in it.
    jail: OwnedFd,
}

impl Root {
    /// Builds it over the root of `folder`, in the mount namespace of the caller, which is its own.
    pub(crate) fn build(folder: &Folder, user: User, files: &[SharedFile]) -> Result<Self, Error> {
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .map_err(Error::step("keep mounts to the jail", MOUNTING))?;
        // Once the new file system is over it, this can no longer be found.
        let run = clone_of(&folder.run()?, Path::new(""))?;
        let top = new_file_system("tmpfs", &[("size", SIZE), ("mode", "755")], MountAttrFlags::empty())?;
        attach(&top, &folder.root()?)?;
        let jail = make_folder(&top, Path::new(JAIL), Path::new(JAIL))?;
        let root = Self { top, jail };
        for device in DEVICES {
            root.add_device(Path::new(device), user)?;
        }
        root.add_tree(&run, Path::new("/run"), true, MountFlags::NODEV)?;
        root.add_proc()?;
        for file in files {
            root.add_file(file)?;
        }
        restrict(&root.top, MountFlags::RDONLY)?;
        Ok(root)
    }

    /// Makes it the root of this process, and has the host's go.
    pub(crate) fn enter(self) -> Result<(), Error> {
        fchdir(&self.top)
            .and_then(|()| pivot_root(".", "."))
            .and_then(|()| unmount(".", UnmountFlags::DETACH))
            .and_then(|()| chroot(JAIL))
            .and_then(|()| chdir("/"))
            .map_err(Error::step(
                "enter the root of the jail",
                "CAP_SYS_ADMIN and CAP_SYS_CHROOT",
            ))
    }

    /// A node for the host's `device`, if it has one, for `user` alone.
    fn add_device(&self, device: &Path, user: User) -> Result<(), Error> {
        let failed = || Error::file::<io::Error>("make a node for the device", device);
        let facts = match fs::metadata(device) {
            // Some VMs need no network, and kernels before 6.1 have no such device.
            Err(error) if error.kind() == io::ErrorKind::NotFound && device != Path::new(NEEDED) => return Ok(()),
            facts => facts.map_err(failed())?,
        };
        let (parent, name) = self.parent_of(device)?;
        mknodat(
            &parent,
            name,
            FileType::CharacterDevice,
            Mode::RUSR | Mode::WUSR,
            facts.rdev(),
        )
        .and_then(|()| {
            let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
            chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        })
        .map_err(|error| failed()(error.into()))
    }

    /// What the kernel tells a monitor about itself, and nothing of anybody else.
    fn add_proc(&self) -> Result<(), Error> {
        let proc = new_file_system("proc", &[("subset", "pid")], MountAttrFlags::MOUNT_ATTR_RDONLY)?;
        attach(&proc, &self.point(Path::new("/proc"), true)?)
    }

    /// A file of the host.
    fn add_file(&self, file: &SharedFile) -> Result<(), Error> {
        // What is looked at is what is given, whatever becomes of the path.
        let tree = clone_of(&CWD, &file.path)?;
        let look = || Ok((fstat(&tree)?.st_mode, fstatvfs(&tree)?.f_flag));
        let (mode, mounted) = look().map_err(Error::file::<rustix::io::Errno>("look at", &file.path))?;
        let kind = FileType::from_raw_mode(mode);
        let mut flags = MountFlags::empty();
        // What is read-only on the host stays so.
        let is_read_only = mounted.contains(StatVfsMountFlags::RDONLY) || file.access == Access::Read;
        flags.set(MountFlags::RDONLY, is_read_only);
        flags.set(MountFlags::NODEV, !kind.is_block_device() && !kind.is_char_device());
        self.add_tree(&tree, &file.at, kind.is_dir(), flags)
    }

    /// Mounts `tree` at `at`, which is made for it.
    fn add_tree(&self, tree: &OwnedFd, at: &Path, is_folder: bool, flags: MountFlags) -> Result<(), Error> {
        attach(tree, &self.point(at, is_folder)?)?;
        restrict(tree, flags)
    }

    /// Makes something that can be mounted over at `at`.
    fn point(&self, at: &Path, is_folder: bool) -> Result<OwnedFd, Error> {
        let (parent, name) = self.parent_of(at)?;
        if is_folder {
            return make_folder(&parent, name, at);
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&parent, name, flags, Mode::empty()).map_err(Error::file("make room in the jail for", at))
    }

    /// The folder that `at` is in, made with all above it, and what `at` is called in there.
    fn parent_of<'a>(&self, at: &'a Path) -> Result<(OwnedFd, &'a Path), Error> {
        let failed = || Error::file::<io::Error>("make room in the jail for", at);
        let mut folder = self.jail.try_clone().map_err(failed())?;
        let mut path = PathBuf::from("/");
        let mut components = names(at.strip_prefix("/").unwrap_or(at)).unwrap_or_default();
        let name = components
            .pop()
            .ok_or_else(|| failed()(io::ErrorKind::InvalidInput.into()))?;
        for name in components {
            path.push(name);
            folder = make_folder(&folder, name, &path)?;
        }
        Ok((folder, name))
    }
}

/// A new file system of `kind`, mounted nowhere yet, with nothing to be executed in it.
fn new_file_system(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<OwnedFd, Error> {
    let attributes = attributes | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let make = || {
        let file_system = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in options {
            fsconfig_set_string(&file_system, *key, *value)?;
        }
        fsconfig_create(&file_system)?;
        fsmount(&file_system, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().map_err(Error::file("mount a file system for the jail,", kind))
}

/// What is at `path` in `folder`, to be mounted elsewhere, too.
fn clone_of(folder: &impl rustix::fd::AsFd, path: &Path) -> Result<OwnedFd, Error> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(folder, path, flags).map_err(Error::file("give the jail", path))
}

/// Mounts `tree` over `point`.
fn attach(tree: &OwnedFd, point: &OwnedFd) -> Result<(), Error> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", point, "", flags).map_err(Error::step("mount something in the jail", MOUNTING))
}

/// Has nothing executed from `tree`, which is mounted, and what else `flags` say.
fn restrict(tree: &OwnedFd, flags: MountFlags) -> Result<(), Error> {
    let flags = flags | MountFlags::BIND | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_remount(format!("/proc/self/fd/{}", tree.as_raw_fd()), flags, "")
        .map_err(Error::step("restrict what is mounted in the jail", MOUNTING))
}
