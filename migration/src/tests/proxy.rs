//! What stands between the two hosts: forwards bytes, and at one of them something happens.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::made_up::{Host, Ran, Source};
use crate::destination::{Waiting, receive};
use crate::error::Error;
use crate::options::Options;
use crate::report::Report;
use crate::source::{Request, migrate};
use crate::status::{Phase, Status};
use crate::transport::{Endpoint, Listener, Security};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToDestination,
    ToSource,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The connection ends both ways, that byte not delivered.
    Cut,
    /// These bits of the byte change.
    Flip(u8),
    /// Nothing goes on for so long.
    Stall(Duration),
}

/// Where it happens.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// On which connection, in the order of connecting.
    pub connection: usize,
    pub way: Way,
    /// At which byte.
    pub at: usize,
    pub action: Action,
}

/// What is in the way.
#[derive(Clone, Default)]
pub struct Trouble {
    pub fault: Option<Fault>,
    /// Ends each connection at the next byte when it is set.
    pub cut: Arc<AtomicBool>,
}

/// What went over a connection.
#[derive(Clone, Debug, Default)]
pub struct Transcript {
    pub to_destination: Vec<u8>,
    pub to_source: Vec<u8>,
}

/// All that came of a migration.
pub struct Ended {
    pub at_source: Result<Report, Error>,
    pub at_destination: Result<Ran, Error>,
    pub transcripts: Vec<Transcript>,
}

/// Migrates `source` to `host` over a link on which `fault` happens.
pub fn migrate_over(source: &mut Source, host: Host, options: &Options, fault: Option<Fault>) -> Ended {
    let link = Trouble {
        fault,
        ..Trouble::default()
    };
    migrate_watched(source, host, options, link, [&Status::default(), &Status::default()])
}

/// The same, with the source's and the destination's status.
pub fn migrate_watched(
    source: &mut Source,
    mut host: Host,
    options: &Options,
    link: Trouble,
    [here, there]: [&Status; 2],
) -> Ended {
    let directory = tempfile::tempdir().unwrap();
    let [near, far] = ["near", "far"].map(|name| directory.path().join(name));
    let security = Security::default();
    let listener = Listener::bind(&Endpoint::Unix(far.clone()), &security).unwrap();
    let proxy = Proxy::start(&near, &far, link);
    let (at_source, at_destination) = thread::scope(|scope| {
        let waiting = Waiting {
            listener: &listener,
            status: there,
            on_thread: Arc::new(|| ()),
        };
        let destination = scope.spawn(move || receive(&waiting, &mut host));
        let request = Request {
            to: &Endpoint::Unix(near.clone()),
            security: &security,
            options,
            status: here,
            on_thread: Arc::new(|| ()),
        };
        let at_source = migrate(source, &request);
        // It may not have heard of the source, and wait for the next.
        if there.progress().phase == Phase::Connecting {
            there.cancel();
        }
        (at_source, destination.join().unwrap())
    });
    drop(listener);
    Ended {
        at_source,
        at_destination,
        transcripts: proxy.end(),
    }
}

/// Stands between two ends.
pub struct Proxy {
    path: std::path::PathBuf,
    accepting: JoinHandle<Vec<Transcript>>,
}

impl Proxy {
    /// Listens at `near`, and forwards to `far`.
    pub fn start(near: &Path, far: &Path, link: Trouble) -> Self {
        let listener = UnixListener::bind(near).unwrap();
        let far = far.to_owned();
        let accepting = thread::spawn(move || {
            let mut pumps = Vec::new();
            for (connection, near) in listener.incoming().enumerate() {
                let near = near.unwrap();
                let Ok(far) = UnixStream::connect(&far) else { break };
                let of = |way| Trouble {
                    fault: link
                        .fault
                        .filter(|fault| fault.connection == connection && fault.way == way),
                    cut: Arc::clone(&link.cut),
                };
                pumps.push([
                    pump(&near, &far, of(Way::ToDestination)),
                    pump(&far, &near, of(Way::ToSource)),
                ]);
            }
            let transcripts = pumps.into_iter().map(|pumps| {
                let [to_destination, to_source] = pumps.map(|pump| pump.join().unwrap());
                Transcript {
                    to_destination,
                    to_source,
                }
            });
            transcripts.collect()
        });
        Self {
            path: near.to_owned(),
            accepting,
        }
    }

    /// What went over it, now that nobody listens at the far end any more.
    pub fn end(self) -> Vec<Transcript> {
        // The listener is gone at the far end, so that this connection ends the accepting.
        drop(UnixStream::connect(&self.path).unwrap());
        self.accepting.join().unwrap()
    }
}

fn pump(from: &UnixStream, to: &UnixStream, link: Trouble) -> JoinHandle<Vec<u8>> {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    thread::spawn(move || {
        let mut all = Vec::new();
        let mut buffer = [0; 32 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            let bytes = &mut buffer[..read];
            if link.cut.load(Ordering::SeqCst) {
                break;
            }
            let hit = link
                .fault
                .and_then(|fault| Some((fault.at.checked_sub(all.len())?, fault.action)));
            match hit.filter(|&(at, _)| at < read) {
                Some((at, Action::Flip(bits))) => bytes[at] ^= bits,
                Some((_, Action::Stall(time))) => thread::sleep(time),
                Some((at, Action::Cut)) => {
                    to.write_all(&bytes[..at]).ok();
                    all.extend_from_slice(&bytes[..at]);
                    break;
                }
                None => (),
            }
            all.extend_from_slice(bytes);
            if to.write_all(bytes).is_err() {
                break;
            }
        }
        // Both ways, as nothing more comes of this connection.
        let is_cut = link.cut.load(Ordering::SeqCst) || link.fault.is_some_and(|fault| fault.action == Action::Cut);
        to.shutdown(if is_cut { Shutdown::Both } else { Shutdown::Write }).ok();
        if is_cut {
            from.shutdown(Shutdown::Both).ok();
        }
        all
    })
}

/// A status that calls `act` when `phase` begins.
pub fn observed_in(phase: Phase, act: impl Fn() + Send + Sync + 'static) -> Status {
    Status::observed(Box::new(move |progress| {
        if progress.phase == phase {
            act();
        }
    }))
}
