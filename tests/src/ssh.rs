//! Commands in the `debian` guest over ssh.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tempfile::TempDir;

use crate::environment::{guest_file, scratch};
use crate::vm::Output;

/// A way into a guest as root.
#[derive(Debug)]
pub struct Ssh {
    address: Ipv4Addr,
    directory: TempDir,
}

impl Ssh {
    /// To the guest at `address`.
    #[track_caller]
    pub fn to(address: Ipv4Addr) -> Self {
        let directory = scratch();
        let key = directory.path().join("key");
        // ssh refuses a key that others may read, and the image directory may not keep permissions.
        fs::copy(guest_file("debian/id_ed25519"), &key).expect("a new directory takes a file");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("a new file takes permissions");
        Self { address, directory }
    }

    /// Runs a shell command.
    #[track_caller]
    pub fn run(&self, command: &str) -> Output {
        let output = self.command(command).output();
        let output = output.unwrap_or_else(|error| panic!("cannot run ssh (package openssh-client): {error}"));
        Output {
            exit_code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts a shell command, whose connection stays open meanwhile; [`cli::finish`](crate::cli::finish) is for the
    /// result.
    pub fn command(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"])
            .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
            // A second apart: the login prompt does not wait for the server.
            .args(["-o", "ConnectTimeout=60", "-o", "ConnectionAttempts=60"])
            .arg("-i")
            .arg(self.directory.path().join("key"))
            .arg(format!("root@{}", self.address))
            .arg(command);
        ssh
    }

    /// Runs a shell command that must succeed, and returns what it printed.
    #[track_caller]
    pub fn check(&self, command: &str) -> String {
        self.run(command).success(command)
    }
}
