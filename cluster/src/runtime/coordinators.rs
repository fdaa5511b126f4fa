//! Whichever coordinator decides: a link is kept to that one, out of all that are known.
//!
//! ```text
//!  the one that decides ══ link ══╗        says who waits to decide: those are known from then on
//!  one that waits ── refuses ─────╫─► seat
//!  one that is gone ── nothing ───╝        nobody is called while there is a link that is answered
//! ```
//! Each is called by a thread of its own, so that none that does not answer delays another.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use cutover_migration::Error as LinkError;
use cutover_migration::transport::{Endpoint, Security};
use serde::{Deserialize, Serialize};

use super::contact::{Contact, Keeper};
use super::journal::WAITING_MAX;
use super::link::ControlLink;
use super::seat::{Mail, SeatOptions, SeatView, SharedView};
use crate::id::Host;
use crate::message::{Envelope, FromSeat, Hello, SeatHello, ToSeat};
use crate::spec::Timing;

/// How long nothing may be heard over a link, at least, until others are called.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Most coordinators that a seat knows.
pub(super) const COORDINATORS_MAX: usize = 1 + WAITING_MAX;

/// What a coordinator says to a seat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorSays {
    /// Where coordinators are that wait to decide, as [`Endpoint`]s.
    Coordinators(Vec<String>),
    /// Something of its group.
    Says(Envelope<ToSeat>),
}

/// Something about a link to one of them.
pub(super) type Contacted = (Endpoint, Contact<Envelope<FromSeat>, CoordinatorSays>);

/// See the module.
pub(super) struct Coordinators {
    host: Host,
    security: Security,
    view: SharedView,
    mail: Sender<Mail>,
    /// What keeps calling each that is known.
    keepers: BTreeMap<String, Keeper>,
    link: Option<(Endpoint, ControlLink<Envelope<FromSeat>>)>,
    /// When something last came over it.
    heard: Instant,
}

impl Coordinators {
    /// Calls those that `view` knows; what comes of it goes to `mail`, for [`hear`](Self::hear).
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn call(options: &SeatOptions, view: SharedView, mail: Sender<Mail>) -> Result<Self, LinkError> {
        let mut coordinators = Self {
            host: options.host.clone(),
            security: options.security.clone(),
            view,
            mail,
            keepers: BTreeMap::new(),
            link: None,
            heard: Instant::now(),
        };
        coordinators.call_known()?;
        Ok(coordinators)
    }

    pub fn say(&self, message: Envelope<FromSeat>) {
        if let Some((_, link)) = &self.link {
            link.send(message);
        }
    }

    /// What a link brings: a message, if it is one. Says as well whether there is a new link.
    pub fn hear(&mut self, (from, contact): Contacted) -> Heard {
        let is_linked = self.link.as_ref().is_some_and(|(at, _)| *at == from);
        match contact {
            Contact::Up(link) => {
                tracing::info!(coordinator = %from, "the coordinator is there");
                self.heard = Instant::now();
                self.view.learn(from.clone());
                self.view.note_connected(true);
                self.link = Some((from, link));
                return Heard::Link;
            }
            // What one says that has been left is old.
            Contact::Says(_) if !is_linked => {}
            Contact::Says(CoordinatorSays::Says(message)) => {
                self.heard = Instant::now();
                return Heard::Message(message);
            }
            Contact::Says(CoordinatorSays::Coordinators(others)) => self.learn(&from, &others),
            Contact::Down(error) if is_linked || self.link.is_none() => {
                tracing::warn!(coordinator = %from, %error, "there is no link to the coordinator");
                self.leave();
            }
            Contact::Down(error) => tracing::debug!(coordinator = %from, %error, "it does not decide, or is gone"),
        }
        Heard::Nothing
    }

    /// Takes note of those that may decide. Those that were known stay so: one that is gone may come back.
    fn learn(&mut self, from: &Endpoint, others: &[String]) {
        for other in others.iter().take(WAITING_MAX) {
            match other.parse() {
                Ok(endpoint) => self.view.learn(endpoint),
                Err(error) => tracing::warn!(coordinator = %from, %error, "it names another coordinator wrongly"),
            }
        }
        self.view.learn(from.clone());
    }

    fn leave(&mut self) {
        self.link = None;
        self.view.note_connected(false);
    }

    /// To be called at each heartbeat: calls those that are known by now, and leaves one that does not answer if there
    /// are others.
    pub fn look(&mut self, timing: &Timing) {
        let patience = timing.suspicion.max(SILENCE_MAX);
        if self.keepers.len() > 1 && self.link.is_some() && self.heard.elapsed() > patience {
            tracing::warn!("the coordinator does not answer: all that are known are called");
            self.leave();
        }
        if let Err(error) = self.call_known() {
            tracing::warn!(%error, "cannot call all coordinators");
        }
    }

    fn call_known(&mut self) -> Result<(), LinkError> {
        let known = self.view.get().coordinators;
        self.keepers
            .retain(|at, _| known.iter().any(|endpoint| endpoint.to_string() == *at));
        for endpoint in known {
            if let Entry::Vacant(entry) = self.keepers.entry(endpoint.to_string()) {
                let (mail, at) = (self.mail.clone(), endpoint.clone());
                // A seat that is gone hears nothing more.
                let tell = move |contact| drop(mail.send(Mail::Contact((at.clone(), contact))));
                let hello = hello(self.view.clone(), self.host.clone());
                entry.insert(Keeper::start(endpoint, self.security.clone(), hello, tell)?);
            }
        }
        Ok(())
    }
}

/// What came over a link.
pub(super) enum Heard {
    /// A message.
    Message(Envelope<ToSeat>),
    /// It is a new one.
    Link,
    /// Nothing for whoever asks.
    Nothing,
}

/// Says who calls, unless there is a link.
fn hello(view: SharedView, host: Host) -> impl Fn() -> Option<Hello> + Send {
    move || {
        let SeatView {
            who,
            generation,
            standing,
            macs,
            connected,
            ..
        } = view.get();
        let hello = SeatHello {
            seat: who.seat,
            host: host.clone(),
            macs,
            standing,
        };
        let envelope = Envelope {
            group: who.group,
            generation,
            body: hello,
        };
        (!connected).then_some(Hello::Seat(envelope))
    }
}
