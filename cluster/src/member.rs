//! What a member does: hears the coordinator, drives its VM, and tells where it stands.
//!
//! ```text
//!           SeedTo        CheckpointRequest   TakeTentative    Validate       (the standby holds it)
//!  Open ───────────► Seeding ► Ready ───► Blocked ─────► Tentative ───► Shipping ─────► Held
//!    ▲                          ▲  ◄─ Invalid ┴──────────────┘                           │
//!    │                          └──────────────── Permanent, or the next request ────────┘
//!    └─ Unprotect ── AtCut ◄── RollBack ── any of them
//! ```
//! (Blocking, Taking and GoingBack are on the way to Blocked, Tentative and AtCut, until the VM has done it. Ended is in
//! place of Tentative if the guest has ended.)
//!
//! Pure: calls to the VM are asked for, in order, and reported when they have returned, so that one thread can make them
//! while another hears messages and keeps the lease. Without a lease the VM stops, but only where another incarnation of
//! it could be made: not while it is on its own.

use crate::checkpoint::{CheckpointId, Order, StoredSnapshot};
use crate::id::{Epoch, Generation, Identity, Seat};
use crate::lease::{Lease, Nanos};
use crate::message::{Ending, Envelope, FromSeat, Seeding, Stage, Standing, Taken, ToSeat};
use crate::spec::Timing;
use crate::vm::{CutReport, MemberStatus, Notice};

/// What happens to a member.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The coordinator says something.
    Said(Envelope<ToSeat>),
    /// A call to the VM has returned.
    Did(Call, Result<CutReport, String>),
    /// The VM tells something by itself.
    Notice(Notice),
    /// Time has passed: to be said at each heartbeat, with how the VM is doing, and when the lease ends.
    Tick(MemberStatus),
}

/// What a member does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Do {
    /// Call the VM, after all calls before.
    Call(Call),
    /// Tell the coordinator.
    Say(Envelope<FromSeat>),
    /// It is not a member any more: after all calls before, its runtime ends; with [`Ending::Replaced`] the VM as well.
    End {
        /// How.
        ending: Ending,
        /// What is said before that, and after all calls.
        last: Option<Envelope<FromSeat>>,
    },
}

/// A call of [`MemberVm`](crate::vm::MemberVm). Only that of `Take` returns something.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `seed`.
    Seed(Seeding),
    /// `block`.
    Block(Epoch),
    /// `take`.
    Take(Epoch),
    /// `validate`.
    Validate(Epoch),
    /// `invalidate`.
    Invalidate(Epoch),
    /// `permanent`.
    Permanent(Epoch),
    /// `roll_back`.
    RollBack(Epoch),
    /// `resume`.
    Resume,
    /// `fence`.
    Fence,
    /// `unprotect`.
    Unprotect,
    /// `prepare_snapshot`.
    PrepareSnapshot(Order),
    /// `snapshot_at`.
    SnapshotAt(Epoch),
    /// `no_snapshot`.
    NoSnapshot(CheckpointId),
}

/// A member.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    who: Identity,
    generation: Generation,
    timing: Timing,
    lease: Lease,
    stage: Stage,
    cut: Epoch,
    permanent: Epoch,
    /// The standby it has or seeds.
    standby: Option<Seat>,
    /// In which generation it last went back: it does so once in each.
    rolled_back: Generation,
    /// Whether the VM was last told to run.
    runs: bool,
    /// The checkpoint for which its VM makes a snapshot.
    snapshot: Option<CheckpointId>,
    /// Why the guest ended, if it did: such a VM has nothing to cut, but what it sent is held like any other's.
    ended: Option<String>,
}

impl Member {
    /// A VM that joins a group.
    pub fn joining(who: Identity) -> Self {
        Self {
            who,
            generation: Generation::default(),
            timing: Timing::default(),
            lease: Lease::default(),
            stage: Stage::Open,
            cut: 0,
            permanent: 0,
            standby: None,
            rolled_back: Generation::default(),
            runs: true,
            snapshot: None,
            ended: None,
        }
    }

    /// What a standby is once it is promoted: it stands at the cut that `permanent` is.
    pub(crate) fn promoted(
        who: Identity,
        generation: Generation,
        timing: Timing,
        lease: Lease,
        cut: Epoch,
        permanent: Epoch,
    ) -> Self {
        Self {
            generation,
            timing,
            lease,
            stage: Stage::AtCut,
            cut,
            permanent,
            rolled_back: generation,
            runs: false,
            ..Self::joining(who)
        }
    }

    /// Who it is.
    pub fn who(&self) -> Identity {
        self.who
    }

    /// The generation it is in.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        Standing {
            stage: self.stage,
            cut: self.cut,
            permanent: self.permanent,
        }
    }

    /// How long everything may take, as the coordinator says.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// When the VM must stop if nothing is heard until then; nothing if it need not.
    pub fn stops_at(&self) -> Option<Nanos> {
        (self.runs && self.is_leased() && self.ended.is_none()).then(|| self.lease.until())
    }

    /// Whether the VM was last told to run.
    pub fn runs(&self) -> bool {
        self.runs
    }

    /// What to do about `input` at `now`, by the clock that heartbeats are stamped with.
    pub fn on(&mut self, input: Input, now: Nanos) -> Vec<Do> {
        let mut out = Vec::new();
        match input {
            Input::Said(envelope) => self.hear(envelope, now, &mut out),
            Input::Did(call, result) => self.returned(call, result, &mut out),
            Input::Notice(notice) => self.notice(notice, &mut out),
            Input::Tick(status) => self.tick(status, now, &mut out),
        }
        self.run_or_stop(now, &mut out);
        out
    }

    fn hear(&mut self, envelope: Envelope<ToSeat>, now: Nanos, out: &mut Vec<Do>) {
        if envelope.group != self.who.group || envelope.generation < self.generation {
            return;
        }
        if envelope.generation > self.generation {
            // Whoever asked for one has forgotten it.
            self.drop_snapshot(out);
        }
        self.generation = envelope.generation;
        match envelope.body {
            ToSeat::Welcome { timing } => self.timing = timing,
            ToSeat::Lease { sent } => self.lease.renew(sent, self.timing.lease),
            ToSeat::End(ending) => self.end(ending, out),
            ToSeat::Unprotect(number) => self.unprotect(number, now, out),
            ToSeat::RollBack(cut) => self.roll_back(cut, out),
            ToSeat::Permanent(cut) => self.note_permanent(cut, out),
            ToSeat::Invalid(cut) => self.invalidate(cut, out),
            ToSeat::NoSnapshot(id) if self.snapshot == Some(id) => self.drop_snapshot(out),
            ToSeat::NoSnapshot(_) => {}
            // Whoever does not know whether it is still the one takes part in nothing.
            _ if self.is_leased() && !self.lease.holds(now) => {}
            ToSeat::SeedTo(seeding) => self.seed(seeding, out),
            ToSeat::CheckpointRequest(cut) => self.request(cut, out),
            ToSeat::TakeTentative(cut) => self.take(cut, out),
            ToSeat::Validate(cut) => self.validate(cut, out),
            ToSeat::PrepareSnapshot(order) => self.prepare_snapshot(order, out),
            ToSeat::SnapshotAt(cut) if self.snapshot.is_some() => out.push(Do::Call(Call::SnapshotAt(cut))),
            ToSeat::SnapshotAt(_) => {}
            // That is for standbys.
            ToSeat::Promote(_) => {}
        }
    }

    fn seed(&mut self, seeding: Seeding, out: &mut Vec<Do>) {
        let before_first = seeding.epoch.saturating_sub(1);
        if before_first <= self.cut {
            return;
        }
        match self.stage {
            Stage::Open => {}
            // The standby it had is gone, and so is what was kept for that.
            Stage::Seeding | Stage::Ready => out.push(Do::Call(Call::Unprotect)),
            _ => return,
        }
        self.cut = before_first;
        self.stage = Stage::Seeding;
        self.standby = Some(seeding.standby);
        out.push(Do::Call(Call::Seed(seeding)));
    }

    fn request(&mut self, cut: Epoch, out: &mut Vec<Do>) {
        if cut <= self.cut {
            return;
        }
        match self.stage {
            Stage::Ready | Stage::Held | Stage::Ended => {}
            // That one is over, or there would be no other.
            Stage::Blocking | Stage::Blocked | Stage::Taking | Stage::Tentative => self.invalidate(self.cut, out),
            // While the one before is on its way, it can only be asked again.
            Stage::Shipping => return,
            Stage::Open | Stage::Seeding | Stage::GoingBack | Stage::AtCut | Stage::Empty | Stage::Whole => return,
        }
        self.cut = cut;
        if self.ended.is_some() {
            self.stage = Stage::Blocked;
            self.say(FromSeat::YesAck(cut), out);
        } else {
            self.stage = Stage::Blocking;
            out.push(Do::Call(Call::Block(cut)));
        }
    }

    fn take(&mut self, cut: Epoch, out: &mut Vec<Do>) {
        if self.stage != Stage::Blocked || self.cut != cut {
            return;
        }
        if self.ended.is_some() {
            self.stage = Stage::Ended;
            self.say(FromSeat::Tentative(cut, Taken::Ended), out);
        } else {
            self.stage = Stage::Taking;
            out.push(Do::Call(Call::Take(cut)));
        }
    }

    fn validate(&mut self, cut: Epoch, out: &mut Vec<Do>) {
        if self.stage == Stage::Tentative && self.cut == cut {
            self.stage = Stage::Shipping;
            out.push(Do::Call(Call::Validate(cut)));
        }
    }

    fn invalidate(&mut self, cut: Epoch, out: &mut Vec<Do>) {
        let is_open = matches!(
            self.stage,
            Stage::Blocking | Stage::Blocked | Stage::Taking | Stage::Tentative
        );
        if is_open && self.cut == cut {
            self.stage = Stage::Ready;
            out.push(Do::Call(Call::Invalidate(cut)));
        }
    }

    fn prepare_snapshot(&mut self, order: Order, out: &mut Vec<Do>) {
        if self.snapshot != Some(order.id) {
            self.drop_snapshot(out);
            self.snapshot = Some(order.id);
            out.push(Do::Call(Call::PrepareSnapshot(order)));
        }
    }

    fn drop_snapshot(&mut self, out: &mut Vec<Do>) {
        if let Some(id) = self.snapshot.take() {
            out.push(Do::Call(Call::NoSnapshot(id)));
        }
    }

    fn snapshot_over(&mut self, id: CheckpointId, outcome: Result<StoredSnapshot, String>, out: &mut Vec<Do>) {
        if self.snapshot.take_if(|snapshot| *snapshot == id).is_some() {
            self.say(FromSeat::SnapshotOver(id, outcome), out);
        }
    }

    fn note_permanent(&mut self, cut: Epoch, out: &mut Vec<Do>) {
        let goes_on = self.is_leased() && !matches!(self.stage, Stage::GoingBack | Stage::AtCut);
        if !goes_on || cut <= self.permanent {
            return;
        }
        self.permanent = cut;
        if self.stage == Stage::Held && self.cut == cut {
            self.stage = Stage::Ready;
        }
        // What ended at this cut is told so next.
        if self.stage != Stage::Ended {
            out.push(Do::Call(Call::Permanent(cut)));
        }
    }

    fn roll_back(&mut self, cut: Epoch, out: &mut Vec<Do>) {
        if self.generation <= self.rolled_back {
            return;
        }
        self.rolled_back = self.generation;
        match self.stage {
            Stage::AtCut if self.permanent == cut => self.say(FromSeat::AtCut(cut), out),
            Stage::GoingBack if self.permanent == cut => {}
            _ => {
                // What it has not heard to be permanent is so.
                self.note_permanent(cut, out);
                self.stage = Stage::GoingBack;
                self.cut = self.cut.max(cut);
                self.permanent = cut;
                self.ended = None;
                self.runs = false;
                out.push(Do::Call(Call::RollBack(cut)));
            }
        }
    }

    fn unprotect(&mut self, number: Epoch, now: Nanos, out: &mut Vec<Do>) {
        if number <= self.cut {
            return;
        }
        self.cut = number;
        self.stage = Stage::Open;
        self.standby = None;
        // It runs before what it holds leaves.
        self.run_or_stop(now, out);
        out.push(Do::Call(Call::Unprotect));
    }

    fn end(&mut self, ending: Ending, out: &mut Vec<Do>) {
        match ending {
            Ending::Released => {
                if !std::mem::replace(&mut self.runs, true) {
                    out.push(Do::Call(Call::Resume));
                }
                self.stage = Stage::Open;
                out.push(Do::Call(Call::Unprotect));
            }
            Ending::Replaced => {
                self.stage = Stage::AtCut;
                if std::mem::replace(&mut self.runs, false) {
                    out.push(Do::Call(Call::Fence));
                }
            }
        }
        out.push(Do::End { ending, last: None });
    }

    fn returned(&mut self, call: Call, result: Result<CutReport, String>, out: &mut Vec<Do>) {
        match (call, result) {
            (Call::Seed(Seeding { standby, .. }), Ok(_)) => {
                if self.stage == Stage::Seeding && self.standby == Some(standby) {
                    self.stage = Stage::Ready;
                    self.say(FromSeat::Seeded { standby }, out);
                }
            }
            (Call::Seed(Seeding { standby, .. }), Err(reason)) => {
                self.say(FromSeat::StandbyLost { standby, reason }, out);
            }
            (Call::Block(cut), Ok(_)) => {
                if self.stage == Stage::Blocking && self.cut == cut {
                    self.stage = Stage::Blocked;
                    self.say(FromSeat::YesAck(cut), out);
                }
            }
            (Call::Take(cut), Ok(report)) => {
                if self.stage == Stage::Taking && self.cut == cut {
                    self.stage = Stage::Tentative;
                    self.say(FromSeat::Tentative(cut, Taken::Cut(report)), out);
                }
            }
            (Call::Block(cut) | Call::Take(cut), Err(reason)) => {
                self.say(FromSeat::Tentative(cut, Taken::Failed(reason)), out);
            }
            (Call::Validate(_), Err(reason)) => self.lose_standby(reason, out),
            (Call::RollBack(cut), Ok(_)) => {
                if self.stage == Stage::GoingBack && self.permanent == cut {
                    self.stage = Stage::AtCut;
                    self.say(FromSeat::AtCut(cut), out);
                }
            }
            (Call::PrepareSnapshot(order), Err(reason)) => self.snapshot_over(order.id, Err(reason), out),
            (Call::SnapshotAt(_), Err(reason)) => {
                if let Some(id) = self.snapshot {
                    self.snapshot_over(id, Err(reason), out);
                }
            }
            // A VM that has ended tells that in another way.
            (Call::NoSnapshot(_), Err(_))
            | (
                Call::Validate(_)
                | Call::Invalidate(_)
                | Call::Permanent(_)
                | Call::Resume
                | Call::Fence
                | Call::Unprotect
                | Call::PrepareSnapshot(_)
                | Call::SnapshotAt(_)
                | Call::NoSnapshot(_),
                Ok(_),
            ) => {}
            (
                Call::Invalidate(_)
                | Call::Permanent(_)
                | Call::RollBack(_)
                | Call::Resume
                | Call::Fence
                | Call::Unprotect,
                Err(reason),
            ) => self.fail(reason, out),
        }
    }

    fn notice(&mut self, notice: Notice, out: &mut Vec<Do>) {
        match notice {
            Notice::Holds(cut) => {
                if self.stage == Stage::Shipping && self.cut == cut {
                    self.stage = Stage::Held;
                    self.say(FromSeat::CheckpointSuccess(cut), out);
                }
            }
            Notice::StandbyLost(reason) => self.lose_standby(reason, out),
            Notice::OutputWaits => self.say(FromSeat::OutputWaits, out),
            Notice::SnapshotPrepared(id) => {
                if self.snapshot == Some(id) {
                    self.say(FromSeat::SnapshotPrepared(id), out);
                }
            }
            Notice::SnapshotOver(id, outcome) => self.snapshot_over(id, outcome, out),
            Notice::GuestEnded(reason) => {
                self.ended = Some(reason.clone());
                self.say(FromSeat::GuestEnded { reason }, out);
            }
            Notice::GuestFailed(reason) => self.fail(reason, out),
        }
    }

    fn tick(&mut self, status: MemberStatus, now: Nanos, out: &mut Vec<Do>) {
        let (sent, standing) = (now, self.standing());
        self.say(FromSeat::Heartbeat { sent, standing, status }, out);
        if let Some(reason) = self.ended.clone() {
            self.say(FromSeat::GuestEnded { reason }, out);
        }
    }

    fn lose_standby(&mut self, reason: String, out: &mut Vec<Do>) {
        if let Some(standby) = self.standby {
            self.say(FromSeat::StandbyLost { standby, reason }, out);
        }
    }

    /// It does not know what its VM is any more: the VM stops, and the group goes back without it.
    fn fail(&mut self, reason: String, out: &mut Vec<Do>) {
        self.end(Ending::Replaced, out);
        if let Some(Do::End { last, .. }) = out.last_mut() {
            *last = Some(self.envelope(FromSeat::Failed { reason }));
        }
    }

    /// Whether another incarnation of this VM could be made, so that it runs on a lease only.
    fn is_leased(&self) -> bool {
        !matches!(self.stage, Stage::Open | Stage::Seeding)
    }

    fn run_or_stop(&mut self, now: Nanos, out: &mut Vec<Do>) {
        let may_run = match self.stage {
            Stage::GoingBack | Stage::AtCut => false,
            _ => self.ended.is_some() || !self.is_leased() || self.lease.holds(now),
        };
        if may_run != self.runs {
            self.runs = may_run;
            out.push(Do::Call(if may_run { Call::Resume } else { Call::Fence }));
        }
    }

    fn say(&self, body: FromSeat, out: &mut Vec<Do>) {
        out.push(Do::Say(self.envelope(body)));
    }

    fn envelope(&self, body: FromSeat) -> Envelope<FromSeat> {
        Envelope {
            group: self.who.group,
            generation: self.generation,
            body,
        }
    }
}
