//! The agent of a host: starts standbys there, has VMs that run there join groups, and tells when one of them dies.
//!
//! ```text
//!  coordinator ── Join, StartStandby, Kill ──► agent ── HostWork ──► the API of a VM, or `cutover standby`
//!              ◄── Started │ Refused ────────    │ pidfd of either
//!              ◄── Died ─────────────────────────┘
//! ```
//! That a process is gone is certain, and known at once, while a heartbeat that does not come is neither. The agent
//! decides nothing, and nothing depends on its staying: the processes go on without it. The coordinator calls it, and
//! tells with that where the processes reach the coordinator.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cutover_migration::transport::{Endpoint, Listener};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::link::{Called, ControlLink, Incoming, Reception, lock, spawn};
use crate::Error;
use crate::id::{Generation, GroupId, Host, Seat};
use crate::message::{AgentHello, Envelope, FromAgent, ToAgent};
use crate::vm::StandbyAddress;

/// Most processes that an agent watches.
pub const PROCESSES_MAX: usize = 4096;
/// How often a thread that watches a process looks whether it is still to do so.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What a coordinator calls an agent with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorHello {
    /// Where members and standbys reach it: an [`Endpoint`] as text.
    pub coordinator: String,
    /// What it calls the host: the [`Endpoint`] it called, as text.
    pub host: Host,
}

/// What an agent says to the coordinator that called it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentSays {
    /// First of all: who it is.
    Hello(AgentHello),
    /// What came of something.
    Says(Envelope<FromAgent>),
}

/// Whom a process is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its group.
    pub group: GroupId,
    /// Its seat there.
    pub seat: Seat,
    /// The VM's name.
    pub vm: String,
    /// What the coordinator calls this host.
    pub host: Host,
    /// Where it reaches the coordinator.
    pub coordinator: Endpoint,
    /// The snapshot that the VM is started from, paused, if it does not run.
    pub restore: Option<PathBuf>,
}

/// What is to be done on a host that takes more than to talk.
pub trait HostWork: Send + Sync + 'static {
    /// Starts a standby; returns its process, and where it listens, when it does.
    ///
    /// # Errors
    /// It cannot be started.
    fn start_standby(&self, place: &Place) -> Result<(OwnedFd, Endpoint), String>;

    /// Has the VM called [`Place::vm`] join; returns its process.
    ///
    /// # Errors
    /// There is none, or it refuses.
    fn join(&self, place: &Place) -> Result<OwnedFd, String>;

    /// Lets the VM called [`Place::vm`] run, if it is paused.
    ///
    /// # Errors
    /// There is none, or it refuses.
    fn resume(&self, place: &Place) -> Result<(), String>;
}

/// An agent that listens. Dropped, it serves nobody new; the processes go on.
pub struct Agent {
    _reception: Reception,
}

impl Agent {
    /// Serves coordinators that call at `listener`.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn start(listener: Listener, work: impl HostWork) -> Result<Self, Error> {
        let agent = Arc::new(Shared {
            work,
            watched: Mutex::default(),
        });
        let check = |hello: &CoordinatorHello| match hello.coordinator.parse::<Endpoint>() {
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        let called = move |called| {
            if let Err(error) = Arc::clone(&agent).serve(called) {
                tracing::warn!(%error, "cannot serve a coordinator");
            }
        };
        let reception = Reception::open(listener, check, called)?;
        Ok(Self { _reception: reception })
    }
}

type Process = (GroupId, Seat);

struct Shared<W> {
    work: W,
    /// Processes that may still be there.
    watched: Mutex<BTreeMap<Process, Arc<OwnedFd>>>,
}

impl<W: HostWork> Shared<W> {
    /// Serves a coordinator on a thread of its own: an order may take as long as a process takes to start.
    fn serve(self: Arc<Self>, called: Called<CoordinatorHello>) -> Result<(), Error> {
        let (orders, taken) = channel();
        let CoordinatorHello { coordinator, host } = called.hello.clone();
        let coordinator = coordinator.parse().map_err(|error| Error::Invalid {
            what: "an endpoint",
            reason: format!("{error}"),
        })?;
        let (link, ears) = called.answer::<AgentSays, Envelope<ToAgent>>()?;
        let service = Service {
            agent: self,
            link: Arc::new(link),
            host,
            coordinator,
        };
        ears.listen(move |incoming| match incoming {
            // One that nobody carries out any more ends with the link.
            Incoming::Says(order) => drop(orders.send(order)),
            Incoming::Over(error) => tracing::info!(%error, "the link of a coordinator is over"),
        })?;
        spawn("agent", move || service.run(&taken))?;
        Ok(())
    }

    fn keep(&self, id: Process, process: &Arc<OwnedFd>) -> Result<(), String> {
        let mut watched = lock(&self.watched);
        if watched.len() >= PROCESSES_MAX {
            watched.retain(|_, process| !has_ended(process, Duration::ZERO));
        }
        if watched.len() >= PROCESSES_MAX {
            return Err(format!("this host has {PROCESSES_MAX} processes of groups already"));
        }
        watched.insert(id, Arc::clone(process));
        Ok(())
    }

    /// Those that are there.
    fn running(&self) -> Vec<(Process, Arc<OwnedFd>)> {
        let mut watched = lock(&self.watched);
        watched.retain(|_, process| !has_ended(process, Duration::ZERO));
        watched.iter().map(|(id, process)| (*id, Arc::clone(process))).collect()
    }
}

/// An agent as a coordinator has it.
struct Service<W> {
    agent: Arc<Shared<W>>,
    link: Arc<ControlLink<AgentSays>>,
    host: Host,
    coordinator: Endpoint,
}

impl<W: HostWork> Service<W> {
    fn run(&self, orders: &Receiver<Envelope<ToAgent>>) {
        // A coordinator that comes back has missed what happened meanwhile.
        let running = self.agent.running();
        self.link.send(AgentSays::Hello(AgentHello {
            host: self.host.clone(),
            seats: running.iter().map(|(id, _)| *id).collect(),
        }));
        for (id, process) in running {
            self.watch(id, process);
        }
        for order in orders {
            if let Some(body) = self.carry_out(&order) {
                self.link.send(AgentSays::Says(Envelope {
                    group: order.group,
                    generation: order.generation,
                    body,
                }));
            }
        }
    }

    fn carry_out(&self, order: &Envelope<ToAgent>) -> Option<FromAgent> {
        let group = order.group;
        let place = |seat, vm: &String| Place {
            group,
            seat,
            vm: vm.clone(),
            host: self.host.clone(),
            coordinator: self.coordinator.clone(),
            restore: None,
        };
        let refused = |seat, reason| Some(FromAgent::Refused { seat, reason });
        match &order.body {
            ToAgent::Resume { seat, vm } => {
                let resumed = self.agent.work.resume(&place(*seat, vm));
                resumed.err().and_then(|reason| refused(*seat, reason))
            }
            ToAgent::Join { seat, vm, restore } => {
                let restore = restore.clone();
                let joined = self.agent.work.join(&Place {
                    restore,
                    ..place(*seat, vm)
                });
                match joined.and_then(|process| self.keep((group, *seat), process)) {
                    Ok(()) => None,
                    Err(reason) => refused(*seat, reason),
                }
            }
            ToAgent::StartStandby { seat, vm } => {
                let started = self.agent.work.start_standby(&place(*seat, vm));
                let kept = started.and_then(|(process, address)| self.keep((group, *seat), process).map(|()| address));
                match kept {
                    Ok(address) => Some(FromAgent::Started {
                        seat: *seat,
                        address: StandbyAddress(address.to_string()),
                    }),
                    Err(reason) => refused(*seat, reason),
                }
            }
            ToAgent::Kill { seat } => {
                self.kill((group, *seat));
                None
            }
        }
    }

    fn keep(&self, id: Process, process: OwnedFd) -> Result<(), String> {
        let process = Arc::new(process);
        self.agent.keep(id, &process)?;
        self.watch(id, process);
        Ok(())
    }

    /// Whoever watches it tells that it is gone.
    fn kill(&self, id: Process) {
        let process = lock(&self.agent.watched).get(&id).cloned();
        if let Some(process) = process
            && let Err(error) = pidfd_send_signal(&process, Signal::KILL)
        {
            tracing::debug!(%error, seat = %id.1, "a process that was to be ended is gone already");
        }
    }

    /// Tells when `process` is gone, as long as somebody hears it.
    fn watch(&self, id: Process, process: Arc<OwnedFd>) {
        let link = Arc::clone(&self.link);
        let watching = spawn("agent-watch", move || {
            while !link.is_over() {
                if has_ended(&process, LOOK_EVERY) {
                    return link.send(AgentSays::Says(died(id)));
                }
            }
        });
        if let Err(error) = watching {
            tracing::warn!(%error, seat = %id.1, "not watched: that it ends shows only in its heartbeats");
        }
    }
}

/// That a process died counts in every generation: whoever it was does not come back.
fn died((group, seat): Process) -> Envelope<FromAgent> {
    Envelope {
        group,
        generation: Generation(u64::MAX),
        body: FromAgent::Died {
            seat,
            reason: "its process has ended".to_owned(),
        },
    }
}

/// Whether the process behind a pidfd ends within `limit`: it is readable then (pidfd_open(2)).
fn has_ended(process: &OwnedFd, limit: Duration) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    let limit = Timespec::try_from(limit).expect("less than a second fits");
    match poll(&mut polled, Some(&limit)) {
        Ok(ready) => ready > 0,
        Err(error) => {
            let error = io::Error::from(error);
            tracing::debug!(%error, "a process cannot be waited for at the moment");
            false
        }
    }
}
