//! A jail's folder on the host: `BASE/ID/root`, where the root of the jail is mounted, with what the monitor may write.
//!
//! ```text
//!  BASE            root's, writable by nobody else, as all above it
//!   └ ID           root's; locked while the monitor runs
//!      └ root      root's; under the jail's own root, where only its monitor sees that
//!         └ run    the monitor's: sockets, and what else it writes; /run in the jail
//! ```
//! What the monitor wrote stays, all else goes with it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, ResolveFlags, fchmod, fchown, flock, fstat, mkdirat,
    openat, openat2, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};

use crate::files::check_name;
use crate::{Error, User};

/// Entries of `run` that are looked at for sockets that nobody listens at any more.
const ENTRIES_MAX: usize = 1024;
const ROOT: &str = "root";
const RUN: &str = "run";
/// What others than the owner may write, and what keeps them from renaming in a folder what is not theirs.
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;
/// Root's folders, and that of the monitor.
const FOLDER: Mode = Mode::from_raw_mode(0o755);
const RUN_FOLDER: Mode = Mode::from_raw_mode(0o700);

/// The folder of a jail, locked. What of it is empty is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Folder {
    /// `BASE/ID/root`, without links.
    path: PathBuf,
    id: PathBuf,
    base: OwnedFd,
    jail: OwnedFd,
    root: OwnedFd,
    run: OwnedFd,
}

impl Folder {
    /// Makes the folder of the jail `id` in `base`, or takes the one that is left of an earlier run; `run` is for `user`.
    pub(crate) fn make(base: &Path, id: &str, user: User) -> Result<Self, Error> {
        let name = check_name(id)?;
        let (base, real) = open_base(base)?;
        let path = real.join(name);
        let jail = make_folder(&base, name, &path)?;
        match flock(&jail, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::InUse {
                    id: id.to_owned(),
                    folder: path,
                });
            }
            Err(error) => return Err(Error::file("lock", path)(error)),
        }
        let path = path.join(ROOT);
        let root = make_folder(&jail, Path::new(ROOT), &path)?;
        let run = make_folder(&root, Path::new(RUN), &path.join(RUN))?;
        fchown(&run, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))
            .and_then(|()| fchmod(&run, RUN_FOLDER))
            .map_err(Error::file("give the monitor its folder", path.join(RUN)))?;
        Ok(Self {
            path,
            id: name.to_owned(),
            base,
            jail,
            root,
            run,
        })
    }

    /// The folder that the root of the jail is mounted over, in the mount namespace of the caller.
    pub(crate) fn root(&self) -> Result<OwnedFd, Error> {
        open_without_links(&self.path)
    }

    /// The folder that the monitor writes to, in the mount namespace of the caller.
    pub(crate) fn run(&self) -> Result<OwnedFd, Error> {
        open_without_links(&self.path.join(RUN))
    }

    /// Removes sockets of the monitor, which is gone.
    fn remove_sockets(&self) -> io::Result<()> {
        for entry in Dir::read_from(&self.run)?.take(ENTRIES_MAX) {
            let entry = entry?;
            if entry.file_type() == FileType::Socket {
                unlinkat(&self.run, entry.file_name(), AtFlags::empty())?;
            }
        }
        Ok(())
    }
}

impl Drop for Folder {
    /// A folder with something in it cannot be removed, and is not meant to be.
    fn drop(&mut self) {
        let _ = self.remove_sockets();
        let folders = [
            (&self.root, Path::new(RUN)),
            (&self.jail, Path::new(ROOT)),
            (&self.base, &self.id),
        ];
        for (parent, name) in folders {
            if unlinkat(parent, name, AtFlags::REMOVEDIR).is_err() {
                break;
            }
        }
    }
}

/// Opens the folder of jails, which is made if it is not there, with a look at all that is above it; where it really is, too.
fn open_base(base: &Path) -> Result<(OwnedFd, PathBuf), Error> {
    match std::fs::create_dir(base) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::file("make the folder of jails", base)(error));
        }
        _ => {}
    }
    // Links in the path itself are whoever gave it knows what; from here on there are none.
    let real = base
        .canonicalize()
        .map_err(Error::file("find the folder of jails", base))?;
    let mut at = PathBuf::new();
    let mut folder = None;
    for component in real.components() {
        let name = match component {
            Component::RootDir => Path::new("/"),
            other => Path::new(other.as_os_str()),
        };
        at.push(name);
        let opened = match &folder {
            None => openat(CWD, name, open_flags(), Mode::empty()),
            Some(parent) => openat(parent, name, open_flags(), Mode::empty()),
        };
        let opened = opened.map_err(Error::file("open", &at))?;
        let may_be_sticky = at != real;
        if !is_safe(&opened, may_be_sticky).map_err(Error::file("look at", &at))? {
            return Err(Error::BaseNotSafe {
                base: base.to_owned(),
                at,
            });
        }
        folder = Some(opened);
    }
    let folder = folder.ok_or_else(|| Error::file("open", base)(Errno::NOENT))?;
    Ok((folder, real))
}

/// Whether only root, or whoever runs this, can exchange what is in `folder`; in a sticky one, what they own.
fn is_safe(folder: &OwnedFd, may_be_sticky: bool) -> rustix::io::Result<bool> {
    let facts = fstat(folder)?;
    let is_closed = facts.st_mode & WRITABLE_BY_OTHERS == 0 || may_be_sticky && facts.st_mode & STICKY != 0;
    Ok(is_closed && (facts.st_uid == 0 || facts.st_uid == geteuid().as_raw()))
}

/// Makes the folder `name` in `parent`, or opens the one that is there; `path` is what to call it in errors.
pub(crate) fn make_folder(parent: &OwnedFd, name: &Path, path: &Path) -> Result<OwnedFd, Error> {
    match mkdirat(parent, name, FOLDER) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(Error::file("make the folder", path)(error)),
    }
    openat(parent, name, open_flags(), Mode::empty()).map_err(Error::file("open the folder", path))
}

/// Opens a folder that has no links on the way to it.
fn open_without_links(path: &Path) -> Result<OwnedFd, Error> {
    openat2(CWD, path, open_flags(), Mode::empty(), ResolveFlags::NO_SYMLINKS).map_err(Error::file("open", path))
}

/// What folders are opened with: links are not followed.
fn open_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Whoever runs the tests, who may give files to nobody else.
    fn this_user() -> User {
        User {
            uid: geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }

    fn base() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("folder");
        let base = folder.path().join("jails");
        (folder, base)
    }

    #[test]
    fn a_jail_that_wrote_nothing_leaves_nothing() {
        let (_outer, base) = base();
        let folder = Folder::make(&base, "web", this_user()).unwrap();
        let run = fs::metadata(base.join("web/root/run")).unwrap();
        assert_eq!((run.uid(), run.mode() & 0o7777), (this_user().uid, 0o700));
        drop(UnixListener::bind(base.join("web/root/run/api.sock")).expect("std leaves the file behind"));
        drop(folder);
        assert_eq!(fs::read_dir(&base).unwrap().count(), 0);
    }

    #[test]
    fn what_a_monitor_wrote_stays_and_is_there_the_next_time() {
        let (_outer, base) = base();
        let folder = Folder::make(&base, "web", this_user()).unwrap();
        fs::write(base.join("web/root/run/log"), "precious").unwrap();
        drop(folder);
        let _again = Folder::make(&base, "web", this_user()).unwrap();
        assert_eq!(fs::read_to_string(base.join("web/root/run/log")).unwrap(), "precious");
    }

    #[test]
    fn one_folder_is_for_one_monitor_at_a_time() {
        let (_outer, base) = base();
        let _first = Folder::make(&base, "web", this_user()).unwrap();
        let error = Folder::make(&base, "web", this_user()).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error}");
        Folder::make(&base, "db", this_user()).unwrap();
    }

    #[test]
    fn a_base_that_others_can_write_is_refused_wherever_that_is() {
        let (outer, base) = base();
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).unwrap();
        for (mode, at) in [(0o1777, &base), (0o775, &base)] {
            fs::set_permissions(at, fs::Permissions::from_mode(mode)).unwrap();
            let error = Folder::make(&base, "web", this_user()).unwrap_err().to_string();
            assert!(error.contains("writable by others"), "{error}");
        }
        fs::set_permissions(&base, fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(outer.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Folder::make(&base, "web", this_user()).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{} is writable by others", outer.path().display())),
            "{error}"
        );
    }

    #[test]
    fn links_in_the_folder_lead_nowhere() {
        let (outer, base) = base();
        let elsewhere = outer.path().join("elsewhere");
        fs::create_dir_all(&elsewhere).unwrap();
        for link in ["web", "db/root", "mail/root/run"] {
            let link = base.join(link);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(&elsewhere, link).unwrap();
        }
        for id in ["web", "db", "mail"] {
            let error = Folder::make(&base, id, this_user()).unwrap_err().to_string();
            assert!(error.starts_with("cannot open the folder"), "{error}");
        }
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
        for id in ["..", "a/b", ""] {
            assert!(
                matches!(Folder::make(&base, id, this_user()), Err(Error::Name(_))),
                "{id}"
            );
        }
    }
}
