//! [`OtherHost`]: the second of two nested hosts that are joined by a network, as the first one uses it.
//!
//! Both see the machine's files, each with changes of its own, and have one folder in common ([`legacy`](crate::legacy)).
//! What runs there is, to the harness, a process here (see the program `on-other-host`): its console, its log, its exit
//! code, and killing it.

use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use crate::cli::{Finished, finish};
use crate::environment::{monitor_binary, on_other_host, poll_until};

/// The other host.
#[derive(Clone, Copy, Debug)]
pub struct OtherHost;

impl OtherHost {
    /// Address of the host that tests run on, on a bridge called [`BRIDGE`](Self::BRIDGE).
    pub const HERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    /// Address of the other one.
    pub const THERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
    /// An address on the same network that a guest can have.
    pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
    /// The bridge of either host.
    pub const BRIDGE: &str = "lan";

    /// What runs another command there: it goes before the command.
    pub fn wrapper() -> [String; 3] {
        let program = on_other_host().display().to_string();
        [program, "run".to_owned(), Self::THERE.to_string()]
    }

    /// A command that runs `program` there, to be completed with arguments.
    pub fn command(program: impl AsRef<OsStr>) -> Command {
        let [wrapper, arguments @ ..] = Self::wrapper();
        let mut command = Command::new(wrapper);
        command.args(arguments).arg(program);
        command
    }

    /// `cutover` there, to be completed with arguments.
    pub fn monitor() -> Command {
        Self::command(monitor_binary())
    }

    /// Runs a shell command there.
    #[track_caller]
    pub fn run(script: &str) -> Finished {
        let mut command = Self::command("/bin/sh");
        command.args(["-c", script]);
        finish(command)
    }

    /// Cuts its power at once, and waits until it is up again.
    #[track_caller]
    pub fn cut_power() {
        /// Resets the machine, with no file system written and nobody told (Linux admin-guide/sysrq).
        const RESET: &str = "cat /proc/sys/kernel/random/boot_id; exec >&- 2>&-; echo b > /proc/sysrq-trigger";
        let before = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("Linux has one");
        let told = Self::run(RESET);
        assert_ne!(told.stdout, before, "that would have been this host");
        poll_until("the other host is up again", || {
            let now = Self::run("cat /proc/sys/kernel/random/boot_id").stdout;
            (!now.is_empty() && now != told.stdout).then_some(())
        });
    }
}
