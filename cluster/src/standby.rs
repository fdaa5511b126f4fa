//! What a standby does: applies what is permanent, and becomes the member when it is told to.
//!
//! ```text
//!          (its image is whole)          Promote               (it is done)
//!  Empty ───────────────────────► Whole ─────────► GoingBack ───────────────► a Member, at the cut
//! ```
//! Pure, as [`member`](crate::member) is. A standby runs nothing, so it needs no lease; but it keeps one, so that as a
//! member it need not wait for it.

use crate::id::{Epoch, Generation, Identity};
use crate::lease::{Lease, Nanos};
use crate::member::Member;
use crate::message::{Ending, Envelope, FromSeat, Stage, Standing, ToSeat};
use crate::spec::Timing;
use crate::vm::{MemberStatus, StandbyNotice};

/// What happens to a standby.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The coordinator says something.
    Said(Envelope<ToSeat>),
    /// A call has returned.
    Did(Call, Result<(), String>),
    /// It tells something by itself.
    Notice(StandbyNotice),
    /// Time has passed: to be said at each heartbeat.
    Tick,
}

/// What a standby does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Do {
    /// Call the standby, after all calls before.
    Call(Call),
    /// Tell the coordinator.
    Say(Envelope<FromSeat>),
    /// It is a member from here on, which stands at a cut; it goes on as that.
    Become(Box<Member>),
    /// It is not wanted any more: after all calls before, the process ends.
    End(Ending),
}

/// A call of [`StandbyVm`](crate::vm::StandbyVm).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `permanent`.
    Permanent(Epoch),
    /// `promote`.
    Promote(Epoch),
}

/// A standby.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Standby {
    who: Identity,
    generation: Generation,
    timing: Timing,
    lease: Lease,
    stage: Stage,
    cut: Epoch,
    permanent: Epoch,
}

impl Standby {
    /// A standby that waits for its image.
    pub fn new(who: Identity) -> Self {
        Self {
            who,
            generation: Generation::default(),
            timing: Timing::default(),
            lease: Lease::default(),
            stage: Stage::Empty,
            cut: 0,
            permanent: 0,
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

    /// How long everything may take, as the coordinator says.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        Standing {
            stage: self.stage,
            cut: self.cut,
            permanent: self.permanent,
        }
    }

    /// What to do about `input` at `now`, by the clock that heartbeats are stamped with.
    pub fn on(&mut self, input: Input, now: Nanos) -> Vec<Do> {
        let mut out = Vec::new();
        match input {
            Input::Said(envelope) => self.hear(envelope, &mut out),
            Input::Did(Call::Permanent(_), Ok(())) => {}
            Input::Did(Call::Promote(cut), Ok(())) => self.become_member(cut, &mut out),
            Input::Did(Call::Permanent(_) | Call::Promote(_), Err(reason)) => {
                self.say(FromSeat::Failed { reason }, &mut out);
                out.push(Do::End(Ending::Replaced));
            }
            Input::Notice(StandbyNotice::Seeded) => {
                if self.stage == Stage::Empty {
                    self.stage = Stage::Whole;
                }
            }
            Input::Notice(StandbyNotice::Holds(cut)) => self.cut = self.cut.max(cut),
            // The member tells of its own side; and if it cannot, it is silent.
            Input::Notice(StandbyNotice::PrimaryLost(reason)) => tracing::warn!(reason, "nothing comes from the VM"),
            Input::Tick => {
                let (sent, standing, status) = (now, self.standing(), MemberStatus::default());
                self.say(FromSeat::Heartbeat { sent, standing, status }, &mut out);
            }
        }
        out
    }

    fn hear(&mut self, envelope: Envelope<ToSeat>, out: &mut Vec<Do>) {
        if envelope.group != self.who.group || envelope.generation < self.generation {
            return;
        }
        self.generation = envelope.generation;
        match envelope.body {
            ToSeat::Welcome { timing } => self.timing = timing,
            ToSeat::Lease { sent } => self.lease.renew(sent, self.timing.lease),
            ToSeat::Permanent(cut) if cut > self.permanent && self.stage == Stage::Whole => {
                self.permanent = cut;
                out.push(Do::Call(Call::Permanent(cut)));
            }
            ToSeat::Promote(cut) if self.stage == Stage::Whole => {
                self.stage = Stage::GoingBack;
                self.permanent = cut;
                out.push(Do::Call(Call::Promote(cut)));
            }
            ToSeat::End(ending) => out.push(Do::End(ending)),
            // To members, or once more.
            _ => {}
        }
    }

    fn become_member(&mut self, cut: Epoch, out: &mut Vec<Do>) {
        let member = Member::promoted(
            self.who,
            self.generation,
            self.timing,
            self.lease,
            self.cut.max(cut),
            cut,
        );
        out.push(Do::Become(Box::new(member)));
        self.say(FromSeat::AtCut(cut), out);
    }

    fn say(&self, body: FromSeat, out: &mut Vec<Do>) {
        out.push(Do::Say(Envelope {
            group: self.who.group,
            generation: self.generation,
            body,
        }));
    }
}
