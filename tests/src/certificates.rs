//! [`Authority`]: who is whom to monitors that migrate over TLS.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::Exit;
use crate::cli::cutover;

/// An authority, and the certificates of hosts, each in a directory as `--tls-dir` takes it; all removed when dropped.
pub struct Authority {
    directory: TempDir,
    first: PathBuf,
}

impl Authority {
    /// One of its own below `parent`, with a certificate for `host`.
    #[track_caller]
    pub fn new(parent: &Path, host: &str) -> Self {
        let directory = TempDir::new_in(parent).unwrap_or_else(|error| panic!("{}: {error}", parent.display()));
        let authority = Self {
            first: directory.path().join(host),
            directory,
        };
        init(&authority.first, host);
        authority
    }

    /// Adds a certificate for `host`.
    #[track_caller]
    pub fn add(&self, host: &str) {
        let directory = self.host(host);
        fs::create_dir(&directory).expect("a new name");
        for file in ["ca.pem", "ca.key"] {
            fs::copy(self.first.join(file), directory.join(file)).expect("the authority is there");
        }
        init(&directory, host);
    }

    /// The directory with the certificate of `host`.
    pub fn host(&self, host: &str) -> PathBuf {
        self.directory.path().join(host)
    }
}

#[track_caller]
fn init(directory: &Path, host: &str) {
    let arguments = ["tls".as_ref(), "init".as_ref(), directory.as_os_str()];
    let made = cutover(arguments.into_iter().chain(["--host".as_ref(), host.as_ref()]));
    assert_eq!(made.exit, Exit::Shutdown, "{made:?}");
}
