//! The coordinator of a group, pure: hears what happens and when, says what is to be done.
//!
//! ```text
//!  messages ──► Engine ── who is silent, what is due, what is late ──► Group ──► actions
//!  Tick     ──►   └─ learns what cuts cost
//! ```
//! [`Group`] decides without time, and can be looked at in all its states (see the tests); this adds time. A runtime does
//! the actions in order, and gives a [`Input::Tick`] when [`Engine::wakes_at`] is reached.

mod cut;
mod group;
mod interval;
mod record;
mod recovery;
mod standbys;
mod status;
mod storing;

use std::collections::BTreeMap;

pub use group::{Action, Event, Group, Report, Request, RequestId};
pub use interval::Pace;
pub use record::{Decided, Located, Place, Record};
pub use status::{GroupStatus, MemberState, State};

use crate::error::Error;
use crate::id::{GroupId, Seat};
use crate::lease::{Nanos, nanos};
use crate::message::FromSeat;
use crate::spec::GroupSpec;
use crate::vm::MemberStatus;

/// What happens to a coordinator.
#[derive(Clone, Debug)]
pub enum Input {
    /// Something that is not a matter of time. Never [`Event::Silent`], [`Event::Due`] or [`Event::Late`]: that is decided
    /// here.
    Event(Event),
    /// Time has passed.
    Tick,
}

/// The coordinator of a group.
#[derive(Clone, Debug)]
pub struct Engine {
    group: Group,
    pace: Pace,
    /// When each was last heard.
    heard: BTreeMap<Seat, Nanos>,
    statuses: BTreeMap<Seat, MemberStatus>,
    /// What the group is at, and since when.
    stage: (group::Stretch, Nanos),
    /// When the last cut was begun.
    begun: Nanos,
    /// When it is looked who is silent.
    looks_at: Nanos,
    reports: status::Totals,
}

impl Engine {
    /// A group that is new.
    ///
    /// # Errors
    /// There cannot be such a group.
    pub fn create(group: GroupId, spec: GroupSpec, now: Nanos) -> Result<(Self, Vec<Action>), Error> {
        Ok(Self::start(Record::new(group, spec)?, now))
    }

    /// Takes over the group that the journal says this of.
    pub fn start(record: Record, now: Nanos) -> (Self, Vec<Action>) {
        let pace = Pace::new(record.spec.interval);
        let (group, actions) = Group::start(record);
        let mut engine = Self {
            stage: (group.stretch(), now),
            heard: BTreeMap::new(),
            statuses: BTreeMap::new(),
            group,
            pace,
            begun: now,
            looks_at: now,
            reports: status::Totals::default(),
        };
        engine.note(&actions, now);
        (engine, actions)
    }

    /// Nobody is silent before `at`: after a coordinator has taken over, it has to be found first.
    pub fn wait_for_calls(&mut self, at: Nanos) {
        self.heard = self.group.watched().into_iter().map(|seat| (seat, at)).collect();
    }

    /// What is to be done about `input`.
    pub fn on(&mut self, input: Input, now: Nanos) -> Vec<Action> {
        self.forgive(now);
        let actions = match input {
            Input::Event(event) => {
                self.hear(&event, now);
                self.group.on(event)
            }
            Input::Tick => self.tick(now),
        };
        self.note(&actions, now);
        actions
    }

    /// When the next [`Input::Tick`] is to come at the latest.
    pub fn wakes_at(&self) -> Nanos {
        let next = [Some(self.looks_at), self.due_at(), self.late_at()];
        next.into_iter().flatten().min().unwrap_or(self.looks_at)
    }

    /// What the journal is to say.
    pub fn record(&self) -> &Record {
        self.group.record()
    }

    /// How many bytes of the checkpoint that is being stored are copied, and how many there are, as far as that is known.
    pub fn store_progress(&self) -> Option<(u64, u64)> {
        let statuses = self
            .record()
            .primaries()
            .filter_map(|primary| self.statuses.get(&primary.seat));
        let add = |(done, total), status: &MemberStatus| (done + status.stored_bytes, total + status.to_store_bytes);
        self.group.is_storing().then(|| statuses.fold((0, 0), add))
    }

    /// How the group is doing.
    pub fn status(&self) -> GroupStatus {
        status::of(&self.group, &self.statuses, &self.reports, self.pace.duration())
    }

    fn hear(&mut self, event: &Event, now: Nanos) {
        let seat = match event {
            Event::Hello(hello) => hello.body.seat,
            Event::Said(seat, said) => {
                if let FromSeat::Heartbeat { status, .. } = said.body {
                    self.statuses.insert(*seat, status);
                }
                *seat
            }
            _ => return,
        };
        if self.group.counts(seat) {
            self.heard.insert(seat, now);
        }
    }

    fn tick(&mut self, now: Nanos) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.looks_at <= now {
            self.look(now, &mut actions);
        }
        if self.due_at().is_some_and(|due| due <= now) {
            actions.extend(self.group.on(Event::Due));
        }
        if self.late_at().is_some_and(|late| late <= now) {
            self.stage.1 = now;
            actions.extend(self.group.on(Event::Late));
        }
        actions
    }

    /// Looks who is silent.
    fn look(&mut self, now: Nanos, actions: &mut Vec<Action>) {
        let timing = self.record().spec.timing;
        self.looks_at = now + nanos(timing.heartbeat) / 2;
        let watched = self.group.watched();
        let was_heard = |seat| self.heard.get(seat).copied().unwrap_or(now);
        self.heard = watched.iter().map(|seat| (*seat, was_heard(seat))).collect();
        for seat in watched {
            let is_silent = |at: &Nanos| now.saturating_sub(*at) >= nanos(timing.suspicion);
            if self.heard.get(&seat).is_some_and(is_silent) {
                actions.extend(self.group.on(Event::Silent(seat)));
            }
        }
    }

    /// Whoever was late himself cannot say that others were silent: what they said may wait to be heard.
    fn forgive(&mut self, now: Nanos) {
        let own = now.saturating_sub(self.looks_at);
        if own >= nanos(self.record().spec.timing.heartbeat) {
            for heard in self.heard.values_mut() {
                *heard = (*heard + own).min(now).max(*heard);
            }
            self.stage.1 = (self.stage.1 + own).min(now);
            self.looks_at = now;
        }
    }

    /// Learns from what is about to be done.
    fn note(&mut self, actions: &[Action], now: Nanos) {
        for action in actions {
            if let Action::Report(report) = action {
                if let Report::Permanent { cost, .. } = report {
                    self.pace.learn(cost, now.saturating_sub(self.begun));
                }
                self.reports.note(report);
            }
        }
        let stretch = self.group.stretch();
        if stretch != self.stage.0 {
            if stretch.begins_cut() {
                self.begun = now;
            }
            self.stage = (stretch, now);
        }
    }

    fn due_at(&self) -> Option<Nanos> {
        let waits = matches!(self.stage.0, group::Stretch::Idle);
        waits.then(|| self.begun.saturating_add(self.pace.interval()))
    }

    fn late_at(&self) -> Option<Nanos> {
        let limit = self.stage.0.limit(&self.record().spec.timing)?;
        Some(self.stage.1.saturating_add(nanos(limit)))
    }
}

#[cfg(test)]
mod tests;
