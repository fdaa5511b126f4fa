//! The world of the model: the state machines, what is on its way between them, and what guests, gates and images are.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::checkpoint::{CheckpointId, StoredSnapshot};
use crate::engine::{Action, Decided, Event, Group, Record};
use crate::id::{Epoch, Generation, GroupId, Host, Identity, Incarnation, MemberId, Seat};
use crate::lease::Nanos;
use crate::member::{self, Member};
use crate::message::{AgentHello, Envelope, FromAgent, FromSeat, SeatHello, ToAgent, ToSeat};
use crate::sim::{Frame, Guest, Image, Shipment, Violation, Vm};
use crate::spec::{GroupSpec, Interval, MemberSpec, Timing};
use crate::standby::{self, Standby};
use crate::vm::{CutReport, MemberStatus, Notice, StandbyAddress, StandbyNotice};

use super::Bounds;

/// Something on its way; between two ends in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Packet {
    Said(Envelope<FromSeat>),
    Heard(Envelope<ToSeat>),
    Hello(Envelope<SeatHello>),
    Shipped(Shipment),
    Holds(Epoch),
    /// A member's own snapshot is prepared.
    Prepared(CheckpointId),
    /// It is permanent, of this cut.
    Stored(CheckpointId, Epoch),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Role {
    Member {
        machine: Box<Member>,
        vm: Box<Vm>,
        standby: Option<usize>,
    },
    Standby {
        machine: Box<Standby>,
        image: Image,
    },
    Dead {
        image: Option<Image>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pub seat: Seat,
    pub role: Role,
    /// Leases that have ended.
    pub clock: u64,
    /// Of the last heartbeat that the coordinator heard.
    pub heard: u64,
}

/// The coordinator's end of links.
pub(super) const COORDINATOR: usize = usize::MAX;
/// Longer than any lease.
const LAPSE: Nanos = 1_000_000_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub left: Bounds,
    pub group: Group,
    pub journal: Record,
    pub processes: Vec<Process>,
    /// What is on its way, by its two ends.
    pub network: BTreeMap<(usize, usize), Vec<Packet>>,
    pub route: Vec<usize>,
    pub released: BTreeMap<MemberId, BTreeSet<u64>>,
    pub taken: BTreeMap<(MemberId, Epoch), Guest>,
    pub frames: u64,
    /// The coordinator dies after so many of its next actions.
    pub dies_after: Option<u8>,
    pub violation: Option<String>,
    pub recovered: bool,
    /// What whoever asked was told.
    pub answers: Vec<Result<Epoch, String>>,
}

impl World {
    /// A group that is protected, at its first cut.
    pub fn new(bounds: Bounds) -> Self {
        let host = |number: usize| Host(format!("h{number}"));
        let members = usize::from(bounds.members);
        let spec = GroupSpec {
            name: "g".to_owned(),
            members: (0..members)
                .map(|number| MemberSpec {
                    name: format!("{number}"),
                    host: host(number),
                    restore: None,
                })
                .collect(),
            backups: (members..2 * members).map(host).collect(),
            interval: Interval::default(),
            timing: Timing::default(),
        };
        let group = GroupId(Uuid::nil());
        let record = Record::new(group, spec).expect("a group of the model is valid");
        let (engine, _) = Group::start(record.clone());
        let processes = (0..bounds.members).map(|member| {
            let seat = Seat {
                member: MemberId(member),
                incarnation: Incarnation::FIRST,
            };
            let machine = Box::new(Member::joining(Identity { group, seat }));
            let role = Role::Member {
                machine,
                vm: Box::new(Vm::new()),
                standby: None,
            };
            Process {
                seat,
                role,
                clock: 0,
                heard: 0,
            }
        });
        let mut world = Self {
            left: bounds,
            journal: engine.record().clone(),
            group: engine,
            processes: processes.collect(),
            network: BTreeMap::new(),
            route: (0..members).collect(),
            released: BTreeMap::new(),
            taken: BTreeMap::new(),
            frames: 0,
            dies_after: None,
            violation: None,
            recovered: false,
            answers: Vec::new(),
        };
        world.form(members);
        world
    }

    pub fn form(&mut self, members: usize) {
        for process in 0..members {
            self.calls(process);
        }
        self.calm();
        for host in members..2 * members {
            let hello = AgentHello {
                host: Host(format!("h{host}")),
                seats: Vec::new(),
            };
            self.decide(Event::AgentHello(hello));
        }
        self.calm();
        for process in 0..self.processes.len() {
            self.beats(process);
        }
        self.calm();
        self.decide(Event::Due);
        self.calm();
        assert!(self.is_protected(), "the group forms: {:#?}", self.group);
        assert_eq!(self.violation, None);
    }

    /// All that is on its way arrives.
    pub fn calm(&mut self) {
        while let Some(&(from, to)) = self.network.keys().next() {
            self.arrives(from, to);
        }
    }

    pub fn is_protected(&self) -> bool {
        matches!(self.journal.decided, Decided::Protected { .. })
    }

    pub fn envelope<T>(&self, generation: Generation, body: T) -> Envelope<T> {
        Envelope {
            group: self.journal.group,
            generation,
            body,
        }
    }

    pub fn send(&mut self, from: usize, to: usize, packet: Packet) {
        self.network.entry((from, to)).or_default().push(packet);
    }

    pub fn take_first(&mut self, from: usize, to: usize) -> Option<Packet> {
        let queue = self.network.get_mut(&(from, to))?;
        let packet = queue.remove(0);
        if queue.is_empty() {
            self.network.remove(&(from, to));
        }
        Some(packet)
    }

    pub fn check(&mut self, result: Result<(), Violation>) {
        if let Err(violation) = result {
            self.violation.get_or_insert(violation.to_string());
        }
    }

    pub fn arrives(&mut self, from: usize, to: usize) {
        let Some(packet) = self.take_first(from, to) else {
            return;
        };
        match packet {
            Packet::Said(said) => {
                if let FromSeat::Heartbeat { sent, .. } = said.body {
                    let seat = self.processes[from].seat;
                    let process = &mut self.processes[from];
                    if self.group.counts(seat) {
                        process.heard = process.heard.max(sent / LAPSE);
                    }
                }
                self.decide(Event::Said(self.processes[from].seat, said));
            }
            Packet::Hello(hello) => self.decide(Event::Hello(hello)),
            Packet::Heard(heard) => match self.processes[to].role {
                Role::Member { .. } => self.member(to, member::Input::Said(heard)),
                Role::Standby { .. } => self.standby(to, standby::Input::Said(heard)),
                Role::Dead { .. } => {}
            },
            Packet::Shipped(shipment) => self.shipped(from, to, shipment),
            Packet::Prepared(id) => self.member(to, member::Input::Notice(Notice::SnapshotPrepared(id))),
            Packet::Stored(id, cut) => {
                let stored = StoredSnapshot {
                    id: Uuid::from_u64_pair(cut, 0),
                    name: String::new(),
                    parent: None,
                    file_bytes: 0,
                    pause_ns: 0,
                };
                self.member(to, member::Input::Notice(Notice::SnapshotOver(id, Ok(stored))));
            }
            Packet::Holds(epoch) => self.member(to, member::Input::Notice(Notice::Holds(epoch))),
        }
    }

    pub fn shipped(&mut self, from: usize, to: usize, shipment: Shipment) {
        let epoch = shipment.epoch;
        let Role::Standby { image, .. } = &mut self.processes[to].role else {
            return;
        };
        let held = image.hold(shipment);
        match held {
            Ok(true) => self.standby(to, standby::Input::Notice(StandbyNotice::Seeded)),
            Ok(false) => {
                self.standby(to, standby::Input::Notice(StandbyNotice::Holds(epoch)));
                self.send(to, from, Packet::Holds(epoch));
            }
            Err(violation) => self.check(Err(violation)),
        }
    }

    pub fn member(&mut self, process: usize, input: member::Input) {
        let now = self.processes[process].clock * LAPSE;
        let Role::Member { machine, .. } = &mut self.processes[process].role else {
            return;
        };
        for what in machine.on(input, now) {
            match what {
                member::Do::Say(said) => self.send(process, COORDINATOR, Packet::Said(said)),
                member::Do::Call(call) => {
                    let result = self.call(process, &call);
                    match result {
                        Ok(()) => self.member(process, member::Input::Did(call, Ok(CutReport::default()))),
                        Err(violation) => self.check(Err(violation)),
                    }
                }
                member::Do::End { .. } => self.processes[process].role = Role::Dead { image: None },
            }
        }
    }

    pub fn call(&mut self, process: usize, call: &member::Call) -> Result<(), Violation> {
        use member::Call;
        let seat = self.processes[process].seat;
        let Role::Member { vm, standby, .. } = &mut self.processes[process].role else {
            return Ok(());
        };
        let (mut shipment, mut own) = (None, None);
        let frames = match call {
            Call::Seed(seeding) => {
                *standby = seeding.address.0.parse().ok();
                shipment = Some(vm.seed(seeding.epoch));
                Vec::new()
            }
            Call::Block(_) => {
                vm.block();
                Vec::new()
            }
            Call::Take(cut) => {
                vm.take(*cut);
                self.taken.insert((seat.member, *cut), vm.guest.clone());
                if let Some((id, _)) = vm.snapshot.take_if(|(_, at)| *at == Some(*cut)) {
                    own = Some(Packet::Stored(id, *cut));
                }
                Vec::new()
            }
            Call::PrepareSnapshot(order) => {
                vm.snapshot = Some((order.id, None));
                own = Some(Packet::Prepared(order.id));
                Vec::new()
            }
            Call::SnapshotAt(cut) => {
                if let Some((_, at)) = &mut vm.snapshot {
                    *at = Some(*cut);
                }
                Vec::new()
            }
            Call::NoSnapshot(_) => {
                vm.snapshot = None;
                Vec::new()
            }
            Call::Validate(cut) => {
                let (epoch, frames) = vm.validate(*cut)?;
                shipment = Some(epoch);
                frames
            }
            Call::Invalidate(cut) => vm.invalidate(*cut),
            Call::Permanent(cut) => vm.permanent(*cut)?,
            Call::RollBack(cut) => {
                vm.roll_back(*cut)?;
                Vec::new()
            }
            Call::Resume => {
                vm.resume();
                self.route[usize::from(seat.member.0)] = process;
                Vec::new()
            }
            Call::Fence => {
                vm.runs = false;
                Vec::new()
            }
            Call::Unprotect => {
                *standby = None;
                vm.unprotect()
            }
        };
        let to = *standby;
        if let Some(own) = own {
            self.send(process, process, own);
        }
        if let (Some(shipment), Some(to)) = (shipment, to) {
            self.send(process, to, Packet::Shipped(shipment));
        }
        self.leave(process, frames);
        self.one_runs(seat.member)
    }

    pub fn one_runs(&self, member: MemberId) -> Result<(), Violation> {
        let of_member = self.processes.iter().filter(|process| process.seat.member == member);
        let running = of_member.filter(|process| matches!(&process.role, Role::Member { vm, .. } if vm.runs));
        match running.count() {
            0 | 1 => Ok(()),
            _ => Err(Violation(format!("two incarnations of member {} run", member.0))),
        }
    }

    pub fn leave(&mut self, process: usize, frames: Vec<Frame>) {
        let from = self.processes[process].seat.member;
        for frame in frames {
            match frame.to {
                Some(to) => {
                    let receiver = self.route[usize::from(to.0)];
                    if let Role::Member { vm, .. } = &mut self.processes[receiver].role {
                        vm.receive(from, frame);
                    }
                }
                None => {
                    self.released.entry(from).or_default().insert(frame.number);
                }
            }
        }
    }

    /// A guest sends something out, and something to the next member.
    pub fn sends(&mut self, process: usize) {
        let member = self.processes[process].seat.member;
        let next = MemberId((member.0 + 1) % self.left.members);
        for to in [None, Some(next)] {
            self.frames += 1;
            let number = self.frames;
            if let Role::Member { vm, .. } = &mut self.processes[process].role
                && let Some(frame) = vm.send(to, number)
            {
                self.leave(process, vec![frame]);
            }
        }
    }

    pub fn standby(&mut self, process: usize, input: standby::Input) {
        let now = self.processes[process].clock * LAPSE;
        let Role::Standby { machine, .. } = &mut self.processes[process].role else {
            return;
        };
        for what in machine.on(input, now) {
            match what {
                standby::Do::Say(said) => self.send(process, COORDINATOR, Packet::Said(said)),
                standby::Do::Call(call) => {
                    self.call_standby(process, call);
                    self.standby(process, standby::Input::Did(call, Ok(())));
                }
                standby::Do::Become(machine) => {
                    if let Role::Standby { image, .. } = &self.processes[process].role {
                        let cut = machine.standing().permanent;
                        match image.promote(cut) {
                            Ok(vm) => {
                                self.processes[process].role = Role::Member {
                                    machine,
                                    vm: Box::new(vm),
                                    standby: None,
                                }
                            }
                            Err(violation) => self.check(Err(violation)),
                        }
                    }
                }
                standby::Do::End(_) => self.dies(process),
            }
        }
    }

    pub fn call_standby(&mut self, process: usize, call: standby::Call) {
        if let (standby::Call::Permanent(cut), Role::Standby { image, .. }) = (call, &mut self.processes[process].role)
        {
            image.permanent(cut);
        }
    }

    pub fn dies(&mut self, process: usize) {
        let image = match &self.processes[process].role {
            Role::Standby { image, .. } => Some(image.clone()),
            _ => None,
        };
        self.processes[process].role = Role::Dead { image };
        self.network.retain(|(from, to), _| *from != process && *to != process);
    }

    pub fn beats(&mut self, process: usize) {
        match self.processes[process].role {
            Role::Member { .. } => self.member(process, member::Input::Tick(MemberStatus::default())),
            Role::Standby { .. } => self.standby(process, standby::Input::Tick),
            Role::Dead { .. } => {}
        }
    }

    pub fn decide(&mut self, event: Event) {
        let actions = self.group.on(event);
        self.act(actions);
    }

    pub fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match &mut self.dies_after {
                Some(0) => return self.restarts(),
                Some(left) => *left -= 1,
                None => {}
            }
            match action {
                Action::Journal(record) => {
                    let before = std::mem::replace(&mut self.journal, *record).decided;
                    let result = self.check_decision(before);
                    self.check(result);
                }
                Action::JournalCut(cut) => {
                    let before = std::mem::replace(&mut self.journal.decided, Decided::Protected { cut });
                    let result = self.check_decision(before);
                    self.check(result);
                }
                Action::Say(seat, heard) => {
                    if let Some(to) = self.living(seat) {
                        self.send(COORDINATOR, to, Packet::Heard(heard));
                    }
                }
                Action::Tell(_, told) => self.told(told.body),
                Action::Stored(_, cut) => {
                    let result = self.check_stored(&cut);
                    self.check(result);
                    self.answers.push(Ok(cut.cut));
                }
                Action::Answer(_, answer) => self.answers.push(answer),
                Action::Report(_) => {}
            }
        }
    }

    /// Standbys start at once, while the group forms; later ones are not looked at.
    pub fn told(&mut self, told: ToAgent) {
        let ToAgent::StartStandby { seat, .. } = told else {
            return;
        };
        if self.processes.len() >= 2 * usize::from(self.left.members) {
            return;
        }
        let machine = Box::new(Standby::new(Identity {
            group: self.journal.group,
            seat,
        }));
        let role = Role::Standby {
            machine,
            image: Image::default(),
        };
        self.processes.push(Process {
            seat,
            role,
            clock: 0,
            heard: 0,
        });
        let process = self.processes.len() - 1;
        self.calls(process);
        self.calm();
        let address = StandbyAddress(process.to_string());
        let started = self.envelope(self.journal.generation, FromAgent::Started { seat, address });
        self.decide(Event::AgentSaid(started));
    }

    pub fn living(&self, seat: Seat) -> Option<usize> {
        let lives = |process: &Process| process.seat == seat && !matches!(process.role, Role::Dead { .. });
        self.processes.iter().position(lives)
    }

    /// A process calls the coordinator.
    pub fn calls(&mut self, process: usize) {
        let (generation, standing) = match &self.processes[process].role {
            Role::Member { machine, .. } => (machine.generation(), machine.standing()),
            Role::Standby { machine, .. } => (machine.generation(), machine.standing()),
            Role::Dead { .. } => return,
        };
        let body = SeatHello {
            seat: self.processes[process].seat,
            host: Host(format!("h{process}")),
            macs: Vec::new(),
            standing,
        };
        let hello = self.envelope(generation, body);
        self.send(process, COORDINATOR, Packet::Hello(hello));
    }

    /// The coordinator is another; all call it.
    pub fn restarts(&mut self) {
        self.dies_after = None;
        self.network
            .retain(|(from, to), _| *from != COORDINATOR && *to != COORDINATOR);
        let (group, actions) = Group::start(self.journal.clone());
        self.group = group;
        self.act(actions);
        for process in 0..self.processes.len() {
            // Since it calls only now, it has not been heard since its lease ended.
            self.calls(process);
        }
    }

    /// Whether the coordinator may take a process for dead.
    pub fn may_be_silent(&self, process: usize) -> bool {
        let this = &self.processes[process];
        self.group.watched().contains(&this.seat)
            && match &this.role {
                Role::Dead { .. } => true,
                Role::Member { vm, .. } => !vm.runs && this.heard < this.clock,
                Role::Standby { .. } => false,
            }
    }

    pub fn is_quiet(&self, process: usize) -> bool {
        !self.network.keys().any(|(from, to)| *from == process || *to == process)
    }
}
