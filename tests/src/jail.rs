//! [`Jail`]: where a monitor runs with least privilege, as a test sees it from outside.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::environment::scratch;
use crate::{Api, Monitor};

/// A jail of root's, with a name, a user, and a network namespace of its own; gone when dropped.
pub struct Jail {
    base: TempDir,
    name: String,
    namespace: String,
    options: Vec<OsString>,
}

/// User and group of the monitors in jails, who have nothing else on this machine.
const USER: u32 = 61_234;

/// The host's end of each tap: a guest that is restored in another jail knows it already.
const MAC: &str = "02:00:00:00:00:01";

impl Jail {
    /// Where its monitor listens, in its own words.
    pub const SOCKET: &str = "/run/api.sock";

    /// One called `name`, whose network namespace has a tap called `tap`, at the host's end of which is `address`.
    #[track_caller]
    pub fn new(name: &str, tap: &str, address: &str) -> Self {
        let base = scratch();
        let namespace = format!("ct{}{name}", std::process::id());
        let user = USER.to_string();
        crate::network::ip(&["netns", "add", &namespace]);
        let jail = Self {
            options: vec![
                "--id".into(),
                name.into(),
                "--uid".into(),
                user.clone().into(),
                "--gid".into(),
                user.clone().into(),
                "--chroot".into(),
                base.path().into(),
                "--netns".into(),
                format!("/run/netns/{namespace}").into(),
            ],
            base,
            name: name.to_owned(),
            namespace,
        };
        for line in [
            &["tuntap", "add", tap, "mode", "tap", "vnet_hdr", "user", &user][..],
            &["address", "add", address, "dev", tap],
            &["link", "set", tap, "address", MAC, "up"],
        ] {
            crate::network::ip(&[&["-n", &jail.namespace], line].concat());
        }
        jail
    }

    /// Adds options of `cutover jail`.
    pub fn with<'a>(mut self, options: impl IntoIterator<Item = &'a str>) -> Self {
        self.options.extend(options.into_iter().map(OsString::from));
        self
    }

    /// Gives the monitor `path`, at `at` in the jail; to change it or only to read.
    #[track_caller]
    pub fn given(mut self, path: &Path, at: &str, may_write: bool) -> Self {
        if may_write {
            chown(path, Some(USER), Some(USER)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        let readonly = if may_write { "" } else { ",readonly" };
        let file = format!("path={},at={at}{readonly}", path.display());
        self.options.extend(["--file".into(), file.into()]);
        self
    }

    /// All its options.
    pub fn options(&self) -> &[OsString] {
        &self.options
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        self.base.path().join(&self.name)
    }

    /// The network namespace, as the kernel calls it.
    #[track_caller]
    pub fn network(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(format!("/run/netns/{}", self.namespace))
            .expect("it was made")
            .ino()
    }

    /// The API of the monitor in there.
    pub fn api(&self) -> Api {
        Api::new(&self.folder().join("root").join(Self::SOCKET.trim_start_matches('/')))
    }

    /// The folder in `/proc` of the process in the jail that `keeper` waits for.
    #[track_caller]
    pub fn monitor(keeper: &Monitor) -> PathBuf {
        let children = keeper.proc(format!("task/{}/children", keeper.pid()));
        let children = fs::read_to_string(children).expect("the process runs");
        let [child] = children.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("a keeper has one child, not '{children}'")
        };
        Path::new("/proc").join(child)
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        crate::network::ip(&["netns", "delete", &self.namespace]);
    }
}
