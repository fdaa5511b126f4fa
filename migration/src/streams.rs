//! Page streams: the same pages always go over the same stream, and each stream has a thread of its own.
//!
//! ```text
//!  words of a set of pages    0 1 2 3 4 5 …                       (a word: 64 pages)
//!                             │ │ │ └─┼─┼─► stream 0, the link    thread "migration"      of three streams
//!                             │ └─┼───┴─┼─► stream 1              thread "migration-1"
//!                             │   └─────┴─► stream 2              thread "migration-2"
//!                             └► stream 0
//! ```
//! A stream whose pages are all sent says so: the round is over when all have. With one stream no thread is needed.

mod receiving;
mod sending;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use self::receiving::{HeldBatch, Incoming};
pub use self::sending::{Outgoing, PageSource, Pages, Sent};

use crate::error::Error;
use crate::transport::Connection;

/// What every thread of the crate calls first.
pub type OnThread = Arc<dyn Fn() + Send + Sync>;

/// The connections of the streams from 1 on, which end together.
struct Others {
    connections: Vec<Connection>,
    broken: Arc<AtomicBool>,
}

impl Others {
    fn new() -> Self {
        Self {
            connections: Vec::new(),
            broken: Arc::new(AtomicBool::new(false)),
        }
    }

    fn push(&mut self, mut connection: Connection) {
        connection.watch(Arc::clone(&self.broken));
        self.connections.push(connection);
    }
}

/// What came of one stream; if it failed, the others need not wait any longer.
fn end_together<T>(outcome: Result<T, Error>, broken: &AtomicBool) -> Result<T, Error> {
    if outcome.is_err() {
        broken.store(true, Ordering::Relaxed);
    }
    outcome
}

/// Of what came of all streams, the error that came first: that others were cancelled follows from it.
fn all<T>(outcomes: Vec<Result<T, Error>>) -> Result<Vec<T>, Error> {
    let mut values = Vec::with_capacity(outcomes.len());
    let mut failure = None;
    for outcome in outcomes {
        match outcome {
            Ok(value) => values.push(value),
            Err(error @ Error::Cancelled) => failure = failure.or(Some(error)),
            Err(error) if matches!(failure, None | Some(Error::Cancelled)) => failure = Some(error),
            Err(_) => (),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(values),
    }
}
