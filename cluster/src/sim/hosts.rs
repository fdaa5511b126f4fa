//! Hosts of the simulation: processes that come and go, their links, and the calls that their machines ask for.

use super::MS;
use super::check::Violation;
use super::process::{Process, Role};
use super::vm::Image;
use super::world::{Happening, World};
use crate::engine::{Event, Input};
use crate::id::{Host, Identity, Incarnation, Seat};
use crate::lease::Nanos;
use crate::member::Call;
use crate::message::{Ending, Envelope, FromAgent, FromSeat, Stage, ToAgent, ToSeat};
use crate::standby::Standby;
use crate::vm::{CutReport, MemberStatus, Notice, StandbyAddress};
use crate::{member, standby};

/// Where the coordinator is, as an end of links.
const COORDINATOR: usize = usize::MAX;

impl World {
    pub(super) fn add(&mut self, host: u16, seat: Seat, role: Role) -> usize {
        let process = Process::new(host, seat, role, &mut self.rng);
        self.processes.push(process);
        self.processes.len() - 1
    }

    /// A call is answered when its time has passed.
    fn call_soon(&mut self, process: usize) {
        let takes = match &self.processes[process].role {
            Role::Member { calls, .. } => match calls.front() {
                Some(member::Do::Call(Call::Take(_))) => MS..5 * MS,
                Some(member::Do::Call(Call::RollBack(_))) => 5 * MS..50 * MS,
                Some(member::Do::Call(Call::Seed(_))) => 20 * MS..400 * MS,
                _ => MS / 50..MS / 5,
            },
            Role::Standby { .. } => 5 * MS..50 * MS,
            Role::Free(_) => return,
        };
        let takes = self.rng.u64(takes);
        self.after(takes, Happening::Called { process });
    }

    pub(super) fn member_input(&mut self, process: usize, input: member::Input) {
        let now = self.now;
        let this = &mut self.processes[process];
        let clock = this.clock(now);
        let Role::Member { machine, calls, .. } = &mut this.role else {
            return;
        };
        if !this.lives {
            return;
        }
        let was_idle = calls.is_empty();
        let mut says = Vec::new();
        for what in machine.on(input, clock) {
            match what {
                member::Do::Say(envelope) => says.push(envelope),
                other => calls.push_back(other),
            }
        }
        let begins = was_idle && !calls.is_empty();
        let lease_ends = machine.stops_at().map(|at| this.until(at, now));
        for envelope in says {
            self.answer(process, envelope);
        }
        if begins {
            self.call_soon(process);
        }
        if let Some(until) = lease_ends {
            self.after(until, Happening::LeaseEnds { process });
        }
    }

    pub(super) fn standby_input(&mut self, process: usize, input: standby::Input) {
        let now = self.now;
        let this = &mut self.processes[process];
        let clock = this.clock(now);
        let Role::Standby { machine, calls, .. } = &mut this.role else {
            return;
        };
        if !this.lives {
            return;
        }
        let was_idle = calls.is_empty();
        let mut says = Vec::new();
        let mut ends = false;
        for what in machine.on(input, clock) {
            match what {
                standby::Do::Say(envelope) => says.push(envelope),
                standby::Do::Call(call) => calls.push_back(call),
                standby::Do::End(_) => ends = true,
                // It became one when it was promoted, below.
                standby::Do::Become(_) => {}
            }
        }
        if was_idle && !calls.is_empty() {
            self.call_soon(process);
        }
        for envelope in says {
            self.answer(process, envelope);
        }
        if ends {
            self.kill(process, "it was not wanted any more");
        }
    }

    /// A call is made, and has returned.
    pub(super) fn called(&mut self, process: usize) -> Result<(), Violation> {
        if !self.processes[process].lives {
            return Ok(());
        }
        match &mut self.processes[process].role {
            Role::Member { calls, .. } => {
                let what = calls.pop_front();
                let more = !calls.is_empty();
                match what {
                    Some(member::Do::Call(call)) => {
                        let result = self.call(process, &call)?;
                        self.member_input(process, member::Input::Did(call, result));
                    }
                    Some(member::Do::End { ending, last }) => {
                        if let Some(last) = last {
                            self.answer(process, last);
                        }
                        self.end(process, ending);
                        return Ok(());
                    }
                    Some(member::Do::Say(_)) | None => {}
                }
                if more {
                    self.call_soon(process);
                }
            }
            Role::Standby { calls, .. } => {
                let Some(call) = calls.pop_front() else { return Ok(()) };
                let more = !calls.is_empty();
                self.call_standby(process, call)?;
                if more {
                    self.call_soon(process);
                }
            }
            Role::Free(_) => {}
        }
        Ok(())
    }

    fn call_standby(&mut self, process: usize, call: standby::Call) -> Result<(), Violation> {
        let now = self.now;
        let this = &mut self.processes[process];
        let clock = this.clock(now);
        let Role::Standby { machine, image, .. } = &mut this.role else {
            return Ok(());
        };
        match call {
            standby::Call::Permanent(cut) => {
                image.permanent(cut);
                self.standby_input(process, standby::Input::Did(call, Ok(())));
            }
            standby::Call::Promote(cut) => {
                let vm = image.promote(cut)?;
                let mut says = Vec::new();
                let mut member = None;
                for what in machine.on(standby::Input::Did(call, Ok(())), clock) {
                    match what {
                        standby::Do::Become(machine) => member = Some(machine),
                        standby::Do::Say(envelope) => says.push(envelope),
                        _ => {}
                    }
                }
                let machine = member.ok_or_else(|| Violation("a promoted standby is no member".to_owned()))?;
                this.role = Role::Member {
                    machine,
                    vm: Box::new(vm),
                    calls: Default::default(),
                    standby: None,
                };
                self.after(0, Happening::Work { process });
                for envelope in says {
                    self.answer(process, envelope);
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, process: usize, call: &Call) -> Result<Result<CutReport, String>, Violation> {
        self.note(|| format!("process {process}: {call:?}"));
        let nothing = Ok(Ok(CutReport::default()));
        let is_cut = matches!(call, Call::Take(_));
        let fails = is_cut && std::mem::take(&mut self.processes[process].fails_cut);
        let seat = self.processes[process].seat;
        let target = |address: &StandbyAddress| address.0.parse::<usize>().ok();
        let Role::Member { vm, standby, .. } = &mut self.processes[process].role else {
            return nothing;
        };
        match call {
            Call::Seed(seeding) => {
                *standby = target(&seeding.address);
                let shipment = vm.seed(seeding.epoch);
                let to = *standby;
                if !to.is_some_and(|to| self.processes[to].lives) {
                    return Ok(Err("the standby is not there".to_owned()));
                }
                self.ship(process, shipment);
            }
            Call::Block(_) => vm.block(),
            Call::Take(cut) => {
                if fails {
                    return Ok(Err("a fault".to_owned()));
                }
                vm.take(*cut);
                let guest = vm.guest.clone();
                let pause_ns = self.rng.u64(MS / 10..2 * MS);
                self.taken.insert((seat.member, *cut), guest);
                self.snapshot_taken(process, *cut);
                return Ok(Ok(CutReport {
                    pause_ns,
                    ..CutReport::default()
                }));
            }
            Call::Validate(cut) => {
                let (shipment, frames) = vm.validate(*cut)?;
                self.leave(process, frames);
                self.ship(process, shipment);
            }
            Call::Invalidate(cut) => {
                let frames = vm.invalidate(*cut);
                self.leave(process, frames);
            }
            Call::Permanent(cut) => {
                let frames = vm.permanent(*cut)?;
                self.leave(process, frames);
            }
            Call::RollBack(cut) => vm.roll_back(*cut)?,
            Call::Resume => {
                vm.resume();
                self.route.insert(seat.member, process);
                self.one_runs(seat)?;
            }
            Call::Fence => vm.runs = false,
            Call::Unprotect => {
                *standby = None;
                let frames = vm.unprotect();
                self.leave(process, frames);
            }
            Call::PrepareSnapshot(_) | Call::SnapshotAt(_) | Call::NoSnapshot(_) => self.call_snapshot(process, call),
        }
        nothing
    }

    fn one_runs(&self, seat: Seat) -> Result<(), Violation> {
        let of_member = self
            .processes
            .iter()
            .filter(|process| process.seat.member == seat.member);
        let running = of_member.filter(|process| process.vm().is_some_and(|vm| vm.runs));
        let running: Vec<_> = running.map(|process| process.seat.to_string()).collect();
        match running.len() {
            0 | 1 => Ok(()),
            _ => Err(Violation(format!("two incarnations run: {}", running.join(", ")))),
        }
    }

    fn end(&mut self, process: usize, ending: Ending) {
        if ending == Ending::Replaced {
            return self.kill(process, "it was replaced");
        }
        self.unlink(process);
        let this = &mut self.processes[process];
        if let Role::Member { vm, .. } = &this.role {
            this.role = Role::Free(vm.clone());
        }
    }

    /// A process says something to the coordinator.
    fn answer(&mut self, process: usize, said: Envelope<FromSeat>) {
        let Some(link) = self.processes[process].link else {
            return;
        };
        if !self.reaches(process) {
            return;
        }
        if !matches!(said.body, FromSeat::Heartbeat { .. }) {
            self.note(|| format!("process {process} says {said:?}"));
        }
        for at in self.deliveries((process, COORDINATOR)) {
            let said = said.clone();
            self.at(at, Happening::Said { link, process, said });
        }
    }

    /// The coordinator says something to a process.
    pub(super) fn say(&mut self, seat: Seat, heard: Envelope<ToSeat>) {
        let Some(&process) = self.links.get(&seat) else { return };
        let Some(link) = self.processes[process].link else {
            return;
        };
        if !self.reaches(process) {
            return;
        }
        for at in self.deliveries((COORDINATOR, process)) {
            let heard = heard.clone();
            self.at(at, Happening::Heard { link, process, heard });
        }
    }

    pub(super) fn hear(&mut self, process: usize, heard: Envelope<ToSeat>) {
        if !matches!(heard.body, ToSeat::Lease { .. }) {
            self.note(|| format!("process {process} hears {heard:?}"));
        }
        match &self.processes[process].role {
            Role::Member { .. } => self.member_input(process, member::Input::Said(heard)),
            Role::Standby { .. } => self.standby_input(process, standby::Input::Said(heard)),
            Role::Free(_) => {}
        }
    }

    pub(super) fn tick(&mut self, process: usize) {
        match &self.processes[process].role {
            Role::Member { .. } => self.member_input(process, member::Input::Tick(MemberStatus::default())),
            Role::Standby { .. } => self.standby_input(process, standby::Input::Tick),
            Role::Free(_) => return,
        }
        if self.processes[process].lives {
            let heartbeat = self.heartbeat();
            self.after(heartbeat, Happening::Tick { process });
        }
    }

    pub(super) fn lease_ends(&mut self, process: usize) {
        let this = &self.processes[process];
        let Role::Member { machine, .. } = &this.role else {
            return;
        };
        if machine.stops_at().is_some_and(|at| at <= this.clock(self.now)) {
            self.member_input(process, member::Input::Tick(MemberStatus::default()));
        }
    }

    pub(super) fn connect(&mut self, process: usize) {
        if !self.processes[process].lives || self.processes[process].link.is_some() {
            return;
        }
        if !self.reaches(process) {
            let again = self.rng.u64(5 * MS..50 * MS);
            return self.after(again, Happening::Connect { process });
        }
        let Some((generation, body)) = self.processes[process].hello() else {
            return;
        };
        let hello = Envelope {
            group: self.group(),
            generation,
            body,
        };
        let link = self.new_link();
        self.processes[process].link = Some(link);
        let takes = self.rng.u64(MS / 2..5 * MS);
        let arrives = self.in_order((process, COORDINATOR), takes);
        self.at(arrives, Happening::Hello { link, process, hello });
    }

    /// The link of a process breaks; it calls again.
    pub(super) fn unlink(&mut self, process: usize) {
        if self.processes[process].link.take().is_some() {
            let again = self.rng.u64(MS..50 * MS);
            self.after(again, Happening::Connect { process });
        }
    }

    pub(super) fn kill(&mut self, process: usize, reason: &str) {
        let this = &mut self.processes[process];
        if !std::mem::replace(&mut this.lives, false) {
            return;
        }
        let (seat, host) = (this.seat, this.host);
        self.note(|| format!("process {process}, {seat}, dies: {reason}"));
        if self.hosts[usize::from(host)] {
            let reason = reason.to_owned();
            self.agent_says(host, FromAgent::Died { seat, reason });
        }
        for other in 0..self.processes.len() {
            if matches!(self.processes[other].role, Role::Member { standby: Some(at), .. } if at == process) {
                self.after(MS, Happening::StandbyLost { process: other });
            }
        }
    }

    pub(super) fn power_off(&mut self, host: u16, back_after: Nanos) {
        if !std::mem::replace(&mut self.hosts[usize::from(host)], false) {
            return;
        }
        for process in 0..self.processes.len() {
            if self.processes[process].host == host {
                self.processes[process].lives = false;
            }
        }
        if self.coordinator.is_some() {
            let gone = Event::AgentGone(Host(format!("host{host}")));
            if let Some(engine) = &mut self.coordinator {
                engine.on(Input::Event(gone), self.now);
            }
        }
        self.after(back_after, Happening::HostStarts { host });
    }

    pub(super) fn standby_lost(&mut self, process: usize) {
        if let Role::Member { standby, .. } = &mut self.processes[process].role
            && standby.take().is_some()
        {
            let reason = "the link to it broke".to_owned();
            self.member_input(process, member::Input::Notice(Notice::StandbyLost(reason)));
        }
    }

    pub(super) fn guest_ends(&mut self, process: usize) {
        if let Role::Member { machine, vm, .. } = &mut self.processes[process].role
            && vm.runs
            && !matches!(machine.standing().stage, Stage::Ended)
        {
            vm.runs = false;
            let reason = "shut down".to_owned();
            self.member_input(process, member::Input::Notice(Notice::GuestEnded(reason)));
        }
    }

    /// The agent of a host calls the coordinator.
    pub(super) fn agent_comes(&mut self, host: u16) {
        let run = self.run;
        let takes = self.rng.u64(MS..5 * MS);
        self.after(takes, Happening::AgentHello { run, host });
    }

    fn agent_says(&mut self, host: u16, said: FromAgent) {
        if self.partitions[usize::from(host)] > self.now {
            return;
        }
        let (run, said) = (self.run, self.envelope(said));
        let takes = self.rng.u64(MS / 10..MS);
        self.after(takes, Happening::AgentSaid { run, said });
    }

    pub(super) fn agent_hears(&mut self, host: u16, heard: Envelope<ToAgent>) {
        if !self.hosts[usize::from(host)] {
            return;
        }
        let find = |world: &Self, seat| {
            let here = |process: &Process| process.host == host && process.lives && process.seat == seat;
            world.processes.iter().position(here)
        };
        match heard.body {
            ToAgent::Join { seat, .. } => {
                if let Some(process) = find(self, seat) {
                    self.after(0, Happening::Connect { process });
                    self.after(0, Happening::Tick { process });
                }
            }
            ToAgent::StartStandby { seat, .. } => {
                let takes = self.rng.u64(MS..20 * MS);
                self.after(takes, Happening::StandbyStarts { host, seat });
            }
            // None is started paused here.
            ToAgent::Resume { .. } => {}
            ToAgent::Kill { seat } => {
                if let Some(process) = find(self, seat) {
                    self.kill(process, "the coordinator says so");
                }
            }
        }
    }

    pub(super) fn standby_starts(&mut self, host: u16, seat: Seat) {
        if !self.hosts[usize::from(host)] || seat.incarnation == Incarnation::FIRST {
            return;
        }
        let has_devices =
            |process: &Process| process.lives && process.host == host && process.seat.member == seat.member;
        if self.processes.iter().any(has_devices) {
            let reason = "the devices of the VM are in use here".to_owned();
            return self.agent_says(host, FromAgent::Died { seat, reason });
        }
        let group = self.group();
        let role = Role::Standby {
            machine: Box::new(Standby::new(Identity { group, seat })),
            image: Image::default(),
            calls: Default::default(),
        };
        let process = self.add(host, seat, role);
        self.after(0, Happening::Connect { process });
        self.after(0, Happening::Tick { process });
        let address = StandbyAddress(process.to_string());
        self.agent_says(host, FromAgent::Started { seat, address });
    }
}
