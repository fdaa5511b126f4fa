//! Failures: who takes whose place, and what all go back to.
//!
//! ```text
//!  a member failed, a cut is permanent:  generation + 1, standby in its place │ journal │ RollBack, Promote ► AtCut, all
//!                                        unprotected                          │ journal │ Unprotect: all run
//!  a standby failed, all members live:   unprotected                          │ journal │ Unprotect
//!  a member failed, no standby is left:  it is lost; the others go on
//! ```
//! While all go back, others may fail: their standbys take their places, and it begins again with the same cut.

use std::collections::BTreeMap;

use super::group::{Action, Group, Known, Out, Phase, Report, RequestId};
use super::record::{Decided, Located, Place};
use crate::id::{Epoch, MemberId, Seat};
use crate::message::{Ending, Stage, ToSeat};

impl Group {
    /// `seat` is dead, or has been silent for so long that it does not run any more.
    pub(super) fn fail(&mut self, seat: Seat, reason: String, out: &mut Out) {
        if !self.is_current(seat) || !self.failed.insert(seat) {
            return;
        }
        self.known.remove(&seat);
        self.doomed.remove(&seat);
        let is_primary = self.record.is_primary(seat);
        let whose = match is_primary {
            true => "",
            false => "the standby of ",
        };
        let name = self.record.name(seat.member).to_owned();
        self.abandon(&format!("{whose}'{name}' failed: {reason}"), out);
        out.push(Action::Report(Report::Failed { seat, reason }));
        match &mut self.phase {
            Phase::Over => {}
            Phase::Judging { owed } => {
                owed.remove(&seat);
                self.judge_if_all_known(out);
            }
            Phase::Alone { .. } => self.judge_alone(out),
            // Once all go back, a standby that fails is only one that cannot take a place.
            Phase::RollingBack { .. } if !is_primary => {}
            Phase::Idle | Phase::Cutting(_) if !is_primary => self.doubt(),
            Phase::Idle | Phase::Cutting(_) | Phase::RollingBack { .. } => self.judge(out),
        }
    }

    pub(super) fn judge_if_all_known(&mut self, out: &mut Out) {
        if matches!(&self.phase, Phase::Judging { owed } if owed.is_empty()) {
            self.judge(out);
        }
    }

    /// Decides what those that failed mean to the group.
    fn judge(&mut self, out: &mut Out) {
        match self.record.decided {
            Decided::Dissolved => {}
            Decided::Unprotected => self.unprotect("its members are to have standbys first".to_owned(), out),
            Decided::RollingBack { cut } => {
                self.replace_failed(out);
                self.roll_back(cut, out);
            }
            Decided::Protected { cut } => {
                let was_lost = self
                    .record
                    .primaries()
                    .any(|primary| self.failed.contains(&primary.seat));
                if self.replace_failed(out) {
                    self.roll_back(cut, out);
                } else if self
                    .record
                    .standbys()
                    .any(|standby| self.failed.contains(&standby.seat))
                {
                    self.unprotect("a standby failed".to_owned(), out);
                } else if was_lost {
                    self.journal(out);
                    self.phase = Phase::Idle;
                    self.dissolve_if_empty(out);
                } else {
                    self.settle(out);
                }
            }
        }
    }

    /// Who failed while the group is not protected is lost, or a standby that was not one yet.
    fn judge_alone(&mut self, out: &mut Out) {
        self.lose_failed(out);
        self.drop_failed_standbys();
        self.journal(out);
        self.dissolve_if_empty(out);
        self.arrange(out);
    }

    /// Puts standbys in the places of members that failed; says whether there were any. Who has none is lost.
    fn replace_failed(&mut self, out: &mut Out) -> bool {
        let mut replaced = Vec::new();
        for place in &mut self.record.members {
            if let Place::In { primary, standby } = place
                && self.failed.contains(&primary.seat)
                && let Some(standby) = standby.take_if(|standby| !self.failed.contains(&standby.seat))
            {
                self.failed.remove(&primary.seat);
                replaced.push(std::mem::replace(primary, standby));
            }
        }
        for process in &replaced {
            self.kill(process, out);
        }
        self.lose_failed(out);
        !replaced.is_empty()
    }

    /// Members that failed and have no standby are lost.
    fn lose_failed(&mut self, out: &mut Out) {
        // On its own it ran with nothing held: if it comes back, it may go on so.
        let ending = match self.record.decided {
            Decided::Unprotected => Ending::Released,
            _ => Ending::Replaced,
        };
        for (member, place) in (0..).map(MemberId).zip(&mut self.record.members) {
            let Place::In { primary, standby } = place else {
                continue;
            };
            if !self.failed.remove(&primary.seat) {
                continue;
            }
            let reason = match (&self.record.decided, &standby) {
                (Decided::Unprotected, _) => "it failed while the group was not protected",
                (_, Some(_)) => "it failed, and its standby as well",
                (_, None) => "it failed, and had no standby",
            };
            if let Some(standby) = standby {
                self.failed.remove(&standby.seat);
            }
            let (was, reason) = (primary.clone(), reason.to_owned());
            out.push(Action::Report(Report::Lost {
                member,
                reason: reason.clone(),
            }));
            *place = Place::Lost { reason, was, ending };
        }
    }

    fn roll_back(&mut self, cut: Epoch, out: &mut Out) {
        self.record.decided = Decided::RollingBack { cut };
        self.raise_generation(out);
        let left = self.primary_seats();
        for &seat in &left {
            self.say(seat, self.go_back(seat, cut), out);
        }
        self.phase = Phase::RollingBack { cut, left };
        out.push(Action::Report(Report::RollingBack { cut }));
        self.dissolve_if_empty(out);
    }

    /// What makes `seat` stand at the cut.
    pub(super) fn go_back(&self, seat: Seat, cut: Epoch) -> ToSeat {
        let is_standby = |known: &Known| matches!(known.standing.stage, Stage::Empty | Stage::Whole);
        match self.known.get(&seat) {
            Some(known) if is_standby(known) => ToSeat::Promote(cut),
            _ => ToSeat::RollBack(cut),
        }
    }

    /// `seat` stands at the cut.
    pub(super) fn at_cut(&mut self, seat: Seat, at: Epoch, out: &mut Out) {
        if let Phase::RollingBack { cut, left } = &mut self.phase
            && *cut == at
            && left.remove(&seat)
            && left.is_empty()
        {
            let done = std::mem::take(&mut self.failovers);
            self.unprotect(format!("it went back to cut {at}, and has to have new standbys"), out);
            out.push(Action::Report(Report::Recovered { cut: at }));
            out.extend(done.into_iter().map(|id| Action::Answer(id, Ok(at))));
        }
    }

    /// Each member is on its own from here on; then they are protected anew.
    pub(super) fn unprotect(&mut self, reason: String, out: &mut Out) {
        self.abandon(&format!("the group is not protected any more: {reason}"), out);
        let since = self.number();
        self.lose_failed(out);
        self.record.decided = Decided::Unprotected;
        let standbys = self.drop_standbys();
        self.raise_generation(out);
        self.phase = Phase::Alone { since };
        self.invalid = 0;
        self.say_to_primaries(&ToSeat::Unprotect(since), out);
        for standby in standbys {
            self.let_go(standby.seat, Ending::Replaced, out);
            self.kill(&standby, out);
        }
        out.push(Action::Report(Report::Unprotected { reason: reason.clone() }));
        self.answer_all(&format!("the group is not protected any more: {reason}"), out);
        self.dissolve_if_empty(out);
        self.arrange(out);
    }

    /// No member has a standby.
    fn drop_standbys(&mut self) -> Vec<Located> {
        let places = self.record.members.iter_mut();
        let standbys: Vec<_> = places
            .filter_map(|place| match place {
                Place::In { standby, .. } => standby.take(),
                _ => None,
            })
            .collect();
        for standby in &standbys {
            self.failed.remove(&standby.seat);
            self.addresses.remove(&standby.seat);
        }
        standbys
    }

    /// `seat` is not of the group any more.
    pub(super) fn let_go(&mut self, seat: Seat, ending: Ending, out: &mut Out) {
        self.known.remove(&seat);
        self.doomed.remove(&seat);
        self.say(seat, ToSeat::End(ending), out);
    }

    /// What the group is at takes too long.
    pub(super) fn late(&mut self, out: &mut Out) {
        match &self.phase {
            Phase::Cutting(flight) if flight.step == super::cut::Step::Shipping => {
                let slow = flight.left().clone();
                let standbys: Vec<_> = self.record.standbys().map(|standby| standby.seat).collect();
                for standby in standbys {
                    if slow.iter().any(|seat| seat.member == standby.member) {
                        self.fail(standby, "it does not hold the epoch in time".to_owned(), out);
                    }
                }
            }
            Phase::Cutting(flight) => {
                let slow = flight.left().iter().map(|seat| self.record.name(seat.member));
                let reason = format!("no answer in time from {}", slow.collect::<Vec<_>>().join(", "));
                self.invalidate(reason, out);
            }
            Phase::RollingBack { left, .. } => {
                for seat in left.clone() {
                    self.doom(seat, out);
                }
            }
            Phase::Alone { .. } => self.arrange_again(out),
            Phase::Judging { .. } | Phase::Idle | Phase::Over => {}
        }
    }

    /// `seat` is to end. It may run until it has, or its lease ends: it failed when it is silent.
    fn doom(&mut self, seat: Seat, out: &mut Out) {
        if self.doomed.insert(seat) {
            self.say(seat, ToSeat::End(Ending::Replaced), out);
        }
    }

    pub(super) fn fail_on_purpose(&mut self, id: RequestId, member: MemberId, out: &mut Out) {
        match self.record.place(member) {
            Some(Place::In { primary, .. }) => {
                let seat = primary.seat;
                self.failovers.push(id);
                self.doom(seat, out);
            }
            _ => out.push(Action::Answer(id, Err("there is no such member".to_owned()))),
        }
    }

    /// Be a group no more: members go on by themselves.
    pub(super) fn dissolve(&mut self, out: &mut Out) {
        if self.record.decided == Decided::Dissolved {
            return;
        }
        self.abandon("the group was dissolved", out);
        self.record.decided = Decided::Dissolved;
        self.raise_generation(out);
        self.phase = Phase::Over;
        self.say_to_primaries(&ToSeat::End(Ending::Released), out);
        for standby in self.record.standbys() {
            self.say(standby.seat, ToSeat::End(Ending::Replaced), out);
        }
        self.answer_all("the group was dissolved", out);
    }

    /// Whoever waits for something waits in vain.
    fn answer_all(&mut self, reason: &str, out: &mut Out) {
        let waiting = self.failovers.drain(..);
        out.extend(waiting.map(|id| Action::Answer(id, Err(reason.to_owned()))));
    }

    /// A group without members is none.
    pub(super) fn dissolve_if_empty(&mut self, out: &mut Out) {
        let is_empty = |place: &Place| matches!(place, Place::Ended | Place::Lost { .. });
        if self.record.members.iter().all(is_empty) {
            self.dissolve(out);
        }
    }

    /// A member's guest ended by itself. While that could be undone by a rollback, it is a member until the next cut.
    pub(super) fn guest_ended(&mut self, seat: Seat, out: &mut Out) {
        if !matches!(self.phase, Phase::Alone { .. }) {
            return self.begin_cut(out);
        }
        let Some(place) = self.record.place_mut(seat.member) else {
            return;
        };
        if let Place::In { standby, .. } = std::mem::replace(place, Place::Ended) {
            self.journal(out);
            out.push(Action::Report(Report::Ended { member: seat.member }));
            self.let_go(seat, Ending::Released, out);
            if let Some(standby) = standby {
                self.let_go(standby.seat, Ending::Replaced, out);
            }
            self.dissolve_if_empty(out);
            self.arrange(out);
        }
    }

    /// Seats that must not be silent for longer than suspicion allows.
    pub fn watched(&self) -> Vec<Seat> {
        let owed = match &self.phase {
            Phase::Judging { owed } => owed.clone(),
            _ => BTreeMap::new(),
        };
        let seats = self.current().map(|located| located.seat);
        let lives = |seat: &Seat| self.known.contains_key(seat) || owed.contains_key(seat);
        seats
            .filter(|seat| lives(seat) && !self.failed.contains(seat))
            .collect()
    }

    /// Whether what is heard of `seat` says that it lives, and may go on to.
    pub fn counts(&self, seat: Seat) -> bool {
        self.is_current(seat) && !self.failed.contains(&seat) && !self.doomed.contains(&seat)
    }
}
