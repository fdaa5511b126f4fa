//! How far a migration has come, for everyone who wants to know, and whether it is still wanted.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    progress: Mutex<Progress>,
    cancelled: Arc<AtomicBool>,
    observer: Option<Observer>,
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
        self.lock().clone()
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
        change(&mut self.lock());
    }

    /// A new phase or round begins.
    pub(crate) fn step(&self, change: impl FnOnce(&mut Progress)) {
        let progress = {
            let mut progress = self.lock();
            change(&mut progress);
            progress.clone()
        };
        if let Some(observer) = &self.observer {
            observer(&progress);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
