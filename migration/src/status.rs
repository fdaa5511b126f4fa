//! How far a migration has come, for everyone who wants to know, and whether it is still wanted.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a migration is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Finding out whether the two sides understand each other.
    #[default]
    Connecting,
    /// The destination builds the VM, or refuses.
    Reserving,
    /// Pages are sent while the guest runs.
    PreCopy,
    /// The guest stands still: the last pages and the state are sent.
    Stopping,
    /// The destination was told to run it.
    HandedOver,
    /// It runs there, and the rest of its memory follows.
    PostCopy,
    /// Over.
    Done,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Reserving => "reserving",
            Self::PreCopy => "sending memory",
            Self::Stopping => "stopped",
            Self::HandedOver => "handed over",
            Self::PostCopy => "sending the rest of memory",
            Self::Done => "done",
        })
    }
}

/// How far it has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Which round of sending pages it is, from 1; 0 before.
    pub round: u32,
    /// Pages sent in all rounds, again and again those that changed.
    pub pages_sent: u64,
    /// Pages that this round has yet to send.
    pub pages_left: u64,
    /// Bytes sent, all that is on the wire.
    pub bytes_sent: u64,
    /// Bytes sent in each second of this round.
    pub bytes_per_second: u64,
    /// Pages that the guest writes in each second, as seen in the last round.
    pub dirty_pages_per_second: u64,
    /// How long the guest would stand still if it were stopped now.
    pub expected_downtime: Option<Duration>,
    /// How much of the time the vCPUs are made to stand still, in percent.
    pub throttle: u8,
}

/// What is called when the phase or the round changes.
pub type Observer = Box<dyn Fn(&Progress) + Send + Sync>;

/// How far one migration has come, and whether it is still wanted.
#[derive(Default)]
pub struct Status {
    state: Mutex<State>,
    cancelled: Arc<AtomicBool>,
    observer: Option<Observer>,
}

/// What a status knows.
#[derive(Default)]
struct State {
    progress: Progress,
    /// When the present phase or round began, and how much had been sent by then.
    began: Option<(Instant, u64)>,
}

impl State {
    /// How far it has come, at `now`: a round that has sent something tells its rate before it is over.
    fn progress_at(&self, now: Instant) -> Progress {
        let mut progress = self.progress.clone();
        if let Some((began, sent_before)) = self.began
            && progress.bytes_sent > sent_before
        {
            let sent = u128::from(progress.bytes_sent - sent_before);
            let rate = sent * 1_000_000_000 / now.saturating_duration_since(began).as_nanos().max(1);
            progress.bytes_per_second = u64::try_from(rate).unwrap_or(u64::MAX);
        }
        progress
    }
}

impl Status {
    /// A status that `observer` is told of at each new phase and round, on a thread of the migration.
    pub fn observed(observer: Observer) -> Self {
        Self {
            observer: Some(observer),
            ..Self::default()
        }
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        self.lock().progress_at(Instant::now())
    }

    /// It is not wanted any more. Ends it at once unless the VM is handed over already.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it is not wanted any more.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// What is set when it is not wanted any more.
    pub(crate) fn cancel_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancelled)
    }

    /// Something changed that is no new phase or round.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock().progress);
    }

    /// A new phase or round begins.
    pub(crate) fn step(&self, change: impl FnOnce(&mut Progress)) {
        let progress = {
            let mut state = self.lock();
            change(&mut state.progress);
            state.began = Some((Instant::now(), state.progress.bytes_sent));
            state.progress.clone()
        };
        if let Some(observer) = &self.observer {
            observer(&progress);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_tells_its_rate_before_it_is_over_and_that_of_the_last_until_it_has_sent_something() {
        let status = Status::default();
        status.update(|progress| (progress.bytes_sent, progress.bytes_per_second) = (1000, 7));
        status.step(|progress| progress.round = 2);
        let mut state = status.lock();
        let (began, sent_before) = state.began.expect("a round has begun");
        assert_eq!(sent_before, 1000);
        assert_eq!(state.progress_at(began + Duration::from_secs(1)).bytes_per_second, 7);
        state.progress.bytes_sent = 5000;
        assert_eq!(state.progress_at(began + Duration::from_secs(2)).bytes_per_second, 2000);
    }
}
