//! A cut: asked for, taken by all, validated, and permanent when all standbys hold it; or invalid.
//!
//! ```text
//!  Requesting ── all Blocked ──► Taking ── all Tentative ──► Shipping ── all Held ──► the journal says so ──► permanent
//!      └──── somebody failed or is late ────┴─► invalid         └── late: that standby has failed
//! ```

use std::collections::BTreeSet;

use super::group::{Action, Group, Out, Phase, Report};
use super::record::{Decided, Place};
use crate::id::{Epoch, MemberId, Seat};
use crate::message::{Ending, Stage, Taken, ToSeat};
use crate::vm::CutReport;

/// Cuts in a row that may come to nothing until the group is unprotected: its output must not be held for ever.
const INVALID_MAX: u8 = 8;

/// A cut that is not permanent yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cut {
    pub number: Epoch,
    pub step: Step,
    /// Members that the step waits for.
    left: BTreeSet<Seat>,
    /// Members whose guests had ended at the cut.
    leaving: BTreeSet<MemberId>,
    cost: CutReport,
}

/// What members are to do for a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Step {
    Requesting,
    Taking,
    Shipping,
}

impl Cut {
    pub fn is_waiting_for(&self, seat: Seat) -> bool {
        self.left.contains(&seat)
    }

    /// Whom it waits for.
    pub fn left(&self) -> &BTreeSet<Seat> {
        &self.left
    }

    /// What members are asked.
    pub fn asks(&self) -> ToSeat {
        match self.step {
            Step::Requesting => ToSeat::CheckpointRequest(self.number),
            Step::Taking => ToSeat::TakeTentative(self.number),
            Step::Shipping => ToSeat::Validate(self.number),
        }
    }

    /// Where members stand that have done it.
    fn done(&self) -> Stage {
        match self.step {
            Step::Requesting => Stage::Blocked,
            Step::Taking => Stage::Tentative,
            Step::Shipping => Stage::Held,
        }
    }
}

impl Group {
    /// Begins a cut if there is none, and there may be one.
    pub(super) fn begin_cut(&mut self, out: &mut Out) {
        if self.phase != Phase::Idle {
            return;
        }
        let left = self.primary_seats();
        if left.is_empty() {
            return;
        }
        let number = self.number();
        self.store_at(number, out);
        let flight = Cut {
            number,
            step: Step::Requesting,
            left,
            leaving: BTreeSet::new(),
            cost: CutReport::default(),
        };
        self.say_to_primaries(&flight.asks(), out);
        self.phase = Phase::Cutting(flight);
    }

    /// `seat` has done what it was asked for `cut`, if that is what it stands at.
    pub(super) fn acknowledge(&mut self, seat: Seat, cut: Epoch, stage: Stage, out: &mut Out) {
        if let Phase::Cutting(flight) = &mut self.phase
            && flight.number == cut
            && flight.done() == stage
            && flight.left.remove(&seat)
            && flight.left.is_empty()
        {
            self.advance(out);
        }
    }

    /// What came of taking `cut` at `seat`.
    pub(super) fn taken(&mut self, seat: Seat, cut: Epoch, taken: Taken, out: &mut Out) {
        let Phase::Cutting(flight) = &mut self.phase else {
            return;
        };
        if flight.number != cut || !flight.left.contains(&seat) {
            return;
        }
        match taken {
            Taken::Failed(reason) if flight.step != Step::Shipping => {
                let reason = format!("'{}': {reason}", self.record.name(seat.member));
                self.invalidate(reason, out);
                return;
            }
            Taken::Cut(report) if flight.step == Step::Taking => {
                let cost = &mut flight.cost;
                cost.pause_ns = cost.pause_ns.max(report.pause_ns);
                cost.dirty_pages = cost.dirty_pages.saturating_add(report.dirty_pages);
                cost.disk_bytes = cost.disk_bytes.saturating_add(report.disk_bytes);
            }
            Taken::Ended if flight.step == Step::Taking => {
                flight.leaving.insert(seat.member);
            }
            _ => return,
        }
        self.acknowledge(seat, cut, Stage::Tentative, out);
    }

    /// The next step: all have done this one.
    fn advance(&mut self, out: &mut Out) {
        let primaries = self.primary_seats();
        let Phase::Cutting(flight) = &mut self.phase else {
            return;
        };
        flight.left = primaries;
        flight.step = match flight.step {
            Step::Requesting => Step::Taking,
            Step::Taking => {
                // Those have nothing that a standby could hold.
                flight.left.retain(|seat| !flight.leaving.contains(&seat.member));
                Step::Shipping
            }
            Step::Shipping => return self.permanent(out),
        };
        let (asks, is_done) = (flight.asks(), flight.left.is_empty());
        self.say_to_primaries(&asks, out);
        if is_done {
            self.permanent(out);
        }
    }

    /// All standbys hold the cut.
    fn permanent(&mut self, out: &mut Out) {
        let Phase::Cutting(flight) = std::mem::replace(&mut self.phase, Phase::Idle) else {
            return;
        };
        let cut = flight.number;
        let was_protected = matches!(self.record.decided, Decided::Protected { .. });
        self.record.decided = Decided::Protected { cut };
        if let Some(&member) = flight.leaving.first() {
            let name = self.record.name(member).to_owned();
            self.abandon(&format!("the guest of '{name}' has ended"), out);
        }
        let left: Vec<_> = flight.leaving.iter().map(|&member| self.take_leave(member)).collect();
        if was_protected && left.is_empty() {
            out.push(Action::JournalCut(cut));
        } else {
            self.journal(out);
        }
        self.invalid = 0;
        self.say_to_primaries(&ToSeat::Permanent(cut), out);
        for standby in self.record.standbys() {
            self.say(standby.seat, ToSeat::Permanent(cut), out);
        }
        if !was_protected {
            out.push(Action::Report(Report::Protected));
        }
        let cost = flight.cost;
        out.push(Action::Report(Report::Permanent { cut, cost }));
        for (seat, ending) in left.into_iter().flatten() {
            self.let_go(seat, ending, out);
            if ending == Ending::Released {
                let member = seat.member;
                out.push(Action::Report(Report::Ended { member }));
            }
        }
        self.stored_cut_is_permanent(cut, out);
        self.dissolve_if_empty(out);
        self.begin_cut_to_store(out);
    }

    /// A member whose guest had ended at a cut that is permanent is one no more. Says who is to be told.
    fn take_leave(&mut self, member: MemberId) -> Vec<(Seat, Ending)> {
        let Some(place) = self.record.place_mut(member) else {
            return Vec::new();
        };
        match std::mem::replace(place, Place::Ended) {
            Place::In { primary, standby } => {
                let standby = standby.map(|standby| (standby.seat, Ending::Replaced));
                standby.into_iter().chain([(primary.seat, Ending::Released)]).collect()
            }
            other => {
                *place = other;
                Vec::new()
            }
        }
    }

    /// The cut will not be permanent; the next one covers it too.
    pub(super) fn invalidate(&mut self, reason: String, out: &mut Out) {
        let Phase::Cutting(flight) = std::mem::replace(&mut self.phase, Phase::Idle) else {
            return;
        };
        let cut = flight.number;
        self.say_to_primaries(&ToSeat::Invalid(cut), out);
        self.stored_cut_is_invalid(cut, &reason, out);
        self.invalid = self.invalid.saturating_add(1);
        if self.invalid >= INVALID_MAX {
            self.unprotect(format!("{INVALID_MAX} cuts in a row came to nothing: {reason}"), out);
        }
        out.push(Action::Report(Report::Invalid { cut, reason }));
    }

    /// Goes on with a cut of the coordinator before, or begins anew. Where one member has heard that all have taken it,
    /// all have; so if not all have, nobody has heard so.
    pub(super) fn settle(&mut self, out: &mut Out) {
        self.phase = Phase::Idle;
        let standings = self.record.primaries().filter_map(|primary| {
            let known = self.known.get(&primary.seat)?;
            Some((primary.seat, known.standing))
        });
        let standings: Vec<_> = standings.collect();
        let number = standings.iter().map(|(_, standing)| standing.cut).max().unwrap_or(0);
        let has_taken = |stage| matches!(stage, Stage::Tentative | Stage::Shipping | Stage::Held);
        if standings.iter().any(|(_, at)| at.cut != number || !has_taken(at.stage)) || standings.is_empty() {
            return;
        }
        let holds = |stage| stage == Stage::Held;
        let left = standings
            .iter()
            .filter(|(_, at)| !holds(at.stage))
            .map(|(seat, _)| *seat);
        let flight = Cut {
            number,
            step: Step::Shipping,
            left: left.collect(),
            leaving: BTreeSet::new(),
            cost: CutReport::default(),
        };
        self.say_to_primaries(&flight.asks(), out);
        self.phase = Phase::Cutting(flight);
        if let Phase::Cutting(flight) = &self.phase
            && flight.left.is_empty()
        {
            self.permanent(out);
        }
    }
}
