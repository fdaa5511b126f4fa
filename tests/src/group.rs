//! [`Group`]: VMs on several [sites](Site) that are protected together, and the coordinator, which is outside of all.

mod stored;

use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::environment::{poll_until, scratch};
use crate::{Console, Exit, Guest, Lan, Monitor, OtherHost, Site, Vm, cli};

/// What groups are called.
const NAME: &str = "group";
/// Where coordinators listen.
const PORT: u16 = 7100;

/// How a group is protected.
#[derive(Clone, Copy, Debug)]
pub struct Protection {
    /// From one cut to the next.
    pub interval: &'static str,
    /// Whether all members are cut together; if not, each is a group of its own.
    pub together: bool,
    /// How soon a silent host counts as lost, as options of `cutover group create`.
    pub suspicion: [&'static str; 6],
}

impl Protection {
    /// For tests: one where everything is emulated. A host that is suspected too early would be a failure that nobody has
    /// injected.
    pub const PATIENT: Self = Self {
        interval: "400ms",
        together: true,
        suspicion: ["--heartbeat", "500ms", "--lease", "8s", "--suspicion", "10s"],
    };
}

/// How long anything else may take there.
const LIMITS: [&str; 6] = ["--cut", "60s", "--ship", "120s", "--roll-back", "120s"];

/// See the module.
pub struct Group {
    /// Hosts, each with an agent.
    pub sites: Vec<Site>,
    /// Members, in order.
    pub vms: Vec<Vm>,
    /// Which site each is on.
    places: Vec<usize>,
    network: Network,
    coordinator: Option<Monitor>,
    /// What is protected, by name.
    protected: Vec<String>,
    directory: TempDir,
}

/// What all are on, and the outside.
enum Network {
    /// Of this host.
    Lan(Lan),
    /// Of two joined hosts.
    Joined,
}

impl Network {
    /// The address of the outside.
    fn outside(&self) -> Ipv4Addr {
        match self {
            Self::Lan(lan) => lan.host(),
            Self::Joined => OtherHost::HERE,
        }
    }

    /// The address of a member.
    fn member(&self, member: usize) -> Ipv4Addr {
        let number = u8::try_from(member).expect("tests have few members");
        match self {
            Self::Lan(lan) => lan.member(number),
            Self::Joined => {
                let [a, b, c, guest] = OtherHost::GUEST.octets();
                Ipv4Addr::new(a, b, c, guest + number)
            }
        }
    }
}

impl Group {
    /// Boots a guest on each site of `places`, of so many `sites`; nothing is protected yet.
    #[track_caller]
    pub fn boot(sites: u8, places: &[usize], guest: impl Fn() -> Guest) -> Self {
        let (lan, taps) = (Lan::new(), names(places.len()));
        let sites = (0..sites).map(|number| Site::on(&lan, number, &taps)).collect();
        Self::on(Network::Lan(lan), sites, places, guest).with_addresses()
    }

    /// The same on two joined hosts, of which this one is the first.
    #[track_caller]
    pub fn boot_between_hosts(places: &[usize], guest: impl Fn() -> Guest) -> Self {
        let sites = Site::joined(&names(places.len()));
        Self::on(Network::Joined, sites.into(), places, guest).with_addresses()
    }

    #[track_caller]
    fn on(network: Network, mut sites: Vec<Site>, places: &[usize], guest: impl Fn() -> Guest) -> Self {
        sites.iter_mut().for_each(Site::start_agent);
        let vms = places.iter().enumerate().map(|(member, place)| {
            let name = name(member);
            guest()
                .arguments(["--name", &name, "--api", "--net", &format!("tap={name}")])
                .through(sites[*place].wrapper())
                .boot()
        });
        Self {
            vms: vms.collect(),
            sites,
            places: places.to_vec(),
            network,
            coordinator: None,
            protected: Vec::new(),
            directory: scratch(),
        }
    }

    /// Has `micro` guests take their addresses.
    #[track_caller]
    fn with_addresses(self) -> Self {
        for (vm, address) in self.members() {
            vm.check(&format!("ip address add {address}/24 dev eth0 && ip link set eth0 up"));
        }
        self
    }

    /// Members with their addresses.
    pub fn members(&self) -> Vec<(&Vm, Ipv4Addr)> {
        let members = self.vms.iter().enumerate();
        members.map(|(member, vm)| (vm, self.network.member(member))).collect()
    }

    /// Starts the coordinator, or starts it again; on return it can be asked.
    #[track_caller]
    pub fn start_coordinator(&mut self) {
        let mut command = Monitor::command();
        let endpoint = format!("tcp://{}:{PORT}", self.network.outside());
        command.args(["coordinator", "--insecure", "--listen", &endpoint, "--journal"]);
        command
            .arg(self.directory.path().join("journal"))
            .arg("--socket")
            .arg(self.socket());
        self.coordinator = Some(Monitor::start(command));
        poll_until("the coordinator answers", || UnixStream::connect(self.socket()).ok());
    }

    /// Kills the coordinator.
    #[track_caller]
    pub fn kill_coordinator(&mut self) {
        self.coordinator = None;
    }

    /// Protects all members; on return the first cut is permanent.
    #[track_caller]
    pub fn protect(&mut self) {
        self.protect_as(&Protection::PATIENT);
    }

    /// The same in a certain way.
    #[track_caller]
    pub fn protect_as(&mut self, protection: &Protection) {
        if self.coordinator.is_none() {
            self.start_coordinator();
        }
        let members: Vec<usize> = (0..self.places.len()).collect();
        if protection.together {
            self.create(NAME, &members, protection);
        } else {
            for member in members {
                self.create(&name(member), &[member], protection);
            }
        }
    }

    /// Has all members go on unprotected.
    #[track_caller]
    pub fn unprotect(&mut self) {
        for group in std::mem::take(&mut self.protected) {
            let stopped = cli::finish(self.command("stop", &group));
            assert_eq!(stopped.exit, Exit::Shutdown, "{stopped:?}\n{}", self.report());
        }
    }

    #[track_caller]
    fn create(&mut self, group: &str, members: &[usize], protection: &Protection) {
        let mut create = self.command("create", group);
        for member in members {
            let agent = self.sites[self.places[*member]].agent_endpoint();
            create.args(["--member", &format!("{}={agent}", name(*member))]);
        }
        for site in &self.sites {
            create.args(["--backup", &site.agent_endpoint()]);
        }
        create.args(["--interval", protection.interval]);
        create.args(protection.suspicion).args(LIMITS);
        let created = cli::finish(create);
        assert_eq!(created.exit, Exit::Shutdown, "{created:?}\n{}", self.report());
        self.protected.push(group.to_owned());
    }

    /// What `cutover group status --json` says.
    #[track_caller]
    pub fn status(&self) -> Value {
        let mut command = self.command("status", NAME);
        command.arg("--json");
        let finished = cli::finish(command);
        assert_eq!(finished.exit, Exit::Shutdown, "{finished:?}\n{}", self.report());
        serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error} in {}", finished.stdout))
    }

    /// How it is doing, in a line.
    #[track_caller]
    pub fn summary(&self) -> String {
        let status = self.status();
        let pauses: Vec<f64> = status["members"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|member| member["pause_ns"].as_f64().unwrap_or_default() / 1e6)
            .collect();
        let pauses = pauses.iter().map(|pause| format!("{pause:.1}")).collect::<Vec<_>>();
        let recovery = match &status["last_recovery"] {
            Value::Null => String::new(),
            recovery => {
                let ms = |part: &str| recovery[part].as_f64().unwrap_or_default() / 1e6;
                format!(
                    ", recovery: detected {:.0} ms, decided {:.0} ms, restored {:.0} ms, resumed {:.0} ms",
                    ms("detect_ns"),
                    ms("decide_ns"),
                    ms("restore_ns"),
                    ms("resume_ns")
                )
            }
        };
        format!(
            "{}, generation {}, {} permanent cuts, pauses of the last {} ms{recovery}",
            status["state"].as_str().unwrap_or_default(),
            status["generation"],
            status["cuts"],
            pauses.join(", ")
        )
    }

    /// Waits until what is seen of the status is so.
    #[track_caller]
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        poll_until(what, || Some(self.status()).filter(&is_so))
    }

    /// Waits until the loss of any one host would be survived, and returns the status then.
    #[track_caller]
    pub fn wait_until_protected(&self) -> Value {
        self.wait_until("all is protected again", |status| status["state"] == "protected")
    }

    /// Has `happen` what `members` do not survive, and waits until they have been promoted on `site`, and all go on.
    #[track_caller]
    pub fn lose(&mut self, members: &[usize], site: usize, happen: impl FnOnce(&mut Self)) {
        self.lose_from(members, happen);
        for member in members {
            self.go_on_at(*member, site);
        }
    }

    /// Has `happen` what `members` do not survive, and waits until others are in their place, and all go on.
    #[track_caller]
    fn lose_from(&mut self, members: &[usize], happen: impl FnOnce(&mut Self)) {
        let incarnation = |status: &Value, member: usize| status["members"][member]["incarnation"].as_u64();
        let before = self.status();
        happen(self);
        self.wait_until("all go on", |status| {
            let replaced = |member: &usize| incarnation(status, *member) > incarnation(&before, *member);
            let settled = !["judging", "recovering"].iter().any(|state| status["state"] == *state);
            members.iter().all(replaced) && settled
        });
    }

    /// Members whose monitors run on `site`.
    pub fn members_on(&self, site: usize) -> Vec<usize> {
        let members = self.places.iter().enumerate();
        members
            .filter(|(_, place)| **place == site)
            .map(|(member, _)| member)
            .collect()
    }

    /// Kills the monitor that runs a member now.
    #[track_caller]
    pub fn kill_monitor(&self, member: usize) {
        self.sites[self.places[member]].kill_monitor(&name(member));
    }

    /// [Loses](Self::lose) `members` of any site, of two.
    #[track_caller]
    pub fn lose_monitors(&mut self, members: &[usize], happen: impl FnOnce(&mut Self)) {
        let from: Vec<usize> = members.iter().map(|member| self.places[*member]).collect();
        self.lose_from(members, happen);
        for (member, place) in members.iter().zip(from) {
            self.go_on_at(*member, 1 - place);
        }
    }

    /// [Loses](Self::lose) all members of a site, of two.
    #[track_caller]
    pub fn lose_site(&mut self, site: usize, happen: impl FnOnce(&mut Self)) {
        self.lose(&self.members_on(site), 1 - site, happen);
    }

    /// Goes on with a member where it was promoted.
    #[track_caller]
    fn go_on_at(&mut self, member: usize, site: usize) {
        let socket = self.sites[site].directory().join(format!("{}.console", name(member)));
        let console = poll_until("the promoted VM's console is there", || {
            UnixStream::connect(&socket).ok()
        });
        let input = console.try_clone().expect("a socket can be duplicated");
        self.vms[member].go_on_elsewhere(Console::attach(console, input));
        self.places[member] = site;
    }

    /// What coordinator and agents have said.
    pub fn report(&self) -> String {
        let coordinator = self.coordinator.as_ref().map(Monitor::log).unwrap_or_default();
        let agents: Vec<String> = self.sites.iter().map(Site::agent_log).collect();
        format!("coordinator:\n{coordinator}\nagents:\n{}", agents.join("\n---\n"))
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("coordinator")
    }

    fn command(&self, what: &str, group: &str) -> Command {
        let mut command = Monitor::command();
        command.args(["group", what, group, "--socket"]).arg(self.socket());
        command
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- the group ----\n{}", self.report());
        }
    }
}

/// What so many members are called.
fn names(count: usize) -> Vec<String> {
    (0..count).map(name).collect()
}

/// What a member is called, and its tap.
fn name(member: usize) -> String {
    format!("member{member}")
}
