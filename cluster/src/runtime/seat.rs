//! What a member and a standby have in common when they run: a mailbox, a clock, the link to the coordinator, and a thread
//! on which their VM is called.
//!
//! ```text
//!  coordinator ══ link ──┐            ┌─► say ══ link ══► coordinator
//!  VM: notices ──────────┼─► mailbox ─┤ the pure machine
//!  calls that returned ──┘     ▲      └─► calls ──► thread "seat-vm" ──► MemberVm, StandbyVm
//!                 heartbeats, the lease
//! ```
//! A call may take as long as sending a whole memory; messages are heard and the lease is kept meanwhile.

use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cutover_migration::transport::{Endpoint, Security};
use cutover_snapshot::spec::MacAddr;

use super::coordinators::{COORDINATORS_MAX, Contacted, Coordinators, Heard};
use super::link::{lock, spawn};
use super::member::MemberRuntime;
use super::standby::StandbyRuntime;
use crate::id::{Generation, Host, Identity};
use crate::lease::{Nanos, nanos};
use crate::member::Member;
use crate::message::{Ending, Envelope, FromSeat, Standing, ToSeat};
use crate::spec::Timing;
use crate::standby::Standby;
use crate::vm::{CutReport, MemberStatus, MemberVm, Notice, StandbyNotice, StandbyVm};
use crate::{Error, member, standby};

/// Most calls that wait for the VM. The machines ask for a few at a time; a coordinator that has them ask for more than
/// this is no good.
const CALLS_MAX: usize = 256;

/// Who sits where, and how the coordinator is reached.
#[derive(Clone, Debug)]
pub struct SeatOptions {
    /// Who it is.
    pub who: Identity,
    /// What the coordinator calls this host.
    pub host: Host,
    /// Where the coordinator listens; it tells where others do.
    pub coordinator: Endpoint,
    /// What protects the link to it.
    pub security: Security,
}

/// What comes to a seat.
#[derive(Debug)]
pub(super) enum Mail {
    /// By a link to a coordinator.
    Contact(Contacted),
    /// What came of a call of a member's VM.
    Did(member::Call, Result<CutReport, String>),
    /// The same of a standby.
    StandbyDid(standby::Call, Result<(), String>),
    /// What a member's VM tells by itself.
    Notice(Notice),
    /// The same of a standby.
    StandbyNotice(StandbyNotice),
}

/// Where a VM, or a standby, sends what it tells by itself. A seat that is gone does not care.
#[derive(Clone, Debug)]
pub struct Notices(Sender<Mail>);

impl Notices {
    /// A member's VM tells something.
    pub fn tell(&self, notice: Notice) {
        let _ = self.0.send(Mail::Notice(notice));
    }

    /// A standby tells something.
    pub fn tell_of_standby(&self, notice: StandbyNotice) {
        let _ = self.0.send(Mail::StandbyNotice(notice));
    }
}

/// A seat that nobody has taken yet.
#[derive(Debug)]
pub struct Seat {
    pub(super) mail: Sender<Mail>,
    pub(super) mailbox: Receiver<Mail>,
}

impl Default for Seat {
    fn default() -> Self {
        let (mail, mailbox) = channel();
        Self { mail, mailbox }
    }
}

impl Seat {
    /// Where whoever takes it is told of things.
    pub fn notices(&self) -> Notices {
        Notices(self.mail.clone())
    }

    /// Has `vm` be a member. `ended` is called when it is one no more, on a thread of the seat: after
    /// [`Ending::Replaced`] the VM must not run again.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn join(
        self,
        vm: impl MemberVm + 'static,
        options: &SeatOptions,
        ended: impl FnOnce(Ending) + Send + 'static,
    ) -> Result<SharedView, Error> {
        let machine = Member::joining(options.who);
        let view = SharedView::new(options, machine.standing());
        view.note_macs(vm.macs());
        let desk = Desk::open(options, view.clone(), self)?;
        let runtime = MemberRuntime::start(vm, machine, desk)?;
        spawn("seat", move || ended(runtime.run()))?;
        Ok(view)
    }

    /// Has `standby` keep the image of a member, and be the member when it is promoted. `ended` is called when it is
    /// neither any more, on a thread of the seat.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn stand_by(
        self,
        standby: impl StandbyVm + 'static,
        options: &SeatOptions,
        ended: impl FnOnce(Ending) + Send + 'static,
    ) -> Result<SharedView, Error> {
        let machine = Standby::new(options.who);
        let view = SharedView::new(options, machine.standing());
        let desk = Desk::open(options, view.clone(), self)?;
        let runtime = StandbyRuntime::start(standby, machine, desk)?;
        spawn("seat", move || ended(runtime.run()))?;
        Ok(view)
    }
}

/// How a seat is doing, for whoever looks.
#[derive(Clone, Debug)]
pub struct SeatView {
    /// Who it is.
    pub who: Identity,
    /// Where there are coordinators: first the one that it was last linked to, then others that may decide one day.
    pub coordinators: Vec<Endpoint>,
    /// Whether there is a link to the first.
    pub connected: bool,
    /// The generation it is in.
    pub generation: Generation,
    /// Where it stands.
    pub standing: Standing,
    /// Addresses of its network devices; of a standby none.
    pub macs: Vec<MacAddr>,
    /// How its VM is doing.
    pub status: MemberStatus,
}

/// Shared with the keeper of the link, which says it in each Hello, and with those who look.
#[derive(Clone, Debug)]
pub struct SharedView(Arc<Mutex<SeatView>>);

impl SharedView {
    pub(super) fn new(options: &SeatOptions, standing: Standing) -> Self {
        Self(Arc::new(Mutex::new(SeatView {
            who: options.who,
            coordinators: vec![options.coordinator.clone()],
            connected: false,
            generation: Generation::default(),
            standing,
            macs: Vec::new(),
            status: MemberStatus::default(),
        })))
    }

    /// How it is doing.
    pub fn get(&self) -> SeatView {
        lock(&self.0).clone()
    }

    /// There is a coordinator at `endpoint`, which is the best guess from now on.
    pub fn learn(&self, endpoint: Endpoint) {
        let coordinators = &mut lock(&self.0).coordinators;
        coordinators.retain(|known| *known != endpoint);
        coordinators.insert(0, endpoint);
        coordinators.truncate(COORDINATORS_MAX);
    }

    pub(super) fn note_connected(&self, connected: bool) {
        lock(&self.0).connected = connected;
    }

    pub(super) fn note(&self, generation: Generation, standing: Standing) {
        let mut view = lock(&self.0);
        view.generation = generation;
        view.standing = standing;
    }

    pub(super) fn note_macs(&self, macs: Vec<MacAddr>) {
        lock(&self.0).macs = macs;
    }

    pub(super) fn note_status(&self, status: MemberStatus) {
        lock(&self.0).status = status;
    }

    pub(super) fn status(&self) -> MemberStatus {
        lock(&self.0).status
    }
}

/// The coordinator's end of a seat, and the time.
pub(super) struct Desk {
    began: Instant,
    coordinators: Coordinators,
    /// When the next heartbeat is due.
    beat_at: Instant,
    pub view: SharedView,
    seat: Seat,
}

impl Desk {
    /// Calls the coordinator; what it says comes to the mailbox of `seat`.
    fn open(options: &SeatOptions, view: SharedView, seat: Seat) -> Result<Self, Error> {
        let coordinators = Coordinators::call(options, view.clone(), seat.mail.clone())?;
        let now = Instant::now();
        Ok(Self {
            began: now,
            coordinators,
            beat_at: now,
            view,
            seat,
        })
    }

    /// Where what came of calls goes.
    pub fn mail(&self) -> Sender<Mail> {
        self.seat.mail.clone()
    }

    /// The time that heartbeats are stamped with.
    pub fn now(&self) -> Nanos {
        nanos(self.began.elapsed())
    }

    pub fn say(&self, message: Envelope<FromSeat>) {
        self.coordinators.say(message);
    }

    /// What a link brings: a message, if it is one.
    pub fn hear(&mut self, contacted: Contacted) -> Option<Envelope<ToSeat>> {
        match self.coordinators.hear(contacted) {
            Heard::Message(message) => Some(message),
            Heard::Link => {
                // It is not known to live before it says so.
                self.beat_at = Instant::now();
                None
            }
            Heard::Nothing => None,
        }
    }

    /// Whether a heartbeat is due; the next is after that of `timing`.
    pub fn is_beat_due(&mut self, timing: &Timing) -> bool {
        let now = Instant::now();
        let is_due = now >= self.beat_at;
        if is_due {
            self.beat_at = now + timing.heartbeat;
            self.coordinators.look(timing);
        }
        is_due
    }

    /// What comes next, if that is before the next heartbeat is due and before `stops_at`.
    pub fn next(&self, stops_at: Option<Nanos>) -> Option<Mail> {
        let until_beat = self.beat_at.saturating_duration_since(Instant::now());
        let until_stop = stops_at.map(|at| Duration::from_nanos(at.saturating_sub(self.now())));
        let wait = until_stop.map_or(until_beat, |stop| stop.min(until_beat));
        self.seat.mailbox.recv_timeout(wait).ok()
    }
}

/// A thread on which calls are made, one after the other.
pub(super) struct Caller<C> {
    calls: SyncSender<C>,
    thread: JoinHandle<()>,
}

impl<C: Send + 'static> Caller<C> {
    /// Starts the thread, which gives each call to `make`.
    pub fn start(mut make: impl FnMut(C) + Send + 'static) -> Result<Self, Error> {
        let (calls, queue) = sync_channel(CALLS_MAX);
        let thread = spawn("seat-vm", move || queue.iter().for_each(&mut make))?;
        Ok(Self { calls, thread })
    }

    /// Has `call` made after those before.
    ///
    /// # Errors
    /// Too many wait, or the thread is gone: the call that is not made.
    pub fn call(&self, call: C) -> Result<(), C> {
        self.calls.try_send(call).map_err(|refused| match refused {
            TrySendError::Full(call) | TrySendError::Disconnected(call) => call,
        })
    }

    /// Returns when all calls have returned.
    pub fn finish(self) {
        drop(self.calls);
        if self.thread.join().is_err() {
            tracing::error!("the thread that calls the VM has panicked");
        }
    }
}
