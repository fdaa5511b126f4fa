//! The coordinator of a group, without time: what has happened decides what is to be done.
//!
//! ```text
//!            all have joined, all standbys     the interval is over
//!   Alone ───────────────────────────► Idle ────────────────────────► Cutting{Requesting ► Taking ► Shipping}
//!    ▲ ▲        are seeded              ▲ └───── permanent, or invalid ◄──────────────────────┘
//!    │ │                                └────────────┐
//!    │ └── a standby failed ──────────── Judging ────┴── somebody failed, or the coordinator is new
//!    └──── all stand at the cut ── RollingBack ◄┘ a member failed
//! ```
//! When somebody fails, others may have failed with him, and not be known to have: a host has members and standbys. So
//! before a group gives up its protection because a standby is gone, each member has to show that it lives (Judging).
//!
//! An action is done after those before it: nobody hears what the journal does not say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cutover_snapshot::spec::MacAddr;

use super::cut::{Cut, Step};
use super::record::{Decided, Located, Place, Record};
use super::storing::Storing;
use crate::checkpoint::{StoreRequest, StoredCut};
use crate::id::{Epoch, Generation, GroupId, Host, Incarnation, MemberId, Seat};
use crate::message::{
    AgentHello, Ending, Envelope, FromAgent, FromSeat, SeatHello, Stage, Standing, Taken, ToAgent, ToSeat,
};
use crate::spec::{GroupSpec, Timing};
use crate::vm::{CutReport, StandbyAddress};

/// Signs of life that a member owes when it is doubted: the first may have been on its way before.
const SIGNS_OF_LIFE: u8 = 2;

/// Something that somebody asks of a group, to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What can be asked of a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Store a checkpoint, and say of which cut it is when all of it is permanent.
    Store(StoreRequest),
    /// Nobody wants that any more.
    CancelStore,
    /// Have VMs run that were started paused, from snapshots.
    Resume,
    /// Have a member fail, and say when the group has recovered.
    Failover(MemberId),
    /// Be a group no more.
    Dissolve,
}

/// What happens to a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A member or standby calls.
    Hello(Envelope<SeatHello>),
    /// It says something.
    Said(Seat, Envelope<FromSeat>),
    /// An agent calls.
    AgentHello(AgentHello),
    /// It says something.
    AgentSaid(Envelope<FromAgent>),
    /// Its link is over.
    AgentGone(Host),
    /// Nothing was heard of a member or standby for as long as that may be.
    Silent(Seat),
    /// The interval is over.
    Due,
    /// What the group is at takes longer than it may.
    Late,
    /// Somebody asks for something.
    Asked(RequestId, Request),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Make this durable.
    Journal(Box<Record>),
    /// Make durable that the cut is permanent; the rest of the record is as it was.
    JournalCut(Epoch),
    /// Say something to a member or standby.
    Say(Seat, Envelope<ToSeat>),
    /// Say something to the agent of a host.
    Tell(Host, Envelope<ToAgent>),
    /// Answer a request, with the cut that it is about.
    Answer(RequestId, Result<Epoch, String>),
    /// Answer a request to store a checkpoint: all members have theirs.
    Stored(RequestId, StoredCut),
    /// Let everybody know.
    Report(Report),
}

/// What happened, for whoever wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Report {
    /// A cut is permanent. The longest pause, and pages and bytes of all members.
    Permanent {
        /// Which.
        cut: Epoch,
        /// What it took.
        cost: CutReport,
    },
    /// One is not, and will not be.
    Invalid {
        /// Which.
        cut: Epoch,
        /// Why not.
        reason: String,
    },
    /// From here on a member may fail.
    Protected,
    /// From here on none may.
    Unprotected {
        /// Why.
        reason: String,
    },
    /// Somebody failed.
    Failed {
        /// Who.
        seat: Seat,
        /// How that is known.
        reason: String,
    },
    /// All go back to a cut.
    RollingBack {
        /// Which.
        cut: Epoch,
    },
    /// All go on from there.
    Recovered {
        /// From where.
        cut: Epoch,
    },
    /// A member is lost.
    Lost {
        /// Which.
        member: MemberId,
        /// Why nobody can take its place.
        reason: String,
    },
    /// A member's guest ended by itself, for good.
    Ended {
        /// Which.
        member: MemberId,
    },
    /// A VM cannot join, or have a standby; it will be tried again.
    Refused {
        /// Who.
        seat: Seat,
        /// Why.
        reason: String,
    },
}

/// What a group is at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// Who lives? From each of these a sign of life is owed, or as many.
    Judging { owed: BTreeMap<Seat, u8> },
    /// Members are on their own, or told to be by this number, while they join and standbys are seeded.
    Alone { since: Epoch },
    /// Between cuts.
    Idle,
    /// A cut is taken.
    Cutting(Cut),
    /// These do not stand at the cut yet.
    RollingBack { cut: Epoch, left: BTreeSet<Seat> },
    /// It is dissolved.
    Over,
}

/// What a group is at, as far as how long that may take is concerned: another one has its own time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stretch {
    Judging,
    /// Until the next standby is asked for.
    Alone(Incarnation),
    Idle,
    Cutting(Epoch),
    Shipping(Epoch),
    RollingBack(Generation),
    Over,
}

impl Stretch {
    /// Whether a cut begins with it.
    pub fn begins_cut(self) -> bool {
        matches!(self, Self::Cutting(_))
    }

    /// How long it may take.
    pub fn limit(self, timing: &Timing) -> Option<Duration> {
        match self {
            Self::Judging | Self::Idle | Self::Over => None,
            Self::Cutting(_) => Some(timing.cut),
            Self::Shipping(_) => Some(timing.ship),
            Self::Alone(_) | Self::RollingBack(_) => Some(timing.roll_back),
        }
    }
}

/// What a member or standby has said of itself, since this coordinator has the group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Known {
    pub standing: Standing,
    /// What it was last found not to know of.
    missed: Option<ToSeat>,
}

/// The coordinator of a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    pub(super) record: Record,
    pub(super) phase: Phase,
    /// The highest number of a cut.
    pub(super) last: Epoch,
    pub(super) known: BTreeMap<Seat, Known>,
    pub(super) macs: BTreeMap<MemberId, Vec<MacAddr>>,
    pub(super) agents: BTreeSet<Host>,
    /// Those that failed and whose places are not taken by others yet.
    pub(super) failed: BTreeSet<Seat>,
    /// Members that are told to end, and are to be taken for dead when they are silent.
    pub(super) doomed: BTreeSet<Seat>,
    /// Where standbys listen that were started, and by which number their members are sent to them.
    pub(super) addresses: BTreeMap<Seat, (StandbyAddress, Epoch)>,
    /// Members that were asked to join.
    pub(super) invited: BTreeSet<MemberId>,
    /// Hosts that refused a member or its standby, until it is tried again.
    pub(super) refusing: BTreeSet<(Host, MemberId)>,
    /// Cuts in a row that came to nothing.
    pub(super) invalid: u8,
    /// The checkpoint that is being stored.
    pub(super) storing: Option<Storing>,
    /// Who waits for the recovery from a failure that he asked for.
    pub(super) failovers: Vec<RequestId>,
}

/// What is to be done, in order.
pub(super) type Out = Vec<Action>;

impl Group {
    /// A group that is new.
    ///
    /// # Errors
    /// There cannot be such a group.
    pub fn create(group: GroupId, spec: GroupSpec) -> Result<(Self, Vec<Action>), crate::Error> {
        Ok(Self::start(Record::new(group, spec)?))
    }

    /// Takes over the group that the journal says this of.
    pub fn start(record: Record) -> (Self, Vec<Action>) {
        let mut group = Self {
            last: record.permanent().unwrap_or(0),
            record,
            phase: Phase::Over,
            known: BTreeMap::new(),
            macs: BTreeMap::new(),
            agents: BTreeSet::new(),
            failed: BTreeSet::new(),
            doomed: BTreeSet::new(),
            addresses: BTreeMap::new(),
            invited: BTreeSet::new(),
            refusing: BTreeSet::new(),
            invalid: 0,
            storing: None,
            failovers: Vec::new(),
        };
        let mut out = Vec::new();
        if group.record.decided != Decided::Dissolved {
            group.raise_generation(&mut out);
            let seats = group.current().map(|located| (located.seat, 1));
            group.phase = Phase::Judging { owed: seats.collect() };
            group.judge_if_all_known(&mut out);
        }
        (group, out)
    }

    pub(super) fn stretch(&self) -> Stretch {
        match &self.phase {
            Phase::Judging { .. } => Stretch::Judging,
            Phase::Alone { .. } => Stretch::Alone(self.record.next),
            Phase::Idle => Stretch::Idle,
            Phase::Cutting(flight) if flight.step == Step::Shipping => Stretch::Shipping(flight.number),
            Phase::Cutting(flight) => Stretch::Cutting(flight.number),
            Phase::RollingBack { .. } => Stretch::RollingBack(self.record.generation),
            Phase::Over => Stretch::Over,
        }
    }

    /// What the journal is to say of it.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// What is to be done about `event`.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Hello(hello) => self.hello(hello, &mut out),
            Event::Said(seat, said) => self.said(seat, said, &mut out),
            Event::AgentHello(hello) => self.agent_hello(hello, &mut out),
            Event::AgentSaid(said) => self.agent_said(said.body, &mut out),
            Event::AgentGone(host) => {
                self.agents.remove(&host);
            }
            Event::Silent(seat) => self.fail(seat, "nothing is heard of it".to_owned(), &mut out),
            Event::Due => self.begin_cut(&mut out),
            Event::Late => self.late(&mut out),
            Event::Asked(id, request) => self.asked(id, request, &mut out),
        }
        out
    }

    fn hello(&mut self, hello: Envelope<SeatHello>, out: &mut Out) {
        let (
            generation,
            SeatHello {
                seat,
                host,
                macs,
                standing,
            },
        ) = (hello.generation, hello.body);
        if hello.group != self.record.group || generation > self.record.generation {
            tracing::error!(%seat, %generation, "it is of a group or generation that the journal does not know");
            return;
        }
        self.join_if_expected(seat, &host);
        if self.turned_away(seat, standing.stage, out) {
            return;
        }
        self.say(
            seat,
            ToSeat::Welcome {
                timing: self.record.spec.timing,
            },
            out,
        );
        if self.record.is_primary(seat) {
            self.macs.insert(seat.member, macs);
            let name = self.record.name(seat.member).to_owned();
            self.abandon(&format!("the link to '{name}' broke meanwhile"), out);
        }
        self.known.remove(&seat);
        self.stands(seat, standing, generation == self.record.generation, out);
        self.arrange(out);
    }

    fn said(&mut self, seat: Seat, said: Envelope<FromSeat>, out: &mut Out) {
        if said.group != self.record.group {
            return;
        }
        let is_of_now = said.generation == self.record.generation;
        if let FromSeat::Heartbeat { sent, standing, .. } = said.body {
            // Whoever has not said who it is is not known to live, and is not given a lease.
            if !self.turned_away(seat, standing.stage, out) && self.known.contains_key(&seat) {
                self.say(seat, ToSeat::Lease { sent }, out);
                self.stands(seat, standing, is_of_now, out);
            }
            return;
        }
        if !self.is_current(seat) {
            return;
        }
        match said.body {
            FromSeat::Failed { reason } => self.fail(seat, reason, out),
            _ if !is_of_now || self.doomed.contains(&seat) => {}
            FromSeat::Heartbeat { .. } => {}
            FromSeat::Seeded { standby } => self.seeded(seat, standby, out),
            FromSeat::YesAck(cut) => self.acknowledge(seat, cut, Stage::Blocked, out),
            FromSeat::Tentative(cut, taken) => self.taken(seat, cut, taken, out),
            FromSeat::CheckpointSuccess(cut) => self.acknowledge(seat, cut, Stage::Held, out),
            FromSeat::AtCut(cut) => self.at_cut(seat, cut, out),
            FromSeat::StandbyLost { standby, reason } => {
                if standby.member == seat.member && self.record.is_standby(standby) {
                    self.fail(standby, reason, out);
                }
            }
            FromSeat::SnapshotPrepared(id) => self.snapshot_prepared(seat, id, out),
            FromSeat::SnapshotOver(id, outcome) => self.snapshot_over(seat, id, outcome, out),
            FromSeat::OutputWaits => self.begin_cut(out),
            FromSeat::GuestEnded { .. } => self.guest_ended(seat, out),
        }
    }

    /// It is known that `seat` stands there: what it may have said before, and what it may not have heard.
    fn stands(&mut self, seat: Seat, standing: Standing, is_of_now: bool, out: &mut Out) {
        let before = self.known.remove(&seat);
        self.known.insert(seat, Known { standing, missed: None });
        self.last = self.last.max(standing.cut);
        self.sign_of_life(seat, out);
        if is_of_now {
            self.stands_at(seat, standing, out);
        }
        let Some(owed) = self.owed(seat, standing) else {
            return;
        };
        // What was said a moment ago may be on its way; not so over a new link, or after two heartbeats.
        if before.is_none_or(|known| known.missed.as_ref() == Some(&owed)) {
            self.say(seat, owed.clone(), out);
        }
        if let Some(known) = self.known.get_mut(&seat) {
            known.missed = Some(owed);
        }
    }

    /// What it has acknowledged by where it stands.
    fn stands_at(&mut self, seat: Seat, standing: Standing, out: &mut Out) {
        match standing.stage {
            Stage::Blocked | Stage::Held => self.acknowledge(seat, standing.cut, standing.stage, out),
            Stage::Tentative => self.taken(seat, standing.cut, Taken::Cut(CutReport::default()), out),
            Stage::Ended => self.taken(seat, standing.cut, Taken::Ended, out),
            Stage::AtCut => self.at_cut(seat, standing.permanent, out),
            Stage::Ready => self.arrange(out),
            _ => {}
        }
    }

    /// What was said to `seat` and it has not heard, as it stands.
    fn owed(&self, seat: Seat, standing: Standing) -> Option<ToSeat> {
        let is_primary = self.record.is_primary(seat);
        match &self.phase {
            Phase::Judging { .. } | Phase::Over => None,
            Phase::Alone { since } if is_primary && standing.cut < *since => Some(ToSeat::Unprotect(*since)),
            Phase::Alone { .. } if is_primary => self.seeding(seat, standing),
            Phase::Alone { .. } => None,
            Phase::RollingBack { cut, left } => left.contains(&seat).then(|| self.go_back(seat, *cut)),
            Phase::Cutting(flight) if is_primary && flight.is_waiting_for(seat) => Some(flight.asks()),
            Phase::Idle | Phase::Cutting(_) => self.owed_between_cuts(standing),
        }
    }

    fn owed_between_cuts(&self, standing: Standing) -> Option<ToSeat> {
        let permanent = self.record.permanent();
        let is_open = matches!(
            standing.stage,
            Stage::Blocking | Stage::Blocked | Stage::Taking | Stage::Tentative
        );
        match permanent {
            Some(cut) if standing.permanent < cut => Some(ToSeat::Permanent(cut)),
            _ if is_open && self.phase == Phase::Idle => Some(ToSeat::Invalid(standing.cut)),
            _ => None,
        }
    }

    /// Sends away whoever is not of the group, or not any more; says whether it did.
    fn turned_away(&mut self, seat: Seat, stage: Stage, out: &mut Out) -> bool {
        let ending = match self.record.place(seat.member) {
            _ if self.doomed.contains(&seat) => Ending::Replaced,
            _ if self.is_current(seat) && self.failed.contains(&seat) => Ending::Replaced,
            _ if self.record.decided == Decided::Dissolved && self.record.is_primary(seat) => Ending::Released,
            _ if self.record.decided == Decided::Dissolved => Ending::Replaced,
            _ if self.is_current(seat) => return false,
            Some(Place::Lost { was, ending, .. }) if was.seat == seat => *ending,
            Some(Place::Ended) if !matches!(stage, Stage::Empty | Stage::Whole) => Ending::Released,
            _ => Ending::Replaced,
        };
        self.say(seat, ToSeat::End(ending), out);
        true
    }

    fn asked(&mut self, id: RequestId, request: Request, out: &mut Out) {
        let is_protected = matches!(self.record.decided, Decided::Protected { .. });
        match request {
            Request::Dissolve => {
                self.dissolve(out);
                out.push(Action::Answer(id, Ok(self.last)));
            }
            Request::CancelStore => self.cancel_storing(id, out),
            Request::Resume => self.resume_restored(id, out),
            _ if !is_protected => {
                out.push(Action::Answer(id, Err("the group is not protected now".to_owned())));
            }
            Request::Store(request) => self.store(id, request, out),
            Request::Failover(member) => self.fail_on_purpose(id, member, out),
        }
    }

    /// A member or standby that is of the group.
    pub(super) fn current(&self) -> impl Iterator<Item = &Located> {
        self.record.primaries().chain(self.record.standbys())
    }

    pub(super) fn is_current(&self, seat: Seat) -> bool {
        self.record.is_primary(seat) || self.record.is_standby(seat)
    }

    /// The next number of a cut.
    pub(super) fn number(&mut self) -> Epoch {
        self.last += 1;
        self.last
    }

    pub(super) fn primary_seats(&self) -> BTreeSet<Seat> {
        self.record.primaries().map(|located| located.seat).collect()
    }

    pub(super) fn raise_generation(&mut self, out: &mut Out) {
        self.abandon("the group had to decide anew who is in it", out);
        self.record.generation = self.record.generation.next();
        self.journal(out);
    }

    pub(super) fn journal(&self, out: &mut Out) {
        out.push(Action::Journal(Box::new(self.record.clone())));
    }

    pub(super) fn say(&self, seat: Seat, body: ToSeat, out: &mut Out) {
        out.push(Action::Say(seat, self.envelope(body)));
    }

    pub(super) fn say_to_primaries(&self, body: &ToSeat, out: &mut Out) {
        for primary in self.record.primaries() {
            self.say(primary.seat, body.clone(), out);
        }
    }

    pub(super) fn tell(&self, host: &Host, body: ToAgent, out: &mut Out) {
        if self.agents.contains(host) {
            out.push(Action::Tell(host.clone(), self.envelope(body)));
        }
    }

    pub(super) fn kill(&self, process: &Located, out: &mut Out) {
        self.tell(&process.host, ToAgent::Kill { seat: process.seat }, out);
    }

    fn envelope<T>(&self, body: T) -> Envelope<T> {
        Envelope {
            group: self.record.group,
            generation: self.record.generation,
            body,
        }
    }

    pub(super) fn sign_of_life(&mut self, seat: Seat, out: &mut Out) {
        if let Phase::Judging { owed } = &mut self.phase {
            if let Some(signs) = owed.get_mut(&seat) {
                *signs -= 1;
                if *signs == 0 {
                    owed.remove(&seat);
                }
            }
            self.judge_if_all_known(out);
        }
    }

    /// A standby is gone: before the group is unprotected, each member has to show that it lives.
    pub(super) fn doubt(&mut self) {
        let members = self.primary_seats().into_iter();
        let owed = members.map(|seat| (seat, SIGNS_OF_LIFE)).collect();
        self.phase = Phase::Judging { owed };
    }
}
