//! Where the API sockets of named VMs are: one directory per user, one socket per VM.
//!
//! ```text
//!  $XDG_RUNTIME_DIR/cutover/    0700; for root, or without that variable: /run/cutover
//!    web.sock                   0600; `cutover run --name web --api` or `cutover vmm --id web` listens here
//! ```
//!
//! A VM that is killed leaves its socket behind. Whoever takes its name replaces the file, and whoever lists the
//! directory removes it. Both hold the directory's lock meanwhile, so that nobody removes what another just made.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use cutover_devices::listener::{self, ListenError, Listener};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};
use rustix::io::Errno;
use rustix::process::geteuid;

/// Most characters of a VM's name in the runtime directory.
pub const NAME_MAX: usize = 64;
/// Most VMs the directory is listed with; a user with more of them has to tell their sockets by path.
pub const VMS_MAX: usize = 4096;
/// Clients that may wait until the API accepts them.
pub const CLIENTS_WAITING_MAX: i32 = 64;

/// What a socket's file name ends with.
const SUFFIX: &str = ".sock";
/// Where a coordinator of groups listens; no VM's name ends with nothing.
const COORDINATOR: &str = "coordinator";
/// Names the directory itself, for systems that keep theirs elsewhere.
const DIRECTORY_VARIABLE: &str = "CUTOVER_RUNTIME_DIR";
/// The directory of root, and of users without one of their own.
const SYSTEM_DIRECTORY: &str = "/run/cutover";
/// Permission bits of others than the owner.
const MODE_OTHERS: u32 = 0o077;

/// Why the runtime directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// It cannot be made, opened, locked or read.
    #[error("cannot use the runtime directory {}", .path.display())]
    Os {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could put sockets there and be taken for a VM.
    #[error(
        "the runtime directory {} is not for this user only: remove it, or give it to this user with mode 0700",
        .path.display()
    )]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
    /// A VM of that name runs.
    #[error("a VM named {name} runs already: choose another name, or end it with `cutover vm destroy {name}`")]
    NameInUse {
        /// The name.
        name: VmName,
    },
    /// The socket cannot be made.
    #[error(transparent)]
    Listen(ListenError),
}

/// A VM's name where it is a file name too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmName(String);

/// Not a [`VmName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a VM's name: it has 1 to {NAME_MAX} letters, digits, '-', '_' or '.', the first a letter or digit"
)]
pub struct NameError(String);

impl FromStr for VmName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let begins_well = text.starts_with(|first: char| first.is_ascii_alphanumeric());
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if begins_well && text.len() <= NAME_MAX && text.bytes().all(is_allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.to_owned()))
        }
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&self.0)
    }
}

/// The runtime directory of this user, which need not exist yet.
#[derive(Clone, Debug)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// The directory this process's environment says.
    pub fn locate() -> Self {
        Self::at(locate(|name| env::var_os(name), geteuid().is_root()))
    }

    /// The directory at `path`.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the VM called `name` listens.
    pub fn socket(&self, name: &VmName) -> PathBuf {
        self.path.join(format!("{name}{SUFFIX}"))
    }

    /// Listens for clients of the VM called `name`; the directory is made if there is none.
    ///
    /// # Errors
    /// The name is taken, or the directory or the socket cannot be had.
    pub fn listen(&self, name: &VmName) -> Result<Listener, RuntimeDirError> {
        self.make()?;
        let _lock = self.lock()?;
        Listener::bind(&self.socket(name), CLIENTS_WAITING_MAX).map_err(|error| match error {
            ListenError::InUse { .. } => RuntimeDirError::NameInUse { name: name.clone() },
            error => RuntimeDirError::Listen(error),
        })
    }

    /// Where the coordinator of groups listens, if it is one of this user.
    pub fn coordinator(&self) -> PathBuf {
        self.path.join(COORDINATOR)
    }

    /// Listens for clients of the coordinator of groups; the directory is made if there is none.
    ///
    /// # Errors
    /// There is one already, or the directory or the socket cannot be had.
    pub fn listen_as_coordinator(&self) -> Result<Listener, RuntimeDirError> {
        self.make()?;
        let _lock = self.lock()?;
        Listener::bind(&self.coordinator(), CLIENTS_WAITING_MAX).map_err(RuntimeDirError::Listen)
    }

    /// The VMs that listen, in the order of their names and at most [`VMS_MAX`]; what dead ones left is removed.
    ///
    /// # Errors
    /// The directory cannot be used. One that does not exist has no VMs.
    pub fn vms(&self) -> Result<Vec<(VmName, PathBuf)>, RuntimeDirError> {
        let _lock = match self.lock() {
            Err(RuntimeDirError::Os { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(Vec::new());
            }
            lock => lock?,
        };
        let mut vms = Vec::new();
        for entry in fs::read_dir(&self.path)
            .map_err(|error| self.failed(error))?
            .take(VMS_MAX)
        {
            let file = entry.map_err(|error| self.failed(error))?.file_name();
            let Some(name) = vm_of(&file) else { continue };
            let path = self.socket(&name);
            match listener::remove_stale(&path) {
                Err(ListenError::InUse { .. }) => vms.push((name, path)),
                Ok(()) => tracing::debug!(%name, "the socket of a VM that is gone has been removed"),
                Err(error) => tracing::warn!(%name, %error, "not the socket of a VM"),
            }
        }
        vms.sort();
        Ok(vms)
    }

    fn make(&self) -> Result<(), RuntimeDirError> {
        match DirBuilder::new().mode(0o700).create(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(self.failed(error)),
            _ => Ok(()),
        }
    }

    /// Whoever holds it is alone in adding and removing sockets; dropping it gives it back.
    fn lock(&self) -> Result<OwnedFd, RuntimeDirError> {
        let failed = |error: Errno| self.failed(error.into());
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = open(&self.path, flags, Mode::empty()).map_err(failed)?;
        let facts = fstat(&directory).map_err(failed)?;
        if facts.st_uid != geteuid().as_raw() || facts.st_mode & MODE_OTHERS != 0 {
            return Err(RuntimeDirError::NotPrivate {
                path: self.path.clone(),
            });
        }
        flock(&directory, FlockOperation::LockExclusive).map_err(failed)?;
        Ok(directory)
    }

    fn failed(&self, source: io::Error) -> RuntimeDirError {
        RuntimeDirError::Os {
            path: self.path.clone(),
            source,
        }
    }
}

fn locate(variable: impl Fn(&str) -> Option<OsString>, is_root: bool) -> PathBuf {
    let given = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = given(DIRECTORY_VARIABLE) {
        return path;
    }
    match given("XDG_RUNTIME_DIR") {
        Some(path) if !is_root => path.join("cutover"),
        _ => SYSTEM_DIRECTORY.into(),
    }
}

fn vm_of(file_name: &std::ffi::OsStr) -> Option<VmName> {
    file_name.to_str()?.strip_suffix(SUFFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn name(text: &str) -> VmName {
        text.parse().expect(text)
    }

    /// A runtime directory that does not exist yet, in a folder that goes away with the first value.
    fn fresh() -> (tempfile::TempDir, RuntimeDir) {
        let folder = tempfile::tempdir().expect("folder");
        let directory = RuntimeDir::at(folder.path().join("cutover"));
        (folder, directory)
    }

    fn names(directory: &RuntimeDir) -> Vec<String> {
        let vms = directory.vms().expect("usable");
        vms.into_iter().map(|(name, _)| name.to_string()).collect()
    }

    #[test]
    fn users_have_their_own_directory_and_root_has_that_of_the_system() {
        let set = |values: &'static [(&str, &str)]| {
            move |name: &str| {
                let (_, value) = values.iter().find(|(variable, _)| *variable == name)?;
                Some(OsString::from(value))
            }
        };
        let user = set(&[("XDG_RUNTIME_DIR", "/run/user/1000")]);
        assert_eq!(locate(user, false), Path::new("/run/user/1000/cutover"));
        assert_eq!(locate(user, true), Path::new("/run/cutover"));
        assert_eq!(locate(set(&[]), false), Path::new("/run/cutover"));
        assert_eq!(
            locate(set(&[("XDG_RUNTIME_DIR", "")]), false),
            Path::new("/run/cutover")
        );
        let chosen = set(&[("CUTOVER_RUNTIME_DIR", "/srv/vms"), ("XDG_RUNTIME_DIR", "/run/user/0")]);
        assert_eq!(locate(chosen, true), Path::new("/srv/vms"));
    }

    #[test]
    fn only_what_can_be_no_path_and_no_option_is_a_name() {
        for text in ["web", "0", "db-1.eu_west", &"x".repeat(64)] {
            assert_eq!(name(text).to_string(), text);
        }
        for text in ["", ".", "..", "-rf", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert_eq!(text.parse::<VmName>(), Err(NameError(text.to_owned())));
        }
    }

    #[test]
    fn a_vm_is_listed_while_it_listens() {
        let (_folder, directory) = fresh();
        assert_eq!(names(&directory), [""; 0]);
        let web = directory.listen(&name("web")).expect("free");
        let _db = directory.listen(&name("db")).expect("free");
        assert_eq!(names(&directory), ["db", "web"]);
        assert_eq!(web.path(), directory.socket(&name("web")));
        drop(web);
        assert_eq!(names(&directory), ["db"]);
    }

    #[test]
    fn a_new_directory_is_for_its_owner_only() {
        let (_folder, directory) = fresh();
        let _vm = directory.listen(&name("web")).expect("free");
        let mode = fs::metadata(directory.path()).expect("made").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn the_name_of_a_running_vm_is_taken_and_that_of_a_dead_one_is_free() {
        let (_folder, directory) = fresh();
        let _vm = directory.listen(&name("web")).expect("free");
        let error = directory.listen(&name("web")).expect_err("taken");
        assert_eq!(
            error.to_string(),
            "a VM named web runs already: choose another name, or end it with `cutover vm destroy web`"
        );
        drop(UnixListener::bind(directory.socket(&name("dead"))).expect("std leaves the file behind"));
        let _successor = directory.listen(&name("dead")).expect("free");
        UnixStream::connect(directory.socket(&name("dead"))).expect("the successor");
    }

    #[test]
    fn listing_removes_what_dead_vms_left_and_nothing_else() {
        let (_folder, directory) = fresh();
        let _vm = directory.listen(&name("web")).expect("free");
        drop(UnixListener::bind(directory.socket(&name("dead"))).expect("std leaves the file behind"));
        fs::write(directory.path().join("notes.sock"), "precious").expect("write");
        fs::write(directory.path().join("notes.txt"), "precious").expect("write");
        assert_eq!(names(&directory), ["web"]);
        assert!(!directory.socket(&name("dead")).exists());
        assert!(directory.path().join("notes.sock").exists() && directory.path().join("notes.txt").exists());
    }

    #[test]
    fn a_directory_that_others_can_use_is_refused() {
        let (_folder, directory) = fresh();
        fs::create_dir(directory.path()).expect("make");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("open it up");
        for result in [directory.vms().map(drop), directory.listen(&name("web")).map(drop)] {
            assert!(matches!(result, Err(RuntimeDirError::NotPrivate { .. })));
        }
    }
}
