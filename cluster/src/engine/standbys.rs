//! How a group comes to be protected: its VMs join, each gets a standby on another host, and that gets its image.
//!
//! What is refused or takes too long is tried elsewhere, and after a while again. A standby may be anywhere but on the
//! host of its VM; of several hosts, the one that keeps the fewest is taken, of equals the one that was named first.

use std::collections::BTreeMap;

use super::group::{Action, Group, Out, Phase, Report, RequestId};
use super::record::{Located, Place};
use crate::id::{Host, Incarnation, MemberId, Seat};
use crate::message::{AgentHello, Ending, FromAgent, Seeding, Stage, Standing, ToAgent, ToSeat};

impl Group {
    pub(super) fn agent_hello(&mut self, hello: AgentHello, out: &mut Out) {
        let AgentHello { host, seats } = hello;
        self.agents.insert(host.clone());
        self.refusing.retain(|(other, _)| *other != host);
        for (group, seat) in seats {
            if group == self.record.group && !self.is_current(seat) && self.is_replaced(seat) {
                self.tell(&host, ToAgent::Kill { seat }, out);
            }
        }
        self.arrange(out);
    }

    /// Whether another incarnation is in the place of `seat`, so that it has no right to run.
    fn is_replaced(&self, seat: Seat) -> bool {
        match self.record.place(seat.member) {
            Some(Place::In { primary, .. }) => primary.seat != seat,
            Some(Place::Lost { was, ending, .. }) => was.seat != seat || *ending == Ending::Replaced,
            Some(Place::Expected) => seat.incarnation != Incarnation::FIRST,
            Some(Place::Ended) => false,
            None => true,
        }
    }

    pub(super) fn agent_said(&mut self, said: FromAgent, out: &mut Out) {
        match said {
            FromAgent::Started { seat, address } => {
                if self.record.is_standby(seat) && !self.addresses.contains_key(&seat) {
                    let number = self.number();
                    self.addresses.insert(seat, (address, number));
                    self.seed(seat.member, out);
                }
            }
            FromAgent::Refused { seat, reason } => self.refused(seat, reason, out),
            FromAgent::Died { seat, reason } => self.fail(seat, reason, out),
        }
    }

    fn refused(&mut self, seat: Seat, reason: String, out: &mut Out) {
        out.push(Action::Report(Report::Refused { seat, reason }));
        let standby = self.record.standbys().find(|standby| standby.seat == seat);
        if let Some(standby) = standby.cloned()
            && matches!(self.phase, Phase::Alone { .. })
        {
            self.refusing.insert((standby.host, seat.member));
            self.failed.insert(seat);
            self.drop_failed_standbys();
            self.arrange(out);
        }
    }

    pub(super) fn drop_failed_standbys(&mut self) {
        for place in &mut self.record.members {
            if let Place::In { standby, .. } = place
                && let Some(dropped) = standby.take_if(|standby| self.failed.remove(&standby.seat))
            {
                self.addresses.remove(&dropped.seat);
            }
        }
    }

    /// A VM that is expected is the first of its member.
    pub(super) fn join_if_expected(&mut self, seat: Seat, host: &Host) {
        if let Some(place @ Place::Expected) = self.record.place_mut(seat.member)
            && seat.incarnation == Incarnation::FIRST
        {
            let host = host.clone();
            *place = Place::In {
                primary: Located { seat, host },
                standby: None,
            };
        }
    }

    /// Once more what was refused, or has not been answered.
    pub(super) fn arrange_again(&mut self, out: &mut Out) {
        self.refusing.clear();
        self.invited.clear();
        let waiting: Vec<_> = self.record.standbys().cloned().collect();
        for standby in waiting {
            if !self.known.contains_key(&standby.seat) || !self.addresses.contains_key(&standby.seat) {
                self.refusing.insert((standby.host, standby.seat.member));
                self.failed.insert(standby.seat);
            }
        }
        self.drop_failed_standbys();
        self.arrange(out);
        self.refusing.clear();
    }

    /// While the group is on its own: has those join that are expected, and starts standbys for those that have none.
    pub(super) fn arrange(&mut self, out: &mut Out) {
        if !matches!(self.phase, Phase::Alone { .. }) {
            return;
        }
        if self.record.expected().next().is_some() {
            return self.invite(out);
        }
        let placed = self.place_standbys();
        if !placed.is_empty() {
            self.journal(out);
        }
        for standby in placed {
            let (seat, vm) = (standby.seat, self.record.name(standby.seat.member).to_owned());
            self.tell(&standby.host, ToAgent::StartStandby { seat, vm }, out);
        }
        self.begin_if_seeded();
    }

    fn invite(&mut self, out: &mut Out) {
        for (member, host) in self.record.expected() {
            if self.agents.contains(host) && self.invited.insert(member) {
                let (seat, vm) = (seat(member, Incarnation::FIRST), self.record.name(member).to_owned());
                let restore = self.record.spec.members.get(usize::from(member.0));
                let restore = restore.and_then(|spec| spec.restore.clone());
                self.tell(host, ToAgent::Join { seat, vm, restore }, out);
            }
        }
    }

    /// Has all members' VMs run that were started paused, to run together.
    pub(super) fn resume_restored(&mut self, by: RequestId, out: &mut Out) {
        if self.record.expected().next().is_some() {
            let reason = "not all of its VMs have joined yet".to_owned();
            return out.push(Action::Answer(by, Err(reason)));
        }
        for primary in self.record.primaries() {
            let (seat, vm) = (primary.seat, self.record.name(primary.seat.member).to_owned());
            self.tell(&primary.host, ToAgent::Resume { seat, vm }, out);
        }
        out.push(Action::Answer(by, Ok(self.last)));
    }

    fn place_standbys(&mut self) -> Vec<Located> {
        let mut kept = BTreeMap::<Host, usize>::new();
        for standby in self.record.standbys() {
            *kept.entry(standby.host.clone()).or_default() += 1;
        }
        let mut placed = Vec::new();
        let (backups, next) = (&self.record.spec.backups, &mut self.record.next);
        for (member, place) in (0..).map(MemberId).zip(&mut self.record.members) {
            let Place::In {
                primary,
                standby: standby @ None,
            } = place
            else {
                continue;
            };
            let may_be = |host: &&Host| {
                **host != primary.host
                    && self.agents.contains(*host)
                    && !self.refusing.contains(&((*host).clone(), member))
            };
            let load = |host: &&Host| kept.get(*host).copied().unwrap_or(0);
            if let Some(host) = backups.iter().filter(may_be).min_by_key(load) {
                let seat = seat(member, *next);
                *next = Incarnation(next.0 + 1);
                *kept.entry(host.clone()).or_default() += 1;
                let located = Located {
                    seat,
                    host: host.clone(),
                };
                placed.push(located.clone());
                *standby = Some(located);
            }
        }
        placed
    }

    /// Sends a member to its standby, if that waits.
    fn seed(&mut self, member: MemberId, out: &mut Out) {
        let Some(Place::In { primary, .. }) = self.record.place(member) else {
            return;
        };
        let seat = primary.seat;
        if let Some(known) = self.known.get(&seat)
            && let Some(seeding) = self.seeding(seat, known.standing)
        {
            self.say(seat, seeding, out);
        }
    }

    /// What sends a member to its standby, if that waits and the member has not heard of it.
    pub(super) fn seeding(&self, seat: Seat, standing: Standing) -> Option<ToSeat> {
        let Some(Place::In {
            standby: Some(standby), ..
        }) = self.record.place(seat.member)
        else {
            return None;
        };
        let (address, number) = self.addresses.get(&standby.seat)?;
        let seeding = || Seeding {
            standby: standby.seat,
            address: address.clone(),
            macs: self.macs.values().flatten().copied().collect(),
            epoch: number + 1,
        };
        (standing.cut < *number).then(|| ToSeat::SeedTo(seeding()))
    }

    /// A member has brought its standby up.
    pub(super) fn seeded(&mut self, seat: Seat, standby: Seat, out: &mut Out) {
        if self.record.is_primary(seat)
            && let Some(&(_, number)) = self.addresses.get(&standby)
            && standby.member == seat.member
            && let Some(known) = self.known.get_mut(&seat)
        {
            known.standing.stage = Stage::Ready;
            known.standing.cut = number;
            self.arrange(out);
        }
    }

    /// When all members have joined and are ready, cuts are taken.
    fn begin_if_seeded(&mut self) {
        let is_ready = |place: &Place| match place {
            Place::In {
                primary,
                standby: Some(standby),
            } => {
                let stands = self.known.get(&primary.seat).map(|known| known.standing);
                let number = self.addresses.get(&standby.seat).map(|(_, number)| *number);
                let is_seeded = stands.is_some_and(|at| at.stage == Stage::Ready && Some(at.cut) == number);
                is_seeded && self.known.contains_key(&standby.seat)
            }
            Place::In { standby: None, .. } | Place::Expected => false,
            Place::Ended | Place::Lost { .. } => true,
        };
        if self.record.primaries().next().is_some() && self.record.members.iter().all(is_ready) {
            self.phase = Phase::Idle;
        }
    }
}

fn seat(member: MemberId, incarnation: Incarnation) -> Seat {
    Seat { member, incarnation }
}
