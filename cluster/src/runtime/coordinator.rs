//! The coordinator of groups as it runs: one thread that hears everything, and does what the engines say, in their order.
//!
//! ```text
//!  members, standbys ══ links ──┐                     ┌─ Journal: durable before anything after it
//!  agents ◄═ called, kept open ─┼─► mailbox ─► Engine ┼─ Say, Tell ══ links ══►
//!  whoever asks ── Ask ─────────┘     ▲ time          └─ Answer, Report
//! ```
//! Each link has threads of its own, so whoever is slow delays nobody else; a queue that fills ends its link. What it
//! cannot make durable it must not say: with a journal that fails, or that another has, a coordinator forgets all and
//! waits for its [`turn`] to take over what the journal says then.

mod asks;
mod turn;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cutover_migration::transport::{Endpoint, Listener, Security};

use self::asks::Asked;
pub use self::asks::{Ask, GROUPS_MAX, GroupView, Reply};
use self::turn::{Right, Role};
use super::agent::{AgentSays, CoordinatorHello};
use super::contact::{Contact, Keeper};
use super::coordinators::CoordinatorSays;
use super::journal::Journal;
use super::link::{Called, ControlLink, Incoming, Reception, spawn};
use super::recovery::Recoveries;
use crate::Error;
use crate::engine::{Action, Decided, Engine, Event, Input, Record, Report, RequestId};
use crate::id::{GroupId, Host, Seat};
use crate::lease::{Nanos, nanos};
use crate::message::{AgentHello, Envelope, FromSeat, Hello, SeatHello, ToAgent};

/// How long to wait for something to come when no group waits for the time.
const IDLE: Duration = Duration::from_secs(1);
/// How long members and standbys may take to find a coordinator that has taken over: only then does their silence count.
const SEARCH_MAX: Duration = Duration::from_secs(2);

/// A coordinator that runs. Dropped, it decides nothing more; its groups wait for the next.
pub struct Coordinator {
    mail: Sender<Mail>,
    thread: Option<JoinHandle<()>>,
    _reception: Reception,
}

/// Told what happens to a group, of which the journal says this.
pub type Observer = Box<dyn FnMut(&Record, &Report) + Send>;

/// How a coordinator works.
pub struct Options {
    /// What protects its links.
    pub security: Security,
    /// Told what happens to groups.
    pub observer: Observer,
}

type SeatLink = ControlLink<CoordinatorSays>;
type AgentLink = ControlLink<Envelope<ToAgent>>;

enum Mail {
    /// A member or standby has called.
    Called(Envelope<SeatHello>, SeatLink, LinkId),
    /// It says something.
    Said(GroupId, Seat, Envelope<FromSeat>),
    /// Its link is over.
    Gone(GroupId, Seat, LinkId),
    /// Something about the link to an agent.
    Agent(Host, Contact<Envelope<ToAgent>, AgentSays>),
    Ask(Ask),
    End,
}

/// Which of the links that a seat has had.
type LinkId = u64;

impl Coordinator {
    /// Decides about what `journal` has when it is its turn, and serves those that call at `listener`.
    ///
    /// # Errors
    /// The journal cannot be used, or there are no threads to be had.
    pub fn start(listener: Listener, journal: Box<dyn Journal>, options: Options) -> Result<Self, Error> {
        let (mail, mailbox) = channel();
        let role = Role::default();
        let mut desk = Desk {
            began: Instant::now(),
            endpoint: listener.endpoint().clone(),
            security: options.security,
            journal,
            right: Right::default(),
            role: role.clone(),
            observer: options.observer,
            mail: mail.clone(),
            groups: BTreeMap::new(),
            agents: BTreeMap::new(),
            requests: BTreeMap::new(),
            next_request: 0,
        };
        // Whoever starts it learns of a journal that is none.
        let is_granted = desk.claim()?;
        let thread = spawn("coordinator", move || desk.work(is_granted, &mailbox))?;
        let reception = receive(listener, role, mail.clone())?;
        Ok(Self {
            mail,
            thread: Some(thread),
            _reception: reception,
        })
    }

    /// Asks something; the answer goes the way that it has with it. A coordinator that is over drops that.
    pub fn ask(&self, ask: Ask) {
        let _ = self.mail.send(Mail::Ask(ask));
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // One that has panicked is over already.
        let _ = self.mail.send(Mail::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the coordinator's thread has panicked");
        }
    }
}

/// Accepts members and standbys.
fn receive(listener: Listener, role: Role, mail: Sender<Mail>) -> Result<Reception, Error> {
    let next_link = std::sync::atomic::AtomicU64::new(0);
    let check = move |hello: &Hello| match hello {
        Hello::Seat(_) => role.waits_because().map_or(Ok(()), Err),
        Hello::Agent(_) => Err("agents are called, and do not call".to_owned()),
    };
    let called = move |called: Called<Hello>| {
        let Hello::Seat(hello) = called.hello.clone() else {
            return;
        };
        let id = next_link.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (group, seat) = (hello.group, hello.body.seat);
        let answered = called.answer::<CoordinatorSays, Envelope<FromSeat>>();
        let mail = mail.clone();
        let heard = answered.and_then(|(link, ears)| {
            // A coordinator that is over hears nothing more, here and below.
            let _ = mail.send(Mail::Called(hello, link, id));
            ears.listen(move |incoming| {
                let _ = mail.send(match incoming {
                    Incoming::Says(message) => Mail::Said(group, seat, message),
                    Incoming::Over(error) => {
                        tracing::debug!(%seat, %error, "its link is over");
                        Mail::Gone(group, seat, id)
                    }
                });
            })
        });
        if let Err(error) = heard {
            tracing::warn!(%seat, %error, "cannot serve a member or standby");
        }
    };
    Ok(Reception::open(listener, check, called)?)
}

/// A group, and who is linked.
struct Running {
    engine: Engine,
    links: BTreeMap<Seat, (LinkId, SeatLink)>,
    recoveries: Recoveries,
    refusal: Option<String>,
}

impl Running {
    fn is_over(&self) -> bool {
        self.engine.record().decided == Decided::Dissolved
    }

    fn view(&self) -> GroupView {
        let links = self.links.iter().filter(|(_, (_, link))| !link.is_over());
        GroupView {
            status: self.engine.status(),
            connected: links.map(|(seat, _)| *seat).collect(),
            refusal: self.refusal.clone(),
            last_recovery: self.recoveries.last().cloned(),
        }
    }

    fn note(&mut self, report: &Report) {
        match report {
            Report::Refused { reason, .. } => self.refusal = Some(reason.clone()),
            Report::Protected => self.refusal = None,
            _ => {}
        }
        let members = self.engine.record().primaries().map(|primary| primary.seat);
        self.recoveries.note(report, members);
    }
}

/// The agent of a host.
struct Agent {
    link: Option<AgentLink>,
    _keeper: Keeper,
}

/// All that the coordinator's thread has.
struct Desk {
    began: Instant,
    endpoint: Endpoint,
    security: Security,
    journal: Box<dyn Journal>,
    right: Right,
    role: Role,
    observer: Observer,
    mail: Sender<Mail>,
    groups: BTreeMap<GroupId, Running>,
    agents: BTreeMap<Host, Agent>,
    requests: BTreeMap<RequestId, Asked>,
    next_request: u64,
}

impl Desk {
    fn take_over(&mut self) -> Result<(), Error> {
        for record in self.journal.records()? {
            let (group, now) = (record.group, self.now());
            let (mut engine, actions) = Engine::start(record, now);
            engine.wait_for_calls(now.saturating_add(nanos(SEARCH_MAX)));
            self.add(group, engine, actions)?;
        }
        self.begin();
        Ok(())
    }

    fn add(&mut self, group: GroupId, engine: Engine, actions: Vec<Action>) -> Result<(), Error> {
        let spec = &engine.record().spec;
        let hosts = spec.members.iter().map(|member| &member.host).chain(&spec.backups);
        let hosts: BTreeSet<Host> = hosts.cloned().collect();
        let running = Running {
            engine,
            links: BTreeMap::new(),
            recoveries: Recoveries::default(),
            refusal: None,
        };
        self.groups.insert(group, running);
        self.carry_out(group, actions)?;
        for host in hosts {
            self.call_agent(group, host)?;
        }
        Ok(())
    }

    /// Has a link to the agent of `host`, for this group as well.
    fn call_agent(&mut self, group: GroupId, host: Host) -> Result<(), Error> {
        if let Some(agent) = self.agents.get(&host) {
            // It has said who it is to the groups before; of this one it has no processes yet.
            return match agent.link {
                Some(_) => {
                    let seats = Vec::new();
                    self.hear(group, Event::AgentHello(AgentHello { host, seats }))
                }
                None => Ok(()),
            };
        }
        let to: Endpoint = host.0.parse().map_err(|error| Error::Spec {
            group: group.to_string(),
            reason: format!("{error}"),
        })?;
        let hello = CoordinatorHello {
            coordinator: self.endpoint.to_string(),
            host: host.clone(),
        };
        let (mail, from) = (self.mail.clone(), host.clone());
        let tell = move |contact| drop(mail.send(Mail::Agent(from.clone(), contact)));
        let keeper = Keeper::start(to, self.security.clone(), move || Some(hello.clone()), tell)?;
        let agent = Agent {
            link: None,
            _keeper: keeper,
        };
        self.agents.insert(host, agent);
        Ok(())
    }

    fn now(&self) -> Nanos {
        nanos(self.began.elapsed())
    }

    /// Decides until it is told to end.
    fn run(&mut self, mailbox: &Receiver<Mail>) -> Result<(), Error> {
        loop {
            self.keep_right()?;
            let now = self.now();
            let due = self.groups.values().map(|running| running.engine.wakes_at()).min();
            let wait = due.map_or(IDLE, |at| Duration::from_nanos(at.saturating_sub(now)));
            match mailbox.recv_timeout(wait.min(self.until_renewal())) {
                Ok(Mail::End) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(mail) => self.take(mail)?,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.pass_time()?;
        }
    }

    fn pass_time(&mut self) -> Result<(), Error> {
        let now = self.now();
        let due = self
            .groups
            .iter()
            .filter(|(_, running)| running.engine.wakes_at() <= now);
        let due: Vec<_> = due.map(|(id, _)| *id).collect();
        due.into_iter().try_for_each(|id| self.give(id, Input::Tick))
    }

    fn take(&mut self, mail: Mail) -> Result<(), Error> {
        match mail {
            Mail::Called(hello, link, id) => {
                let (group, seat, says) = (hello.group, hello.body.seat, self.coordinators());
                let Some(running) = self.groups.get_mut(&group) else {
                    tracing::warn!(%group, %seat, "it calls for a group that the journal does not know");
                    return Ok(());
                };
                link.send(says);
                running.links.insert(seat, (id, link));
                self.hear(group, Event::Hello(hello))
            }
            Mail::Said(group, seat, message) => {
                if let (FromSeat::Heartbeat { standing, .. }, Some(running)) =
                    (&message.body, self.groups.get_mut(&group))
                {
                    running.recoveries.hear(seat, *standing);
                }
                self.hear(group, Event::Said(seat, message))
            }
            Mail::Gone(group, seat, id) => {
                if let Some(running) = self.groups.get_mut(&group)
                    && running.links.get(&seat).is_some_and(|(link, _)| *link == id)
                {
                    running.links.remove(&seat);
                }
                Ok(())
            }
            Mail::Agent(host, contact) => self.take_from_agent(&host, contact),
            Mail::Ask(ask) => self.serve(ask),
            Mail::End => Ok(()),
        }
    }

    fn take_from_agent(&mut self, host: &Host, contact: Contact<Envelope<ToAgent>, AgentSays>) -> Result<(), Error> {
        match contact {
            Contact::Up(link) => {
                if let Some(agent) = self.agents.get_mut(host) {
                    agent.link = Some(link);
                }
                Ok(())
            }
            Contact::Says(AgentSays::Hello(hello)) => self.hear_of_host(host, &Event::AgentHello(hello)),
            Contact::Says(AgentSays::Says(message)) => self.hear(message.group, Event::AgentSaid(message)),
            Contact::Down(error) => {
                tracing::warn!(%host, %error, "there is no link to its agent");
                if let Some(agent) = self.agents.get_mut(host) {
                    agent.link = None;
                }
                self.hear_of_host(host, &Event::AgentGone(host.clone()))
            }
        }
    }

    /// All groups that have to do with `host` hear of `event`.
    fn hear_of_host(&mut self, host: &Host, event: &Event) -> Result<(), Error> {
        let concerns = |running: &Running| {
            let spec = &running.engine.record().spec;
            spec.backups.contains(host) || spec.members.iter().any(|member| member.host == *host)
        };
        let groups: Vec<_> = self
            .groups
            .iter()
            .filter_map(|(id, running)| concerns(running).then_some(*id))
            .collect();
        groups.into_iter().try_for_each(|id| self.hear(id, event.clone()))
    }

    fn hear(&mut self, group: GroupId, event: Event) -> Result<(), Error> {
        self.give(group, Input::Event(event))
    }

    fn give(&mut self, group: GroupId, input: Input) -> Result<(), Error> {
        let now = self.now();
        let actions = self.groups.get_mut(&group).map(|running| running.engine.on(input, now));
        self.carry_out(group, actions.unwrap_or_default())
    }

    /// Does what the engine of `group` says, in its order.
    fn carry_out(&mut self, group: GroupId, actions: Vec<Action>) -> Result<(), Error> {
        let Some(running) = self.groups.get_mut(&group) else {
            return Ok(());
        };
        for action in actions {
            match action {
                Action::Journal(record) => self.journal.put(&record)?,
                Action::JournalCut(cut) => self.journal.put_cut(running.engine.record(), cut)?,
                Action::Say(seat, message) => {
                    if let Some((_, link)) = running.links.get(&seat) {
                        link.send(CoordinatorSays::Says(message));
                    }
                }
                Action::Tell(host, message) => {
                    if let Some(link) = self.agents.get(&host).and_then(|agent| agent.link.as_ref()) {
                        link.send(message);
                    }
                }
                Action::Answer(id, result) => {
                    if let Some(asked) = self.requests.remove(&id) {
                        asked.answer(&running.engine.record().spec.name, result.map(drop));
                    }
                }
                Action::Stored(id, cut) => {
                    if let Some(asked) = self.requests.remove(&id) {
                        asked.answer_stored(running.engine.record(), cut);
                    }
                }
                Action::Report(report) => {
                    running.note(&report);
                    (self.observer)(running.engine.record(), &report);
                }
            }
        }
        Ok(())
    }
}
