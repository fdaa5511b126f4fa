//! [`Site`]: a host as far as a group of VMs can tell. It has its own end of the network, its own taps of the same names
//! as on other hosts, its own directories and agent, and can lose its power.
//!
//! Within one host it is made of a network namespace; where two nested hosts are joined, each of them is one.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::environment::scratch;
use crate::{Exit, Lan, Monitor, OtherHost, cli};

/// Where agents listen.
const AGENT_PORT: u16 = 7200;
/// The bridge of each.
const BRIDGE: &str = OtherHost::BRIDGE;
/// The end of the way to the other sites, in a namespace.
const UPLINK: &str = "uplink";

/// See the module. Dropped, everything of it is gone.
pub struct Site {
    place: Place,
    address: Ipv4Addr,
    /// Its taps.
    taps: Vec<String>,
    agent: Option<Monitor>,
}

/// What it is made of, with a directory for its sockets and disks.
enum Place {
    /// A network namespace.
    Namespace(String, TempDir),
    /// This host.
    Here(TempDir),
    /// The other of two joined hosts.
    There,
}

impl Site {
    /// Number `number` of those on `lan`, with `taps`.
    #[track_caller]
    pub fn on(lan: &Lan, number: u8, taps: &[String]) -> Self {
        let namespace = format!("{}h{number}", lan.bridge());
        let outer = format!("{}v{number}", lan.bridge());
        let address = lan.member(100 + number);
        check(&format!(
            "modprobe veth && ip netns add {namespace} &&
             ip link add {outer} type veth peer name {UPLINK} netns {namespace} &&
             ip link set {outer} master {} up",
            lan.bridge()
        ));
        let mut site = Self::new(Place::Namespace(namespace, scratch()), address);
        site.check(&format!(
            "ip link set lo up && ip link add {BRIDGE} type bridge && ip address add {address}/24 dev {BRIDGE} &&
             ip link set {BRIDGE} up && ip link set {UPLINK} master {BRIDGE} up"
        ));
        site.add_taps(taps);
        site
    }

    /// This one of two joined hosts and the other, with `taps` on each.
    #[track_caller]
    pub fn joined(taps: &[String]) -> [Self; 2] {
        let mut sites = [
            Self::new(Place::Here(scratch()), OtherHost::HERE),
            Self::new(Place::There, OtherHost::THERE),
        ];
        sites.iter_mut().for_each(|site| site.add_taps(taps));
        sites
    }

    fn new(place: Place, address: Ipv4Addr) -> Self {
        Self {
            place,
            address,
            taps: Vec::new(),
            agent: None,
        }
    }

    #[track_caller]
    fn add_taps(&mut self, taps: &[String]) {
        for tap in taps {
            self.check(&format!(
                "ip link show {tap} >/dev/null 2>&1 ||
                 {{ ip tuntap add dev {tap} mode tap vnet_hdr && ip link set {tap} master {BRIDGE} up; }}"
            ));
        }
        taps.clone_into(&mut self.taps);
    }

    /// Where its VMs and its agent have their sockets, and standbys their disks.
    pub fn directory(&self) -> PathBuf {
        match &self.place {
            Place::Namespace(_, directory) | Place::Here(directory) => directory.path().join("site"),
            Place::There => PathBuf::from("/run/site"),
        }
    }

    /// What runs another command there: it goes before the command.
    pub fn wrapper(&self) -> Vec<OsString> {
        let mut wrapper: Vec<OsString> = match &self.place {
            Place::Namespace(name, _) => ["ip", "netns", "exec", name].map(OsString::from).into(),
            Place::Here(_) => Vec::new(),
            Place::There => OtherHost::wrapper().map(OsString::from).into(),
        };
        let mut runtime = OsString::from("CUTOVER_RUNTIME_DIR=");
        runtime.push(self.directory());
        wrapper.extend(["env".into(), runtime]);
        wrapper
    }

    /// `program` there, to be completed with arguments.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let wrapper = self.wrapper();
        let mut command = Command::new(&wrapper[0]);
        command.args(&wrapper[1..]).arg(program.as_ref());
        command
    }

    /// Runs a shell command there, which must succeed.
    #[track_caller]
    pub fn check(&self, script: &str) {
        let mut command = self.command("/bin/sh");
        command.args(["-c", script]);
        let finished = cli::finish(command);
        assert_eq!(finished.exit, Exit::Shutdown, "'{script}': {finished:?}");
    }

    /// Starts its agent.
    #[track_caller]
    pub fn start_agent(&mut self) {
        let directory = self.directory();
        self.check(&format!("mkdir -m 700 -p {}", directory.display()));
        let mut command = self.command(Monitor::command().get_program());
        command.args(["backup", "--insecure", "--listen", &self.agent_endpoint(), "--consoles"]);
        command.arg(&directory).arg("--disks").arg(&directory);
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

    /// Cuts it off from all others; what runs there goes on.
    #[track_caller]
    pub fn cut_link(&self) {
        self.check(&format!("ip link set {UPLINK} down"));
    }

    /// Has it reach all others again.
    #[track_caller]
    pub fn mend_link(&self) {
        self.check(&format!("ip link set {UPLINK} up"));
    }

    /// Kills all standbys there.
    #[track_caller]
    pub fn kill_standbys(&self) {
        self.kill(" standby ");
    }

    /// Kills the monitor that runs `vm` there, be it the one it was started with or one that was promoted.
    #[track_caller]
    pub fn kill_monitor(&self, vm: &str) {
        self.kill(&format!(" --(name|vm) {vm} "));
    }

    /// Kills all processes there in whose command lines is what is looked for; there must be one.
    #[track_caller]
    fn kill(&self, pattern: &str) {
        let Place::Namespace(name, _) = &self.place else {
            panic!("processes of a whole host are not told apart");
        };
        let kill = format!(
            "for pid in $(ip netns pids {name}); do
                 if tr '\\0' ' ' </proc/$pid/cmdline | grep -qE -- '{pattern}'; then kill -9 $pid && echo $pid; fi
             done | grep ."
        );
        check(&kill);
    }

    /// Cuts its power: nobody is told, and nothing answers any more.
    #[track_caller]
    pub fn cut_power(&mut self) {
        match &self.place {
            Place::Namespace(name, _) => {
                // Before anybody's end can be told.
                self.cut_link();
                kill_all(name);
            }
            Place::Here(_) => panic!("tests run on this host"),
            Place::There => OtherHost::cut_power(),
        }
        self.agent = None;
    }

    /// Has it go on as it was before it had lost its power: with an agent, and nothing else.
    #[track_caller]
    pub fn power_up(&mut self) {
        if let Place::Namespace(..) = self.place {
            self.mend_link();
        }
        let taps = std::mem::take(&mut self.taps);
        self.add_taps(&taps);
        self.start_agent();
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "---- the log of the agent at {} ----\n{}",
                self.address,
                self.agent_log()
            );
        }
        if let Place::Namespace(name, _) = &self.place {
            kill_all(name);
            // One that cannot be removed goes with the machine at the latest; its devices go with it.
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

/// Kills all that runs in a network namespace.
fn kill_all(namespace: &str) {
    let kill = format!("ip netns pids {namespace} | xargs --no-run-if-empty kill -9");
    // What has ended meanwhile is as good.
    let _ = Command::new("/bin/sh").args(["-c", &kill]).output();
}

/// Runs a shell command on this host, which must succeed.
#[track_caller]
fn check(script: &str) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    let finished = cli::finish(command);
    assert_eq!(finished.exit, Exit::Shutdown, "'{script}': {finished:?}");
}
