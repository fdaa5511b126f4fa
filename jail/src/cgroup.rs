//! A control group for one monitor (Linux admin-guide/cgroup-v2): `PARENT/ID` below the root of the hierarchy.
//!
//! Limits are files of the kernel, `memory.max`, `cpu.max`, `pids.max` and so on. The part before the dot is the controller,
//! which each group from the root on has to hand down to those below.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::Error;
use crate::files::{check_name, names};

const MOUNTS: &str = "/proc/self/mountinfo";

/// The group of a monitor, and its limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupSettings {
    /// The group that it is made in, by its path below the root; made if it is not there.
    pub parent: PathBuf,
    /// Its limits.
    pub settings: Vec<Setting>,
}

/// What is written to one file of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    file: String,
    value: String,
}

impl Setting {
    fn controller(&self) -> &str {
        self.file
            .split_once('.')
            .map_or(&self.file, |(controller, _)| controller)
    }
}

impl FromStr for Setting {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str =
            "write FILE=VALUE, where FILE is one of a controller's: memory.max=1G, cpu.max='50000 100000'";
        let (file, value) = text.split_once('=').ok_or(FORM)?;
        let (controller, rest) = file.split_once('.').ok_or(FORM)?;
        let is_word = |text: &str| {
            let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            !text.is_empty() && text.bytes().all(is_allowed)
        };
        // Those of `cgroup` are about processes and groups, and no limits.
        if is_word(controller) && is_word(rest) && controller != "cgroup" && !value.is_empty() {
            Ok(Self {
                file: file.to_owned(),
                value: value.to_owned(),
            })
        } else {
            Err(FORM)
        }
    }
}

/// The group of one monitor; removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the group of the jail `id`.
    pub(crate) fn make(spec: &CgroupSettings, id: &str) -> Result<Self, Error> {
        let name = check_name(id)?;
        let parents = names(&spec.parent).ok_or_else(|| Error::Name(spec.parent.display().to_string()))?;
        let controllers: BTreeSet<_> = spec.settings.iter().map(Setting::controller).collect();
        let mut path =
            mount_point(&fs::read_to_string(MOUNTS).map_err(Error::file("read", MOUNTS))?).ok_or(Error::NoCgroups)?;
        hand_down(&path, &controllers)?;
        for parent in parents {
            path.push(parent);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::file("make the control group", path)(error));
                }
                _ => hand_down(&path, &controllers)?,
            }
        }
        path.push(name);
        // One that is left of a killed keeper has no processes, and can be removed.
        let _ = fs::remove_dir(&path);
        fs::create_dir(&path).map_err(Error::file("make the control group", &path))?;
        let group = Self { path };
        for setting in &spec.settings {
            write(&group.path.join(&setting.file), &setting.value)?;
        }
        Ok(group)
    }

    /// Has the calling process in it.
    pub(crate) fn join(&self) -> Result<(), Error> {
        write(&self.path.join("cgroup.procs"), "0")
    }
}

impl Drop for Cgroup {
    /// It has no processes any more, or the user will find it.
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// Has the group at `path` hand `controllers` down to those below.
fn hand_down(path: &Path, controllers: &BTreeSet<&str>) -> Result<(), Error> {
    let words = |file: &str| {
        let path = path.join(file);
        fs::read_to_string(&path).map_err(Error::file("read", path))
    };
    let (available, handed_down) = (words("cgroup.controllers")?, words("cgroup.subtree_control")?);
    for controller in controllers {
        if !available.split_whitespace().any(|word| word == *controller) {
            return Err(Error::NoController {
                controller: (*controller).to_owned(),
                group: path.to_owned(),
            });
        }
        if !handed_down.split_whitespace().any(|word| word == *controller) {
            write(&path.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> Result<(), Error> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(Error::file("set the limit", path))
}

/// Where the hierarchy is mounted, by what `/proc/PID/mountinfo` says (proc_pid_mountinfo(5)).
fn mount_point(mounts: &str) -> Option<PathBuf> {
    /// The fields before the mount point are the mount, its parent, the device, and the root within it.
    const POINT: usize = 4;
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_one = file_system.split(' ').next() == Some("cgroup2");
        is_one.then(|| mount.split(' ').nth(POINT).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_files_of_controllers() {
        let setting: Setting = "cpu.max=50000 100000".parse().unwrap();
        assert_eq!((setting.controller(), &*setting.value), ("cpu", "50000 100000"));
        for text in [
            "memory.max",
            "memory.max=",
            "memory=1G",
            "../memory.max=1G",
            "memory./max=1G",
            ".max=1",
            "cgroup.procs=1",
        ] {
            assert!(text.parse::<Setting>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_hierarchy_is_found_where_it_is_mounted() {
        let mounts = "25 1 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - tmpfs tmpfs rw\n\
                      26 25 0:23 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      27 25 0:24 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("25 1 0:22 / / rw - ext4 /dev/vda rw\n"), None);
    }
}
