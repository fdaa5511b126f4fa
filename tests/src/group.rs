//! [`Group`]: VMs on several [sites](Site) that are protected together, and the coordinator, which is outside of all.

use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::environment::{poll_until, scratch};
use crate::{Console, Exit, Guest, Lan, Monitor, Site, Vm, cli};

/// What groups are called.
const NAME: &str = "group";
/// Where coordinators listen.
const PORT: u16 = 7100;
/// How long things may take where everything is emulated. A host that is suspected too early would be a failure that
/// nobody has injected.
const PATIENT: [&str; 14] = [
    "--heartbeat",
    "500ms",
    "--lease",
    "8s",
    "--suspicion",
    "10s",
    "--cut",
    "60s",
    "--ship",
    "120s",
    "--roll-back",
    "120s",
    "--interval",
    "400ms",
];

/// See the module.
pub struct Group {
    /// The network that all are on, and the outside.
    pub lan: Lan,
    /// Hosts, each with an agent.
    pub sites: Vec<Site>,
    /// Members, in order, as long as they are where they were started.
    pub vms: Vec<Vm>,
    /// Which site each is on.
    places: Vec<usize>,
    coordinator: Option<Monitor>,
    directory: TempDir,
}

impl Group {
    /// Boots a guest on each site of `places`, which has so many sites as there are different ones in it; nothing is
    /// protected yet.
    #[track_caller]
    pub fn boot(sites: u8, places: &[usize], change: impl Fn(usize, Guest) -> Guest) -> Self {
        let lan = Lan::new();
        let names: Vec<String> = (0..places.len()).map(name).collect();
        let taps: Vec<&str> = names.iter().map(String::as_str).collect();
        let sites: Vec<Site> = (0..sites)
            .map(|number| {
                let mut site = Site::new(&lan, number, &taps);
                site.start_agent();
                site
            })
            .collect();
        let vms = (0_u8..).zip(places).map(|(number, place)| {
            let (member, site) = (usize::from(number), &sites[*place]);
            let name = name(member);
            let guest = Guest::micro().arguments(["--name", &name, "--api", "--net", &format!("tap={name}")]);
            let vm = change(member, guest.through(site.wrapper())).boot();
            vm.check(&lan.member_setup(number));
            vm
        });
        Self {
            vms: vms.collect(),
            sites,
            places: places.to_vec(),
            coordinator: None,
            directory: scratch(),
            lan,
        }
    }

    /// Members that were not failed over, with their addresses.
    pub fn members(&self) -> Vec<(&Vm, Ipv4Addr)> {
        (0..)
            .zip(&self.vms)
            .map(|(number, vm)| (vm, self.lan.member(number)))
            .collect()
    }

    /// Starts the coordinator, or starts it again.
    #[track_caller]
    pub fn start_coordinator(&mut self) {
        let mut command = Monitor::command();
        let endpoint = format!("tcp://{}:{PORT}", self.lan.host());
        command.args(["coordinator", "--insecure", "--listen", &endpoint, "--journal"]);
        command
            .arg(self.directory.path().join("journal"))
            .arg("--socket")
            .arg(self.socket());
        self.coordinator = Some(Monitor::start(command));
    }

    /// Kills the coordinator.
    #[track_caller]
    pub fn kill_coordinator(&mut self) {
        self.coordinator = None;
    }

    /// Protects all members; on return the first cut is permanent.
    #[track_caller]
    pub fn protect(&mut self) {
        self.start_coordinator();
        poll_until("the coordinator listens", || self.socket().exists().then_some(()));
        let mut create = self.command("create");
        for (member, place) in self.places.iter().enumerate() {
            let agent = self.sites[*place].agent_endpoint();
            create.args(["--member", &format!("{}={agent}", name(member))]);
        }
        for site in &self.sites {
            create.args(["--backup", &site.agent_endpoint()]);
        }
        create.args(PATIENT);
        let created = cli::finish(create);
        assert_eq!(created.exit, Exit::Shutdown, "{created:?}\n{}", self.report());
    }

    /// What `cutover group status --json` says.
    #[track_caller]
    pub fn status(&self) -> Value {
        let mut command = self.command("status");
        command.arg("--json");
        let finished = cli::finish(command);
        assert_eq!(finished.exit, Exit::Shutdown, "{finished:?}\n{}", self.report());
        serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error} in {}", finished.stdout))
    }

    /// Waits until what is seen of the status is so.
    #[track_caller]
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        poll_until(what, || Some(self.status()).filter(&is_so))
    }

    /// Cuts the power of a site.
    #[track_caller]
    pub fn cut_power(&mut self, site: usize) {
        self.sites[site].cut_power();
    }

    /// Goes on with a member where it was promoted.
    #[track_caller]
    pub fn promoted(&mut self, member: usize, site: usize) {
        let socket = self.sites[site].runtime().join(format!("{}.console", name(member)));
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

    fn command(&self, what: &str) -> Command {
        let mut command = Monitor::command();
        command.args(["group", what, NAME, "--socket"]).arg(self.socket());
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

/// What a member is called, and its tap.
fn name(member: usize) -> String {
    format!("member{member}")
}
