//! Hosts with agents and VMs, a coordinator with a journal, and what can happen to them, in one process.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cutover_migration::transport::{Endpoint, Listener, Security};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;

use super::made_up::{MadeUp, MadeUpStandby, Registry, StandbyState, VmState, lock};
use super::proxy::Proxy;
use crate::Error;
use crate::engine::Record;
use crate::id::{Host, Identity, Incarnation, Seat};
use crate::runtime::agent::{Agent, HostWork, Place};
use crate::runtime::coordinator::{Ask, Coordinator, GroupView, Options};
use crate::runtime::journal::memory::{MemoryJournal, Said};
use crate::runtime::seat::{self, SeatOptions, SharedView};
use crate::spec::{GroupSpec, Interval, MemberSpec, Timing};

/// Longer than anything takes, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often is looked whether something has happened.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const GROUP: &str = "group";
/// After how long without a word a coordinator is followed by another.
const LEASE: Duration = Duration::from_millis(500);

/// Stands for the process that a seat is in, so that there is one that can be killed.
struct Process {
    child: Child,
    way: Proxy,
}

impl Process {
    fn start(way: Proxy) -> (Self, OwnedFd) {
        let mut command = Command::new("sleep");
        let child = command
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .expect("there is sleep");
        let pid = Pid::from_child(&child);
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).expect("it runs");
        (Self { child, way }, descriptor)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it was killed");
    }
}

/// What all hosts share.
struct Everywhere {
    folder: PathBuf,
    registry: Arc<Registry>,
    processes: Mutex<BTreeMap<Seat, (String, Process)>>,
    /// What members and standbys know.
    views: Mutex<BTreeMap<Seat, SharedView>>,
}

/// A host.
struct MadeUpHost {
    shared: Arc<Everywhere>,
    /// Names of the VMs that run there.
    vms: Vec<String>,
}

impl MadeUpHost {
    fn options(&self, place: &Place) -> (SeatOptions, Proxy) {
        let seat = place.seat;
        let name = format!("{}-{}-{}", place.vm, seat.member.0, seat.incarnation.0);
        let path = self.shared.folder.join(name);
        // It is asked again after a while.
        let _ = std::fs::remove_file(&path);
        let Endpoint::Unix(coordinator) = &place.coordinator else {
            panic!("all is on this host");
        };
        let way = Proxy::start(&path, coordinator.clone());
        let options = SeatOptions {
            who: Identity {
                group: place.group,
                seat,
            },
            host: place.host.clone(),
            coordinator: Endpoint::Unix(path),
            security: Security::default(),
        };
        (options, way)
    }

    fn keep(&self, place: &Place, way: Proxy) -> OwnedFd {
        let (process, descriptor) = Process::start(way);
        lock(&self.shared.processes).insert(place.seat, (place.vm.clone(), process));
        descriptor
    }
}

impl MadeUpHost {
    fn keep_view(&self, place: &Place, view: Result<SharedView, Error>) -> Result<(), String> {
        let view = view.map_err(|error| error.to_string())?;
        lock(&self.shared.views).insert(place.seat, view);
        Ok(())
    }
}

impl HostWork for MadeUpHost {
    fn start_standby(&self, place: &Place) -> Result<(OwnedFd, Endpoint), String> {
        let (options, way) = self.options(place);
        let endpoint = Endpoint::Unix(self.shared.folder.join(format!("standby-{}", place.seat)));
        let seat = seat::Seat::default();
        let state = Arc::new(Mutex::new(StandbyState {
            seeded: false,
            held: BTreeMap::new(),
            permanent: 0,
            is_lost: false,
            notices: seat.notices(),
        }));
        lock(&self.shared.registry.standbys).insert(endpoint.to_string(), Arc::clone(&state));
        let standby = MadeUpStandby {
            name: place.vm.clone(),
            registry: Arc::clone(&self.shared.registry),
            state,
            notices: seat.notices(),
        };
        let view = seat.stand_by(standby, &options, |_| ());
        self.keep_view(place, view)?;
        Ok((self.keep(place, way), endpoint))
    }

    fn join(&self, place: &Place) -> Result<OwnedFd, String> {
        if !self.vms.contains(&place.vm) {
            return Err(format!("there is no VM '{}'", place.vm));
        }
        let (options, way) = self.options(place);
        let seat = seat::Seat::default();
        let newest = self.shared.registry.newest(&place.vm);
        let vm = MadeUp {
            name: place.vm.clone(),
            registry: Arc::clone(&self.shared.registry),
            vm: newest.expect("it runs here").0,
            standby: None,
            notices: seat.notices(),
        };
        let view = seat.join(vm, &options, |_| ());
        self.keep_view(place, view)?;
        Ok(self.keep(place, way))
    }

    fn resume(&self, place: &Place) -> Result<(), String> {
        Err(format!("'{}' is not paused: nothing is restored here", place.vm))
    }
}

/// Hosts, named by their numbers, and a coordinator.
pub struct World {
    shared: Arc<Everywhere>,
    hosts: Vec<Host>,
    _agents: Vec<Agent>,
    coordinator: Option<Coordinator>,
    /// One that waits to take over.
    waiting: Option<Coordinator>,
    said: Arc<Mutex<Said>>,
    timing: Timing,
    _folder: TempDir,
}

impl World {
    /// As [`new`](Self::new), where nobody is taken for dead just because this machine has much to do.
    pub fn patient(hosts: usize) -> Self {
        let timing = Timing {
            heartbeat: Duration::from_millis(100),
            lease: PATIENCE / 4,
            suspicion: PATIENCE / 2,
            ..Timing::default().scaled(8)
        };
        Self {
            timing,
            ..Self::new(hosts)
        }
    }

    /// VM a runs on host 0, b on host 1, c on host 2, as far as there are so many.
    pub fn new(hosts: usize) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let registry = Arc::<Registry>::default();
        let shared = Arc::new(Everywhere {
            folder: folder.path().to_owned(),
            registry,
            processes: Mutex::default(),
            views: Mutex::default(),
        });
        let mut agents = Vec::new();
        let mut names = Vec::new();
        for (number, vm) in (0..hosts).zip(["a", "b", "c"]) {
            let running = VmState {
                runs: true,
                ..VmState::default()
            };
            shared.registry.add(vm, running);
            let endpoint = Endpoint::Unix(folder.path().join(format!("host{number}")));
            let listener = Listener::bind(&endpoint, &Security::default()).expect("a free path");
            let host = MadeUpHost {
                shared: Arc::clone(&shared),
                vms: vec![vm.to_owned()],
            };
            agents.push(Agent::start(listener, host).expect("threads"));
            names.push(Host(endpoint.to_string()));
        }
        let mut world = Self {
            shared,
            hosts: names,
            _agents: agents,
            coordinator: None,
            waiting: None,
            said: Arc::default(),
            timing: Timing::default().scaled(8),
            _folder: folder,
        };
        world.start_coordinator();
        world
    }

    pub fn start_coordinator(&mut self) {
        self.coordinator = Some(self.coordinator_at("coordinator"));
    }

    fn coordinator_at(&self, name: &str) -> Coordinator {
        let endpoint = Endpoint::Unix(self.shared.folder.join(name));
        let listener = Listener::bind(&endpoint, &Security::default()).expect("the one before is gone");
        let options = Options {
            security: Security::default(),
            observer: Box::new(|_, report| println!("{report:?}")),
        };
        let journal = MemoryJournal::open(&self.said, &endpoint.to_string(), LEASE);
        Coordinator::start(listener, Box::new(journal), options).expect("threads")
    }

    /// Starts another one; returns when all members and standbys know of it.
    pub fn start_waiting_coordinator(&mut self, name: &str) {
        self.waiting = Some(self.coordinator_at(name));
        let until = Instant::now() + PATIENCE;
        let known = |view: &SharedView| {
            let coordinators = view.get().coordinators;
            coordinators.iter().any(|endpoint| endpoint.to_string().ends_with(name))
        };
        while !lock(&self.shared.views).values().all(known) {
            assert!(Instant::now() < until, "it is not known");
            thread::sleep(LOOK_EVERY);
        }
    }

    /// The one that decides is gone without a word, and the one that waits is to take over.
    pub fn lose_coordinator(&mut self) {
        lock(&self.said).is_held_by_the_dead = true;
        self.coordinator = self.waiting.take();
    }

    /// From now on nothing can be written; or it can again.
    pub fn break_journal(&self, is_broken: bool) {
        lock(&self.said).is_broken = is_broken;
    }

    /// What the journal says of the group.
    pub fn record(&self) -> Record {
        let said = lock(&self.said);
        said.records.values().next().expect("there is one").clone()
    }

    pub fn stop_coordinator(&mut self) {
        self.coordinator = None;
    }

    pub fn restart_coordinator(&mut self) {
        self.stop_coordinator();
        self.start_coordinator();
    }

    fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(crate::runtime::coordinator::Reply<T>) -> Ask,
    ) -> Result<T, Error> {
        let (answer, answered) = channel();
        let reply = Box::new(move |result| drop(answer.send(result)));
        self.coordinator.as_ref().expect("it runs").ask(ask(reply));
        answered.recv_timeout(PATIENCE).expect("it answers")
    }

    /// A group of these VMs, each on its host.
    pub fn create_group(&self, members: &[&str]) {
        let hosted = members
            .iter()
            .map(|name| (*name, usize::from(name.as_bytes()[0] - b'a')));
        self.create_group_of(&hosted.collect::<Vec<_>>());
    }

    pub fn create_group_of(&self, members: &[(&str, usize)]) {
        let spec = GroupSpec {
            name: GROUP.to_owned(),
            members: members
                .iter()
                .map(|(name, host)| MemberSpec {
                    name: (*name).to_owned(),
                    host: self.hosts[*host].clone(),
                    restore: None,
                })
                .collect(),
            backups: self.hosts.clone(),
            interval: Interval::Fixed(Duration::from_millis(20)),
            timing: self.timing,
        };
        self.ask(|reply| Ask::Create(spec, reply))
            .expect("there may be such a group");
    }

    pub fn dissolve(&self) {
        self.ask(|reply| Ask::Dissolve(GROUP.to_owned(), reply))
            .expect("there is one");
    }

    /// How the group is when it is as `is_so` says.
    pub fn wait_for(&self, what: &str, is_so: impl Fn(&GroupView) -> bool) -> GroupView {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.ask(|reply| Ask::Group(GROUP.to_owned(), reply)) {
                Ok(view) if is_so(&view) => return view,
                Err(Error::NotDeciding { .. }) | Ok(_) if Instant::now() < until => {}
                view => panic!("no {what}: {view:#?}"),
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Why nothing is decided when it is not.
    pub fn wait_for_refusal(&self) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.ask(|reply| Ask::Group(GROUP.to_owned(), reply)) {
                Err(Error::NotDeciding { reason }) => return reason,
                view => assert!(Instant::now() < until, "it decides: {view:?}"),
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    pub fn vm(&self, name: &str) -> VmState {
        let (vm, _) = self.shared.registry.newest(name).expect("there is one");
        lock(&vm).clone()
    }

    /// Which of those that had this name.
    pub fn vm_id(&self, name: &str) -> usize {
        self.shared.registry.newest(name).expect("there is one").1
    }

    pub fn wait_for_vm(&self, name: &str, is_so: impl Fn(&VmState) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_so(&self.vm(name)) {
            assert!(Instant::now() < until, "{name}: {:?}", self.vm(name));
            thread::sleep(LOOK_EVERY);
        }
    }

    /// The VM's process is gone at once, and its agent knows.
    pub fn kill_vm(&self, name: &str) {
        let (_, process) = self.take(|seat, of| of == name && seat.incarnation == Incarnation::FIRST);
        process.way.cut();
        let (vm, _) = self.shared.registry.newest(name).expect("there is one");
        lock(&vm).runs = false;
        drop(process);
    }

    /// The VM runs, but nobody hears from it.
    pub fn cut_off_vm(&self, name: &str) {
        let processes = lock(&self.shared.processes);
        let found = processes
            .iter()
            .find(|(seat, (of, _))| of == name && seat.incarnation == Incarnation::FIRST);
        found.expect("there is one").1.1.way.cut();
    }

    pub fn kill_standby(&self, name: &str) {
        let (seat, process) = self.take(|seat, of| of == name && seat.incarnation != Incarnation::FIRST);
        process.way.cut();
        let standbys = lock(&self.shared.registry.standbys);
        let suffix = format!("standby-{seat}");
        let (_, standby) = standbys
            .iter()
            .find(|(at, _)| at.ends_with(&suffix))
            .expect("it listened");
        lock(standby).is_lost = true;
    }

    /// Whether a standby of this VM that is not lost has an image.
    pub fn has_standby(&self, name: &str) -> bool {
        let processes = lock(&self.shared.processes);
        processes
            .iter()
            .any(|(seat, (of, _))| of == name && seat.incarnation != Incarnation::FIRST)
    }

    fn take(&self, is_it: impl Fn(&Seat, &str) -> bool) -> (Seat, Process) {
        let mut processes = lock(&self.shared.processes);
        let found = processes.iter().find(|(seat, (of, _))| is_it(seat, of));
        let seat = *found.expect("there is such a process").0;
        let (_, process) = processes.remove(&seat).expect("it was found");
        (seat, process)
    }
}
