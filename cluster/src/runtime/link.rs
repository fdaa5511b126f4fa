//! Control links: messages both ways between the coordinator and whoever it works with.
//!
//! ```text
//!  caller                                              acceptor
//!  first connection ── There{version, id, hello} ────►
//!  second           ── Back{id} ─────────────────────► puts them together, whichever comes first
//!                   ◄───────── Open │ Abort{reason} ──
//!  first            ══ letters to the acceptor ══════►
//!  second           ◄═ letters to the caller ═════════
//! ```
//! A link is two connections, one for each way: a connection over TLS is used by one thread at a time, and whoever sends
//! must not wait for what may come. Each way has a thread. What is to be sent waits in a queue of [`QUEUE_MAX`]; a peer
//! that does not even take that much is given up, as one is from which nothing comes: a link is never slow, it is over.

use std::collections::HashMap;
use std::io::Write;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cutover_migration::message::Message;
use cutover_migration::transport::{self, Connection, Endpoint, Listener, SILENCE_MAX, Security, link_error};
use cutover_migration::{Error as LinkError, wire};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The version of what is said over control links: both ends have the same.
pub const VERSION: u16 = 1;
/// Most messages that wait to be sent over a link.
pub const QUEUE_MAX: usize = 1024;
/// Most links of which only the first connection has come.
pub const HALVES_MAX: usize = 256;
/// Connections that are greeted at the same time: a stranger who says nothing keeps one of them for a while.
const GREETERS: usize = 4;
/// How long a connection may take to say what it is, and a second one to follow the first.
const OPENING_MAX: Duration = Duration::from_secs(5);
/// After how long without anything to say a side tells that it is there.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// What can be sent over a control link.
pub trait Content: Serialize + DeserializeOwned + Send + 'static {}

impl<T: Serialize + DeserializeOwned + Send + 'static> Content for T {}

/// What the first message of a connection says: which half of a link it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Opening<H> {
    /// The one the caller will send on.
    There {
        version: u16,
        id: Uuid,
        hello: H,
    },
    /// The one the acceptor will send on.
    Back {
        id: Uuid,
    },
    Abort {
        reason: String,
    },
}

/// The answer to that.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Answer {
    Open,
    Abort { reason: String },
}

/// What travels on a link.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Letter<M> {
    Says(M),
    /// Nothing for a while, but the sender is there.
    Alive,
    Abort {
        reason: String,
    },
}

macro_rules! message {
    ($type:ident $(<$of:ident>)?, $name:literal) => {
        impl$(<$of: Content>)? Message for $type$(<$of>)? {
            fn name(&self) -> &'static str {
                $name
            }

            fn abort_reason(&self) -> Option<&str> {
                match self {
                    Self::Abort { reason } => Some(reason),
                    _ => None,
                }
            }

            fn abort(reason: String) -> Self {
                Self::Abort { reason }
            }
        }
    };
}

message!(Opening<H>, "the opening of a control link");
message!(Answer, "the answer to the opening of a control link");
message!(Letter<M>, "a message of a control link");

/// What a link brings.
#[derive(Debug)]
pub enum Incoming<M> {
    /// A message.
    Says(M),
    /// The link is over; nothing comes any more.
    Over(LinkError),
}

/// One end of an open link. Dropping it ends the link.
#[derive(Debug)]
pub struct ControlLink<Out> {
    outbox: SyncSender<Out>,
    is_over: Arc<AtomicBool>,
}

impl<Out: Content> ControlLink<Out> {
    /// Sends `message`, without waiting. One that cannot be sent is lost with the link.
    pub fn send(&self, message: Out) {
        if self.outbox.try_send(message).is_err() {
            self.is_over.store(true, Ordering::Relaxed);
        }
    }

    /// Whether nothing that is sent arrives any more.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Makes a link of its two connections.
    fn start<In: Content>(mut sends: Connection, mut hears: Connection) -> Result<(Self, Ears<In>), LinkError> {
        let is_over = Arc::<AtomicBool>::default();
        let (outbox, queue) = sync_channel(QUEUE_MAX);
        for connection in [&mut sends, &mut hears] {
            connection.watch(Arc::clone(&is_over));
        }
        let over = Arc::clone(&is_over);
        spawn("control-out", move || {
            if let Err(error) = send_all(&mut sends, &queue, &over) {
                tracing::debug!(%error, "a control link takes nothing any more");
            }
            over.store(true, Ordering::Relaxed);
        })?;
        let ears = Ears {
            hears,
            is_over: Arc::clone(&is_over),
            messages: PhantomData,
        };
        Ok((Self { outbox, is_over }, ears))
    }
}

impl<Out> Drop for ControlLink<Out> {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// What a link brings, once somebody listens.
#[derive(Debug)]
pub struct Ears<In> {
    hears: Connection,
    is_over: Arc<AtomicBool>,
    messages: PhantomData<fn() -> In>,
}

impl<In: Content> Ears<In> {
    /// Has what comes given to `take`, on a thread of the link.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn listen(self, take: impl FnMut(Incoming<In>) + Send + 'static) -> Result<(), LinkError> {
        let Self { mut hears, is_over, .. } = self;
        spawn("control-in", move || {
            hear_all(&mut hears, &is_over, take);
        })?;
        Ok(())
    }
}

/// Opens a link to `to`; `hello` says who calls.
///
/// # Errors
/// Nobody is there, it is not whom it should be, or it refuses.
pub fn open<H: Content, Out: Content, In: Content>(
    to: &Endpoint,
    security: &Security,
    hello: H,
) -> Result<(ControlLink<Out>, Ears<In>), LinkError> {
    let id = Uuid::new_v4();
    let mut sends = transport::connect(to, security)?;
    let version = VERSION;
    write(&mut sends, &Opening::There { version, id, hello })?;
    let mut hears = transport::connect(to, security)?;
    write(&mut hears, &Opening::<H>::Back { id })?;
    match read(&mut hears, "the answer to a control link", OPENING_MAX)? {
        Answer::Open => ControlLink::start(sends, hears),
        Answer::Abort { reason } => Err(LinkError::Aborted(reason)),
    }
}

/// A link that somebody opened, with nothing said over it yet.
pub struct Called<H> {
    /// Who called.
    pub hello: H,
    hears: Connection,
    sends: Connection,
}

impl<H> Called<H> {
    /// Takes part in it.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn answer<Out: Content, In: Content>(self) -> Result<(ControlLink<Out>, Ears<In>), LinkError> {
        ControlLink::start(self.sends, self.hears)
    }
}

/// Whoever waits for links. Dropping it ends that, not the links.
pub struct Reception {
    is_over: Arc<AtomicBool>,
    greeters: Vec<JoinHandle<()>>,
}

impl Reception {
    /// Gives each link that is opened at `listener` to `called`, if `check` has nothing against the one who calls.
    ///
    /// # Errors
    /// There are no threads to be had.
    pub fn open<H: Content>(
        listener: Listener,
        check: impl Fn(&H) -> Result<(), String> + Send + Sync + 'static,
        called: impl Fn(Called<H>) + Send + Sync + 'static,
    ) -> Result<Self, LinkError> {
        let is_over = Arc::<AtomicBool>::default();
        let shared = Arc::new(Greeting {
            listener,
            check,
            called,
            waiting: Mutex::default(),
        });
        let greeters = (0..GREETERS).map(|_| {
            let (shared, is_over) = (Arc::clone(&shared), Arc::clone(&is_over));
            spawn("control-accept", move || shared.greet_all(&is_over))
        });
        let greeters = greeters.collect::<Result<_, _>>()?;
        Ok(Self { is_over, greeters })
    }
}

impl Drop for Reception {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for greeter in self.greeters.drain(..) {
            if greeter.join().is_err() {
                tracing::error!("a thread that accepts control links has panicked");
            }
        }
    }
}

/// One of the two connections of a link.
enum Half<H> {
    There { hello: (u16, H), connection: Connection },
    Back(Connection),
}

/// A half, and the one that came before.
type Pair<H> = (Half<H>, Half<H>);

/// Until when the other has to come.
type Waiting<H> = HashMap<Uuid, (Instant, Half<H>)>;

struct Greeting<H, C, F> {
    listener: Listener,
    check: C,
    called: F,
    waiting: Mutex<Waiting<H>>,
}

impl<H: Content, C: Fn(&H) -> Result<(), String>, F: Fn(Called<H>)> Greeting<H, C, F> {
    fn greet_all(&self, is_over: &AtomicBool) {
        while !is_over.load(Ordering::Relaxed) {
            match self.listener.accept(None, is_over) {
                Ok(Some(connection)) => {
                    if let Err(error) = self.greet(connection) {
                        tracing::debug!(%error, "a caller is turned away");
                    }
                }
                Ok(None) => break,
                // Another thread was faster, or the caller is none of ours.
                Err(error) => tracing::debug!(%error, "a connection came to nothing"),
            }
        }
    }

    fn greet(&self, mut connection: Connection) -> Result<(), LinkError> {
        let (id, half) = match read(&mut connection, "the opening of a control link", OPENING_MAX)? {
            Opening::There { version, id, hello } => {
                let hello = (version, hello);
                (id, Half::There { hello, connection })
            }
            Opening::Back { id } => (id, Half::Back(connection)),
            Opening::Abort { reason } => return Err(LinkError::Aborted(reason)),
        };
        match self.partner(id, half)? {
            Some(
                (
                    Half::There {
                        hello,
                        connection: there,
                    },
                    Half::Back(back),
                )
                | (
                    Half::Back(back),
                    Half::There {
                        hello,
                        connection: there,
                    },
                ),
            ) => self.complete(hello, there, back),
            Some(_) => Err(LinkError::Aborted("both connections are the same half".to_owned())),
            None => Ok(()),
        }
    }

    /// `half` with the other of its link, if that has come; otherwise it waits for that.
    fn partner(&self, id: Uuid, half: Half<H>) -> Result<Option<Pair<H>>, LinkError> {
        let mut waiting = lock(&self.waiting);
        if let Some((_, other)) = waiting.remove(&id) {
            return Ok(Some((half, other)));
        }
        let now = Instant::now();
        waiting.retain(|_, (until, _)| *until > now);
        if waiting.len() >= HALVES_MAX {
            return Err(LinkError::Aborted(format!("{HALVES_MAX} links are half open already")));
        }
        waiting.insert(id, (now + OPENING_MAX, half));
        Ok(None)
    }

    fn complete(&self, (version, hello): (u16, H), hears: Connection, mut sends: Connection) -> Result<(), LinkError> {
        if let Err(reason) = self.admit(version, &hello) {
            return write(&mut sends, &Answer::Abort { reason });
        }
        write(&mut sends, &Answer::Open)?;
        (self.called)(Called { hello, hears, sends });
        Ok(())
    }

    fn admit(&self, version: u16, hello: &H) -> Result<(), String> {
        if version == VERSION {
            (self.check)(hello)
        } else {
            Err(format!(
                "it speaks version {version} of the control protocol, this host {VERSION}"
            ))
        }
    }
}

fn send_all<M: Content>(to: &mut Connection, queue: &Receiver<M>, is_over: &AtomicBool) -> Result<(), LinkError> {
    while !is_over.load(Ordering::Relaxed) {
        match queue.recv_timeout(ALIVE_EVERY) {
            Ok(message) => write(to, &Letter::Says(message))?,
            Err(RecvTimeoutError::Timeout) => write(to, &Letter::<M>::Alive)?,
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(())
}

fn hear_all<M: Content>(from: &mut Connection, is_over: &AtomicBool, mut take: impl FnMut(Incoming<M>)) {
    let error = loop {
        match read(from, "a message, or that the peer is there", SILENCE_MAX) {
            Ok(Letter::Says(message)) => take(Incoming::Says(message)),
            Ok(Letter::Alive) => {}
            Ok(Letter::Abort { reason }) => break LinkError::Aborted(reason),
            Err(error) => break error,
        }
    };
    is_over.store(true, Ordering::Relaxed);
    take(Incoming::Over(error));
}

fn write(to: &mut Connection, message: &impl Message) -> Result<(), LinkError> {
    let bytes = wire::encode(message)?;
    to.within(SILENCE_MAX);
    to.write_all(&bytes)
        .and_then(|()| to.flush())
        .map_err(link_error("send a message", "that it is taken"))
}

fn read<M: Message>(from: &mut Connection, expected: &'static str, limit: Duration) -> Result<M, LinkError> {
    from.within(limit);
    wire::decode(from, wire::MESSAGE_BYTES_MAX, |error| {
        link_error("receive a message", expected)(error)
    })
}

/// Starts a thread.
pub(super) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, LinkError> {
    let started = thread::Builder::new().name(name.to_owned()).spawn(run);
    started.map_err(|source| LinkError::Link {
        action: "start a thread for it",
        source,
    })
}

/// Whoever panicked with the lock left a whole value behind: every change is one call.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
