//! [`Shelf`]: snapshots of guests, and guests made of them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::environment::scratch;
use crate::{Answer, Api, ManagedVm, Monitor, Vm};

/// A directory of snapshots, on tmpfs, removed when dropped.
pub struct Shelf {
    directory: TempDir,
}

/// A guest to be made of a snapshot.
pub struct Restore {
    snapshot: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

impl Shelf {
    /// An empty one.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "each is a different one")]
    pub fn new() -> Self {
        Self { directory: scratch() }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where the snapshot called `name` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// Makes a complete snapshot with all disks, and returns the report of it.
    #[track_caller]
    pub fn full(&self, managed: &ManagedVm, name: &str) -> Value {
        self.ask(&managed.api, name, "full").success().json()
    }

    /// Makes a snapshot of what has changed since the last one, and returns the report of it.
    #[track_caller]
    pub fn incremental(&self, managed: &ManagedVm, name: &str) -> Value {
        self.ask(&managed.api, name, "incremental").success().json()
    }

    /// Asks for a snapshot of the given kind of the VM behind `api`.
    #[track_caller]
    pub fn ask(&self, api: &Api, name: &str, kind: &str) -> Answer {
        let body = json!({ "store": self.directory(), "name": name, "kind": kind });
        api.request("POST", "/v1/snapshots", Some(&body))
    }

    /// A guest to be made of the snapshot called `name`.
    pub fn restore(&self, name: &str) -> Restore {
        Restore::of(&self.path(name))
    }
}

impl Restore {
    /// A guest to be made of `snapshot`.
    pub fn of(snapshot: &Path) -> Self {
        Self {
            snapshot: snapshot.to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Adds arguments of `cutover snapshot restore`.
    pub fn arguments<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
        self.arguments.extend(arguments);
        self
    }

    /// Adds variables to the monitor's environment.
    pub fn environment<S: AsRef<OsStr>>(mut self, variables: impl IntoIterator<Item = (S, S)>) -> Self {
        let variables = variables.into_iter();
        let variables = variables.map(|(name, value)| (name.as_ref().to_owned(), value.as_ref().to_owned()));
        self.environment.extend(variables);
        self
    }

    /// Starts the monitor, and waits for its API alone.
    #[track_caller]
    pub fn start(&self) -> ManagedVm {
        let directory = scratch();
        let api = Api::new(&directory.path().join("api"));
        let mut command = Monitor::command();
        command.args(["snapshot", "restore"]).arg(&self.snapshot);
        command.args(&self.arguments).arg("--api-sock").arg(api.socket());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let vm = Vm::start_restored(command);
        api.wait_ready();
        ManagedVm::new(vm, api, directory)
    }
}
