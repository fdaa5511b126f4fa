//! [`Site`]: a host as far as a group of VMs can tell, made of a network namespace. It has its own end of the LAN, its own
//! taps of the same names as on other hosts, its own directories, and can lose its power.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::process::Command;

use tempfile::TempDir;

use crate::environment::scratch;
use crate::network::ip;
use crate::{Lan, Monitor};

/// Where agents listen.
const AGENT_PORT: u16 = 7200;
/// The bridge of each.
const BRIDGE: &str = "lan";

/// See the module. Dropped, everything of it is gone.
pub struct Site {
    namespace: String,
    address: Ipv4Addr,
    /// Where its VMs listen.
    runtime: TempDir,
    disks: TempDir,
    agent: Option<Monitor>,
}

impl Site {
    /// Number `number` of those on `lan`, with a tap for each of `taps`.
    #[track_caller]
    pub fn new(lan: &Lan, number: u8, taps: &[&str]) -> Self {
        let namespace = format!("{}h{number}", lan.bridge());
        let outer = format!("{}v{number}", lan.bridge());
        run("modprobe", &["veth"]);
        ip(&["netns", "add", &namespace]);
        let site = Self {
            address: lan.member(100 + number),
            runtime: scratch(),
            disks: scratch(),
            agent: None,
            namespace,
        };
        ip(&[
            "link",
            "add",
            &outer,
            "type",
            "veth",
            "peer",
            "name",
            "uplink",
            "netns",
            &site.namespace,
        ]);
        ip(&["link", "set", &outer, "master", lan.bridge(), "up"]);
        site.ip(&["link", "set", "lo", "up"]);
        site.ip(&["link", "add", BRIDGE, "type", "bridge"]);
        site.ip(&["address", "add", &format!("{}/24", site.address), "dev", BRIDGE]);
        site.ip(&["link", "set", BRIDGE, "up"]);
        site.ip(&["link", "set", "uplink", "master", BRIDGE, "up"]);
        for tap in taps {
            site.ip(&["tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr"]);
            site.ip(&["link", "set", tap, "master", BRIDGE, "up"]);
        }
        site
    }

    /// What runs another command there: it goes before the command.
    pub fn wrapper(&self) -> Vec<OsString> {
        let mut runtime = OsString::from("CUTOVER_RUNTIME_DIR=");
        runtime.push(self.runtime.path());
        let enter = ["ip", "netns", "exec", &self.namespace, "env"];
        enter.map(OsString::from).into_iter().chain([runtime]).collect()
    }

    /// `cutover` there, to be completed with arguments.
    pub fn cutover(&self) -> Command {
        let wrapper = self.wrapper();
        let mut command = Command::new(&wrapper[0]);
        command.args(&wrapper[1..]).arg(Monitor::command().get_program());
        command
    }

    /// Starts its agent.
    #[track_caller]
    pub fn start_agent(&mut self) {
        let mut command = self.cutover();
        command.args([
            "backup",
            "--insecure",
            "--listen",
            &self.agent_endpoint(),
            "--serial-dir",
        ]);
        command.arg(self.runtime.path()).arg("--disks").arg(self.disks.path());
        self.agent = Some(Monitor::start(command));
    }

    /// Where its agent listens.
    pub fn agent_endpoint(&self) -> String {
        format!("tcp://{}:{AGENT_PORT}", self.address)
    }

    /// What its agent reported.
    pub fn agent_log(&self) -> String {
        self.agent.as_ref().map(Monitor::log).unwrap_or_default()
    }

    /// Where its VMs have their sockets.
    pub fn runtime(&self) -> &std::path::Path {
        self.runtime.path()
    }

    /// Cuts its power: nobody is told, and nothing answers any more.
    #[track_caller]
    pub fn cut_power(&mut self) {
        // Before anybody's end can be told.
        self.ip(&["link", "set", "uplink", "down"]);
        self.kill_all();
        self.agent = None;
    }

    fn kill_all(&self) {
        let kill = format!("ip netns pids {} | xargs --no-run-if-empty kill -9", self.namespace);
        // What has ended meanwhile is as good.
        let _ = Command::new("/bin/sh").args(["-c", &kill]).output();
    }

    #[track_caller]
    fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.namespace], arguments].concat());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- the agent's log of {} ----\n{}", self.namespace, self.agent_log());
        }
        self.kill_all();
        // A namespace that cannot be removed goes with the machine at the latest; its devices go with it.
        let _ = Command::new("ip").args(["netns", "delete", &self.namespace]).output();
    }
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "'{program} {}': {errors}", arguments.join(" "));
}
