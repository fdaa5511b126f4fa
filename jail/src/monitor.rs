//! A jail, and how a monitor gets into it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Access as May, Mode, OFlags, access, open};
use rustix::process::{Signal, geteuid, set_parent_process_death_signal, umask};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::cgroup::Cgroup;
use crate::files::check_places;
use crate::folder::Folder;
use crate::root::Root;
use crate::{Access, CgroupSettings, Ended, Error, Limits, SharedFile, Teller, keeper, privileges};

/// What of the modes of new files nobody gets: what others could write.
const UMASK: Mode = Mode::from_raw_mode(0o022);

/// Who a monitor is, instead of root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl User {
    /// The user `uid` in the group `gid` and no other.
    ///
    /// # Errors
    /// One of the two is root's, or that which stands for nobody.
    pub fn new(uid: u32, gid: u32) -> Result<Self, Error> {
        match [uid, gid].into_iter().find(|id| [0, u32::MAX].contains(id)) {
            Some(id) => Err(Error::Id(id)),
            None => Ok(Self { uid, gid }),
        }
    }
}

/// A jail that root makes for one monitor.
#[derive(Clone, Debug)]
pub struct Jail {
    /// Its name, also that of its folder and of its control group.
    pub id: String,
    /// The folder it has its own in.
    pub base: PathBuf,
    /// Who the monitor is in there.
    pub user: User,
    /// The network namespace it is in, a file; without one it has no network.
    pub network: Option<PathBuf>,
    /// Files of the host that it is given.
    pub files: Vec<SharedFile>,
    /// Its resource limits.
    pub limits: Limits,
    /// Its control group.
    pub cgroup: Option<CgroupSettings>,
}

impl Jail {
    /// Runs `program` in the jail, in a process of its own, and returns when that has ended and the jail is removed. With
    /// `started`, which is told as soon as the jail is made, it goes on without the standard streams.
    ///
    /// # Errors
    /// The jail could not be made.
    pub fn run(&self, started: Option<Teller>, program: impl FnOnce() -> u8) -> Result<Ended, Error> {
        let made = self.make();
        match (made, started) {
            (Ok((folder, cgroup)), started) => {
                let confine = |keeper: &OwnedFd| self.confine(&folder, cgroup.as_ref(), keeper);
                keeper::keep(started, confine, program)
            }
            (Err(error), None) => Err(error),
            (Err(error), Some(started)) => {
                let outcome = Err(error);
                started.tell(&outcome);
                outcome.map(|()| Ended::Exited(0))
            }
        }
    }

    /// Makes what of the jail others can see, and what is removed in the end.
    fn make(&self) -> Result<(Folder, Option<Cgroup>), Error> {
        if !geteuid().is_root() {
            return Err(Error::step("make a jail", "root")(rustix::io::Errno::PERM));
        }
        check_places(&self.files)?;
        let folder = Folder::make(&self.base, &self.id, self.user)?;
        let cgroup = self.cgroup.as_ref();
        let cgroup = cgroup.map(|settings| Cgroup::make(settings, &self.id)).transpose()?;
        Ok((folder, cgroup))
    }

    /// Confines this process, one step after the other; what a step takes from it, the steps before may still need.
    fn confine(&self, folder: &Folder, cgroup: Option<&Cgroup>, keeper: &OwnedFd) -> Result<(), Error> {
        umask(UMASK);
        if let Some(cgroup) = cgroup {
            cgroup.join()?;
        }
        self.enter_network()?;
        enter_namespaces()?;
        Root::build(folder, self.user, &self.files)?.enter()?;
        self.limits.apply()?;
        privileges::become_user(self.user)?;
        end_with(keeper)?;
        self.check_files()
    }

    /// The network namespace that is wanted, or one with nothing in it.
    fn enter_network(&self) -> Result<(), Error> {
        let Some(path) = &self.network else {
            return new_namespaces(UnshareFlags::NEWNET);
        };
        let namespace = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(Error::file("open the network namespace", path))?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(Error::file("enter the network namespace", path))
    }

    /// Checks that the user may use what the jail was given, before the monitor says so in other words.
    fn check_files(&self) -> Result<(), Error> {
        for file in &self.files {
            let (may, what) = match file.access {
                Access::Read => (May::READ_OK, "read"),
                Access::Write => (May::READ_OK | May::WRITE_OK, "read and write"),
            };
            access(&file.at, may).map_err(|_| Error::NotAllowed {
                path: file.path.clone(),
                uid: self.user.uid,
                gid: self.user.gid,
                access: what,
            })?;
        }
        Ok(())
    }
}

/// Mounts, host name, System V IPC and control groups of its own; its processes it has to itself since it was started.
fn enter_namespaces() -> Result<(), Error> {
    let own = UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC | UnshareFlags::NEWCGROUP;
    new_namespaces(own)
}

fn new_namespaces(which: UnshareFlags) -> Result<(), Error> {
    // SAFETY: descriptors stay shared.
    unsafe { unshare_unsafe(which) }.map_err(Error::step("make namespaces", "CAP_SYS_ADMIN"))
}

/// Has this process killed when its keeper ends, who alone could remove the jail.
fn end_with(keeper: &OwnedFd) -> Result<(), Error> {
    // Changing users takes this back, so that it comes after; what has ended before that is seen here.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Error::step("follow the keeper", "Linux"))?;
    if keeper::has_ended(keeper)? {
        return Err(Error::Abandoned);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_root_in_a_jail() {
        assert!(User::new(3000, 3000).is_ok());
        // The last one means "as before" to the kernel.
        for (uid, gid) in [(0, 3000), (3000, 0), (u32::MAX, 3000), (3000, u32::MAX)] {
            assert!(matches!(User::new(uid, gid), Err(Error::Id(_))), "{uid} {gid}");
        }
    }
}
