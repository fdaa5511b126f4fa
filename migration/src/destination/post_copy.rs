//! The rest of memory, which comes while the guest runs.
//!
//! ```text
//!  thread "migration-pull"   wanted ─► Want ══► ══► batch ─► arrive            from State on: to run it may take memory
//!  thread "migration"        batches of stream 0 ─► arrive, until RoundEnd     from Running on
//!                            then: Want{} ══► ══► RoundEnd ─► complete ─► Complete
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::Error;
use crate::link::DestinationLink;
use crate::message::{PULL_ROUND, ToSource, WANTED_MAX};
use crate::streams::{Incoming, OnThread};
use crate::transport::Connection;
use crate::vm::ArrivingMemory;

/// How long it is waited for a page that the guest waits for before it is looked whether all have come.
const WANTED_PATIENCE: Duration = Duration::from_millis(20);

/// Where the rest of memory comes from.
pub(super) struct Rest {
    /// Where it goes.
    pub memory: Arc<dyn ArrivingMemory>,
    /// The streams of the rounds before.
    pub incoming: Incoming,
    /// The stream for what is wanted.
    pub pull: Connection,
    /// Another, of the same images.
    pub pulled: Incoming,
    /// The number of the round that is pushed.
    pub round: u32,
    /// What its threads call first.
    pub on_thread: OnThread,
}

/// Threads that bring it: pages that are wanted at once, all others once there is the link that they come over. Dropped
/// without that, they end.
pub(super) struct Following {
    link: Option<Sender<DestinationLink>>,
    broken: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// What both threads look at.
#[derive(Clone)]
struct Shared {
    memory: Arc<dyn ArrivingMemory>,
    /// Whether all has been pushed.
    pushed: Arc<AtomicBool>,
    /// Whether one of them has failed.
    broken: Arc<AtomicBool>,
}

impl Rest {
    /// Starts the threads: if that is not to be had, the VM does not run here.
    pub(super) fn follow(self) -> Result<Following, Error> {
        let Self {
            memory,
            mut incoming,
            mut pull,
            mut pulled,
            round,
            on_thread,
        } = self;
        let shared = Shared {
            memory,
            pushed: Arc::default(),
            broken: Arc::default(),
        };
        incoming.arrive_in(&shared.memory);
        pulled.arrive_in(&shared.memory);
        pull.watch_nothing();
        pull.watch(Arc::clone(&shared.broken));
        let (give_link, take_link) = channel();
        let (give_outcome, take_outcome) = channel();
        let mut following = Following {
            link: Some(give_link),
            broken: Arc::clone(&shared.broken),
            threads: Vec::new(),
        };
        let (own, first) = (shared.clone(), Arc::clone(&on_thread));
        following.spawn("migration-pull", move || {
            first();
            let outcome = own.ends(own.pull_all(DestinationLink::new(pull), pulled));
            // Nobody listens if the VM never ran.
            let _ = give_outcome.send(outcome);
        })?;
        following.spawn("migration", move || {
            on_thread();
            if let Ok(link) = take_link.recv() {
                shared.bring_rest(link, incoming, round, &take_outcome);
            }
        })?;
        Ok(following)
    }
}

impl Following {
    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
        self.threads.push(thread.map_err(Error::Thread)?);
        Ok(())
    }

    /// The guest runs: the rest comes over `link`.
    pub(super) fn go_on(mut self, link: DestinationLink) {
        self.threads.clear();
        if let Some(give) = self.link.take() {
            give.send(link).expect("the thread waits for it");
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        if self.link.take().is_some() {
            self.broken.store(true, Ordering::Relaxed);
            // They use the memory of a VM that is to be gone.
            for thread in self.threads.drain(..) {
                if thread.join().is_err() {
                    tracing::error!("a thread that waited for memory has panicked");
                }
            }
        }
    }
}

impl Shared {
    /// Asks for what the guest waits for, until all has been pushed.
    fn pull_all(&self, mut link: DestinationLink, mut pulled: Incoming) -> Result<(), Error> {
        loop {
            let all_pushed = self.pushed.load(Ordering::Acquire);
            let mut pages = if all_pushed {
                Vec::new()
            } else {
                self.memory.wanted(WANTED_PATIENCE)
            };
            if self.broken.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            if pages.is_empty() && !all_pushed {
                continue;
            }
            loop {
                let later = pages.split_off(pages.len().min(WANTED_MAX));
                link.send(&ToSource::Want { pages })?;
                let answered = pulled.receive_batch(link.connection(), PULL_ROUND)?;
                if !answered {
                    return Ok(());
                }
                if later.is_empty() {
                    break;
                }
                pages = later;
            }
        }
    }

    /// Puts in place what is pushed, and has the guest be lost if that ends before all of it came.
    fn bring_rest(
        &self,
        mut link: DestinationLink,
        incoming: Incoming,
        round: u32,
        pulled: &Receiver<Result<(), Error>>,
    ) {
        link.connection().watch(Arc::clone(&self.broken));
        let pushed = self.ends(take_pushed(&mut link, incoming, round));
        self.pushed.store(true, Ordering::Release);
        let pulled = pulled.recv().unwrap_or(Err(Error::Cancelled));
        let error = match (pushed, pulled) {
            (Ok(()), Ok(())) => {
                self.memory.complete();
                if let Err(error) = link.send(&ToSource::Complete) {
                    tracing::warn!(%error, "the source may not know that all of the VM is here");
                }
                return;
            }
            (Err(Error::Cancelled) | Ok(()), Err(error)) | (Err(error), _) => error,
        };
        self.memory.lost(&error.to_string());
    }

    /// What came of one thread; if it failed, the other need not go on.
    fn ends(&self, outcome: Result<(), Error>) -> Result<(), Error> {
        if outcome.is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
        outcome
    }
}

fn take_pushed(link: &mut DestinationLink, mut incoming: Incoming, round: u32) -> Result<(), Error> {
    while incoming.receive_batch(link.connection(), round)? {}
    Ok(())
}
