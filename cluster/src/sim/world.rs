//! The world of the simulation: what happens, in order, and what follows from it.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::check::Violation;
use super::faults::{Fault, Faults};
use super::process::{Process, Role};
use super::storing::Snapshots;
use super::vm::{Frame, Guest, Shipment, Vm};
use super::{MS, Options, SECOND};
use crate::checkpoint::CheckpointId;
use crate::engine::{Action, Decided, Engine, Event, Input, Record, Report, State};
use crate::id::{Epoch, GroupId, Host, Identity, Incarnation, MemberId, Seat};
use crate::lease::{Nanos, nanos};
use crate::member::Member;
use crate::message::{AgentHello, Envelope, FromAgent, FromSeat, SeatHello, ToAgent, ToSeat};

/// How long a message of the coordinator takes at least, and at most.
const MESSAGE_TAKES: std::ops::Range<Nanos> = MS / 10..MS / 2;
/// How long the group has to be protected again when all faults are over.
const RECOVERS_WITHIN: Nanos = 120 * SECOND;
/// How long a guard against a simulation that does not end lets it be.
const LONGEST: Nanos = 3600 * SECOND;

/// What came of a simulation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What happened in all.
    pub steps: u64,
    /// Messages to and from the coordinator.
    pub messages: u64,
    /// Simulated time.
    pub took: Nanos,
    /// Faults.
    pub faults: u64,
    /// Cuts that became permanent.
    pub cuts: u64,
    /// Cuts that did not.
    pub invalid: u64,
    /// Times the group went back to a cut.
    pub recoveries: u64,
    /// Times it was not protected any more.
    pub unprotected: u64,
    /// Members that were lost.
    pub lost: u64,
    /// Checkpoints that were stored.
    pub stored: u64,
    /// Frames that left the group.
    pub outputs: u64,
    /// From the request for a cut until it was permanent, of all cuts together.
    pub cut_time: Nanos,
}

/// Something that happens.
#[derive(Clone, Debug)]
pub(super) enum Happening {
    Look,
    Tick {
        process: usize,
    },
    LeaseEnds {
        process: usize,
    },
    Called {
        process: usize,
    },
    Work {
        process: usize,
    },
    Connect {
        process: usize,
    },
    Hello {
        link: u64,
        process: usize,
        hello: Envelope<SeatHello>,
    },
    Said {
        link: u64,
        process: usize,
        said: Envelope<FromSeat>,
    },
    Heard {
        link: u64,
        process: usize,
        heard: Envelope<ToSeat>,
    },
    AgentHello {
        run: u64,
        host: u16,
    },
    AgentSaid {
        run: u64,
        said: Envelope<FromAgent>,
    },
    AgentHeard {
        host: u16,
        heard: Envelope<ToAgent>,
    },
    StandbyStarts {
        host: u16,
        seat: Seat,
    },
    Arrives {
        from: MemberId,
        frame: Frame,
    },
    Shipped {
        from: usize,
        to: usize,
        shipment: Shipment,
    },
    Holds {
        process: usize,
        epoch: Epoch,
    },
    StandbyLost {
        process: usize,
    },
    WantsCheckpoint,
    SnapshotPrepared {
        process: usize,
        id: CheckpointId,
    },
    SnapshotOver {
        process: usize,
        id: CheckpointId,
        snapshot: Uuid,
    },
    CoordinatorStarts,
    HostStarts {
        host: u16,
    },
    Faults,
}

/// All there is.
pub struct World {
    pub(super) options: Options,
    pub(super) rng: fastrand::Rng,
    pub(super) now: Nanos,
    order: u64,
    queue: BTreeMap<(Nanos, u64), Happening>,
    /// When the last message between two ends arrives: none overtakes another.
    arrivals: BTreeMap<(usize, usize), Nanos>,
    pub(super) hosts: Vec<bool>,
    pub(super) processes: Vec<Process>,
    pub(super) coordinator: Option<Engine>,
    /// Which coordinator it is.
    pub(super) run: u64,
    pub(super) journal: Record,
    pub(super) links: BTreeMap<Seat, usize>,
    next_link: u64,
    /// When the coordinator looks next.
    looks_at: Nanos,
    pub(super) route: BTreeMap<MemberId, usize>,
    pub(super) released: BTreeMap<MemberId, BTreeSet<u64>>,
    /// What guests were at their cuts.
    pub(super) taken: BTreeMap<(MemberId, Epoch), Guest>,
    /// What members have stored.
    pub(super) snapshots: Snapshots,
    /// What was asked for.
    pub(super) requests: u64,
    pub(super) frames: u64,
    pub(super) noise_until: Nanos,
    pub(super) partitions: Vec<Nanos>,
    /// The coordinator dies after so many of its next actions, and is back after a while.
    pub(super) dies_after: Option<(u8, Nanos)>,
    faults_until: Nanos,
    requested: BTreeMap<Epoch, Nanos>,
    pub(super) outcome: Outcome,
    trace: Vec<String>,
}

impl World {
    /// The world before anything happens.
    pub fn new(seed: u64, options: &Options) -> Self {
        let group = GroupId(uuid::Uuid::from_u64_pair(seed, 1));
        let record = Record::new(group, options.spec()).expect("a group of the simulation is valid");
        let mut world = Self {
            options: *options,
            rng: fastrand::Rng::with_seed(seed),
            now: SECOND,
            order: 0,
            queue: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            hosts: vec![true; usize::from(options.hosts)],
            processes: Vec::new(),
            coordinator: None,
            run: 0,
            journal: record,
            links: BTreeMap::new(),
            next_link: 0,
            looks_at: Nanos::MAX,
            route: BTreeMap::new(),
            released: BTreeMap::new(),
            taken: BTreeMap::new(),
            snapshots: Snapshots::new(),
            requests: 0,
            frames: 0,
            noise_until: 0,
            partitions: vec![0; usize::from(options.hosts)],
            dies_after: None,
            faults_until: Nanos::MAX,
            requested: BTreeMap::new(),
            outcome: Outcome::default(),
            trace: Vec::new(),
        };
        for member in 0..options.members {
            let seat = Seat {
                member: MemberId(member),
                incarnation: Incarnation::FIRST,
            };
            let machine = Box::new(Member::joining(Identity { group, seat }));
            let role = Role::Member {
                machine,
                vm: Box::new(Vm::new()),
                calls: Default::default(),
                standby: None,
            };
            let process = world.add(member % options.hosts, seat, role);
            world.route.insert(seat.member, process);
            world.after(0, Happening::Work { process });
        }
        world.after(0, Happening::CoordinatorStarts);
        world.after(0, Happening::WantsCheckpoint);
        world
    }

    /// Lets things happen until the faults are over and the group is protected.
    ///
    /// # Errors
    /// Something that must not be, with the trace.
    pub fn run(mut self) -> Result<Outcome, (Violation, Vec<String>)> {
        while !self.is_over() {
            let Some(((at, _), happening)) = self.queue.pop_first() else {
                return Err((Violation("nothing happens any more".to_owned()), self.trace));
            };
            self.now = at;
            self.outcome.steps += 1;
            if let Err(violation) = self.happens(happening).and_then(|()| self.in_time()) {
                return Err((violation, self.trace));
            }
        }
        self.outcome.took = self.now;
        Ok(self.outcome)
    }

    fn is_over(&self) -> bool {
        if self.now < self.faults_until {
            return false;
        }
        let state = self.coordinator.as_ref().map(|engine| engine.status().state);
        matches!(state, Some(State::Protected | State::Dissolved))
    }

    fn in_time(&self) -> Result<(), Violation> {
        let limit = self.faults_until.checked_add(RECOVERS_WITHIN).unwrap_or(LONGEST);
        if self.now <= limit {
            return Ok(());
        }
        let state = self.coordinator.as_ref().map(Engine::status);
        Err(Violation(format!(
            "no progress: long after the last fault the group is {state:#?}"
        )))
    }

    fn happens(&mut self, happening: Happening) -> Result<(), Violation> {
        match happening {
            Happening::Look => self.look()?,
            Happening::Tick { process } => self.tick(process),
            Happening::LeaseEnds { process } => self.lease_ends(process),
            Happening::Called { process } => self.called(process)?,
            Happening::Work { process } => self.work(process),
            Happening::Connect { process } => self.connect(process),
            Happening::Hello { link, process, hello } => {
                if self.processes[process].link == Some(link) {
                    self.links.insert(hello.body.seat, process);
                    self.decide(Input::Event(Event::Hello(hello)))?;
                }
            }
            Happening::Said { link, process, said } => {
                if self.processes[process].link == Some(link) && self.reaches(process) {
                    let seat = self.processes[process].seat;
                    self.decide(Input::Event(Event::Said(seat, said)))?;
                }
            }
            Happening::Heard { link, process, heard } => {
                if self.processes[process].link == Some(link) && self.reaches(process) {
                    self.hear(process, heard);
                }
            }
            Happening::AgentHello { run, host } => self.agent_calls(run, host)?,
            Happening::AgentSaid { run, said } => {
                if run == self.run {
                    self.decide(Input::Event(Event::AgentSaid(said)))?;
                }
            }
            Happening::AgentHeard { host, heard } => self.agent_hears(host, heard),
            Happening::StandbyStarts { host, seat } => self.standby_starts(host, seat),
            Happening::Arrives { from, frame } => self.arrives(from, frame),
            Happening::Shipped { from, to, shipment } => self.shipped(from, to, shipment)?,
            Happening::Holds { process, epoch } => self.holds(process, epoch),
            Happening::StandbyLost { process } => self.standby_lost(process),
            Happening::WantsCheckpoint => self.wants_checkpoint()?,
            Happening::SnapshotPrepared { process, id } => self.snapshot_prepared(process, id),
            Happening::SnapshotOver { process, id, snapshot } => self.snapshot_over(process, id, snapshot),
            Happening::CoordinatorStarts => self.coordinator_starts()?,
            Happening::HostStarts { host } => {
                self.hosts[usize::from(host)] = true;
                self.agent_comes(host);
            }
            Happening::Faults => self.faults()?,
        }
        Ok(())
    }

    fn look(&mut self) -> Result<(), Violation> {
        if self.now == self.looks_at {
            self.looks_at = Nanos::MAX;
            self.decide(Input::Tick)?;
        }
        Ok(())
    }

    /// The coordinator hears of something, and does what it decides.
    pub(super) fn decide(&mut self, input: Input) -> Result<(), Violation> {
        let now = self.now;
        let Some(engine) = &mut self.coordinator else {
            return Ok(());
        };
        self.outcome.messages += u64::from(matches!(input, Input::Event(_)));
        let actions = engine.on(input, now);
        self.act(actions)
    }

    fn act(&mut self, actions: Vec<Action>) -> Result<(), Violation> {
        for action in actions {
            if let Some((left, back_after)) = self.dies_after {
                self.dies_after = Some((left.saturating_sub(1), back_after));
                if left == 0 {
                    self.dies_after = None;
                    self.coordinator_dies(back_after);
                    return Ok(());
                }
            }
            self.do_action(action)?;
        }
        let wakes_at = self.coordinator.as_ref().map(Engine::wakes_at);
        if let Some(at) = wakes_at
            && at < self.looks_at
        {
            self.looks_at = at.max(self.now + 1);
            self.at(self.looks_at, Happening::Look);
        }
        Ok(())
    }

    fn do_action(&mut self, action: Action) -> Result<(), Violation> {
        self.note(|| format!("coordinator: {action:?}"));
        match action {
            Action::Journal(record) => {
                let before = std::mem::replace(&mut self.journal, *record);
                self.check_decision(before.decided)
            }
            Action::JournalCut(cut) => {
                let before = std::mem::replace(&mut self.journal.decided, Decided::Protected { cut });
                self.check_decision(before)
            }
            Action::Say(seat, envelope) => {
                if let ToSeat::CheckpointRequest(cut) = envelope.body {
                    self.requested.entry(cut).or_insert(self.now);
                }
                self.say(seat, envelope);
                Ok(())
            }
            Action::Tell(host, envelope) => {
                let number = host.0.trim_start_matches("host").parse().expect("hosts have numbers");
                self.outcome.messages += 1;
                let takes = self.rng.u64(MESSAGE_TAKES);
                let heard = envelope;
                self.after(takes, Happening::AgentHeard { host: number, heard });
                Ok(())
            }
            Action::Answer(..) => Ok(()),
            Action::Stored(_, cut) => self.stored(&cut),
            Action::Report(report) => self.reported(&report),
        }
    }

    fn reported(&mut self, report: &Report) -> Result<(), Violation> {
        let outcome = &mut self.outcome;
        match report {
            Report::Permanent { cut, .. } => {
                outcome.cuts += 1;
                let begun = self.requested.remove(cut);
                outcome.cut_time += begun.map_or(0, |begun| self.now - begun);
            }
            Report::Invalid { .. } => outcome.invalid += 1,
            Report::RollingBack { .. } => outcome.recoveries += 1,
            Report::Unprotected { .. } => outcome.unprotected += 1,
            Report::Lost { member, reason } => {
                outcome.lost += 1;
                if self.options.faults == Faults::Successive {
                    return Err(Violation(format!(
                        "member {} is lost to a single fault: {reason}",
                        member.0
                    )));
                }
            }
            Report::Protected if self.faults_until == Nanos::MAX => {
                self.faults_until = self.now + self.options.length;
                self.plan_fault();
            }
            _ => {}
        }
        Ok(())
    }

    fn coordinator_starts(&mut self) -> Result<(), Violation> {
        self.run += 1;
        let (engine, actions) = Engine::start(self.journal.clone(), self.now);
        self.coordinator = Some(engine);
        self.note(|| "the coordinator starts".to_owned());
        for host in 0..self.options.hosts {
            self.agent_comes(host);
        }
        self.act(actions)
    }

    pub(super) fn coordinator_dies(&mut self, back_after: Nanos) {
        self.note(|| "the coordinator dies".to_owned());
        self.coordinator = None;
        self.run += 1;
        self.looks_at = Nanos::MAX;
        self.links.clear();
        for process in 0..self.processes.len() {
            self.unlink(process);
        }
        self.after(back_after, Happening::CoordinatorStarts);
    }

    fn plan_fault(&mut self) {
        if let Some(pause) = self.options.faults.pause(&mut self.rng) {
            self.after(pause, Happening::Faults);
        }
    }

    fn faults(&mut self) -> Result<(), Violation> {
        if self.now >= self.faults_until {
            self.noise_until = 0;
            self.partitions.fill(0);
            return Ok(());
        }
        let state = self.coordinator.as_ref().map(|engine| engine.status().state);
        let is_calm = state == Some(State::Protected) && self.hosts.iter().all(|up| *up);
        if self.options.faults != Faults::Successive || is_calm {
            let living = |process: &usize| self.processes[*process].lives;
            let processes: Vec<_> = (0..self.processes.len()).filter(living).collect();
            let hosts = self.options.hosts;
            if let Some(fault) = self.options.faults.next(hosts, &processes, &mut self.rng) {
                self.note(|| format!("FAULT {fault:?}"));
                self.outcome.faults += 1;
                self.fault(fault);
            }
        }
        self.plan_fault();
        Ok(())
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::PowerOff { host, back_after } => self.power_off(host, back_after),
            Fault::Kill { process } => self.kill(process, "it was killed"),
            Fault::Coordinator { back_after } => {
                if self.coordinator.is_some() {
                    self.coordinator_dies(back_after);
                }
            }
            Fault::CoordinatorActing { back_after } => self.dies_after = Some((self.rng.u8(0..12), back_after)),
            Fault::Link { process } => self.unlink(process),
            Fault::Partition { host, length } => self.partitions[usize::from(host)] = self.now + length,
            Fault::Noise { length } => self.noise_until = self.now + length,
            Fault::Replication { process } => self.standby_lost(process),
            Fault::Cut { process } => self.processes[process].fails_cut = true,
            Fault::GuestEnds { process } => self.guest_ends(process),
        }
    }

    /// Whether messages pass between the coordinator and a process.
    pub(super) fn reaches(&self, process: usize) -> bool {
        let process = &self.processes[process];
        process.lives && self.coordinator.is_some() && self.partitions[usize::from(process.host)] <= self.now
    }

    /// When messages over a control link arrive: once and soon, unless there is noise.
    pub(super) fn deliveries(&mut self, link: (usize, usize)) -> Vec<Nanos> {
        self.outcome.messages += 1;
        let takes = self.rng.u64(MESSAGE_TAKES);
        if self.now >= self.noise_until {
            return vec![self.in_order(link, takes)];
        }
        let count = [0, 1, 1, 1, 2][self.rng.usize(0..5)];
        let (rng, now) = (&mut self.rng, self.now);
        (0..count).map(|_| now + takes + rng.u64(0..100 * MS)).collect()
    }

    pub(super) fn in_order(&mut self, link: (usize, usize), takes: Nanos) -> Nanos {
        let last = self.arrivals.entry(link).or_default();
        *last = (*last + 1).max(self.now + takes);
        *last
    }

    pub(super) fn new_link(&mut self) -> u64 {
        self.next_link += 1;
        self.next_link
    }

    /// The last cut that the journal says is permanent.
    pub(super) fn permanent(&self) -> Option<Epoch> {
        self.journal.permanent()
    }

    /// The group's members, as the journal has them.
    pub(super) fn members(&self) -> impl Iterator<Item = MemberId> {
        self.journal.primaries().map(|primary| primary.seat.member)
    }

    pub(super) fn group(&self) -> GroupId {
        self.journal.group
    }

    pub(super) fn heartbeat(&self) -> Nanos {
        nanos(self.journal.spec.timing.heartbeat)
    }

    pub(super) fn envelope<T>(&self, body: T) -> Envelope<T> {
        Envelope {
            group: self.journal.group,
            generation: self.journal.generation,
            body,
        }
    }

    pub(super) fn after(&mut self, takes: Nanos, happening: Happening) {
        self.at(self.now + takes, happening);
    }

    pub(super) fn at(&mut self, at: Nanos, happening: Happening) {
        self.order += 1;
        self.queue.insert((at, self.order), happening);
    }

    pub(super) fn note(&mut self, what: impl FnOnce() -> String) {
        if self.options.trace {
            let at = self.now;
            self.trace
                .push(format!("{}.{:06} {}", at / SECOND, at % SECOND / 1000, what()));
        }
    }

    fn agent_calls(&mut self, run: u64, host: u16) -> Result<(), Violation> {
        if run != self.run || !self.hosts[usize::from(host)] {
            return Ok(());
        }
        let here = self
            .processes
            .iter()
            .filter(|process| process.lives && process.host == host);
        let hello = AgentHello {
            host: Host(format!("host{host}")),
            seats: here.map(|process| (self.journal.group, process.seat)).collect(),
        };
        self.decide(Input::Event(Event::AgentHello(hello)))
    }
}
