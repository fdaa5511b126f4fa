//! What happened to a VM, kept for those who watch it: an append-only log of which the last [`EVENTS_MAX`] events are
//! there to be read, by anyone at any time.
//!
//! A reader remembers the number of the last event it saw and asks for those [since](EventLog::since); one that stayed
//! away for too long is told of the gap. Readers never slow the writer down, who may be a vCPU.
//!
//! ```text
//!  state driver, devices ── push ──► [ 17 | 18 | … | 1040 ] ──► wakes subscribers, who ask since(n)
//! ```

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::lifecycle::{Exit, GuestEnd, State};
use crate::migration::{MigrationProgress, MigrationReport};
use crate::snapshot::SnapshotReport;

/// Most events that are kept.
pub const EVENTS_MAX: usize = 1024;
/// Most subscribers at a time.
pub const SUBSCRIBERS_MAX: usize = 64;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Its number: the first of a process is 1, and each is one more than the one before.
    pub sequence: u64,
    /// When, by the host's wall clock: nanoseconds since the beginning of 1970 (UTC).
    pub unix_time_ns: u64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EventKind {
    /// The VM is in another state.
    VmState {
        /// The new one.
        state: State,
    },
    /// The VM is over.
    VmEnded {
        /// How it came to its end.
        exit: Exit,
    },
    /// The monitor could not go on, and the VM is over.
    VmFailed {
        /// Why.
        reason: String,
    },
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest asked for a reset.
    GuestReset,
    /// The guest's kernel panicked, or a vCPU met a triple fault.
    GuestPanic,
    /// The person at the guest's console asked for the end of the VM.
    ConsoleQuit,
    /// A device stopped serving its guest; the VM goes on without it.
    DeviceFailed {
        /// Which, such as `virtio-blk0`.
        device: String,
        /// Why.
        reason: String,
    },
    /// What was to notice the guest's writes is not exact here: KVM's bitmap does it.
    DirtyLogFallback {
        /// Why.
        reason: String,
    },
    /// A power operation was accepted and begins.
    OperationRequested {
        /// Which, such as `reboot`.
        operation: &'static str,
    },
    /// The guest did not end in the time it was given, and is ended by force.
    OperationForced {
        /// Which, such as `shutting_down`: the state that took too long.
        state: State,
    },
    /// A disk has another file or another limit.
    DriveUpdated {
        /// Id of the disk.
        drive: String,
    },
    /// A network interface has other limits.
    NetworkInterfaceUpdated {
        /// Id of the interface.
        interface: String,
    },
    /// The balloon is asked for another amount of memory, or for statistics at another interval.
    BalloonUpdated,
    /// A snapshot is being made.
    SnapshotStarted {
        /// Where it goes: its directory, or the file with its state.
        path: PathBuf,
    },
    /// A snapshot is permanent.
    SnapshotFinished {
        /// What there is to tell of it.
        report: SnapshotReport,
    },
    /// There is nothing of a snapshot that was being made.
    SnapshotFailed {
        /// Where it should have gone.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// All memory and disks of the restored VM are there; its snapshot is needed no longer.
    RestoreFinished,
    /// The VM is being migrated.
    MigrationStarted {
        /// Where to.
        to: String,
    },
    /// A round of a migration begins, or its next phase.
    MigrationRound {
        /// How far it has come.
        progress: MigrationProgress,
    },
    /// The VM goes on under another monitor.
    MigrationFinished {
        /// Where.
        to: String,
        /// What there is to tell of it.
        report: MigrationReport,
    },
    /// A migration came to nothing; or, if the VM is handed over, nobody knows what came of it.
    MigrationFailed {
        /// Where it should have gone.
        to: String,
        /// Why it did not.
        reason: String,
    },
    /// The VM came from another monitor, and goes on under this one.
    Migrated,
    /// From here on the VM can go back to a cut, and be that elsewhere.
    Protected {
        /// Where its standby is.
        to: String,
    },
    /// There is no standby of the VM any more: what it sends leaves at once.
    Unprotected,
    /// A cut of the VM could not be taken; the next one covers it.
    CheckpointFailed {
        /// Its number.
        epoch: u64,
        /// Why.
        reason: String,
    },
    /// The VM is again as it was at a cut.
    RolledBack {
        /// Which.
        cut: u64,
    },
    /// The VM is here what it was elsewhere at a cut.
    Promoted {
        /// Which.
        cut: u64,
    },
}

impl From<GuestEnd> for EventKind {
    fn from(end: GuestEnd) -> Self {
        match end {
            GuestEnd::Shutdown => Self::GuestShutdown,
            GuestEnd::Reset => Self::GuestReset,
            GuestEnd::Panic => Self::GuestPanic,
            GuestEnd::ConsoleQuit => Self::ConsoleQuit,
        }
    }
}

/// The events after a certain one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// In order.
    pub events: Vec<Event>,
    /// Whether there were more in between, which are no longer kept; also if the certain event never was one of this
    /// log, because the asker saw it in another process.
    pub gap: bool,
}

/// The log; clones are the same log.
#[derive(Clone, Default)]
pub struct EventLog(Arc<Shared>);

#[derive(Default)]
struct Shared {
    ring: Mutex<Ring>,
    subscribers: Mutex<Subscribers>,
}

#[derive(Default)]
struct Ring {
    /// Number of the newest event, 0 before the first.
    last: u64,
    events: VecDeque<Event>,
}

type Wake = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Subscribers {
    next_id: u64,
    wakes: Vec<(u64, Wake)>,
}

/// There are [`SUBSCRIBERS_MAX`] already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{SUBSCRIBERS_MAX} watch this VM's events already, which is the most")]
pub struct TooManySubscribers;

/// Lasts until dropped.
pub struct Subscription {
    log: EventLog,
    id: u64,
}

impl EventLog {
    /// Adds an event that happens now, and wakes the subscribers.
    pub fn push(&self, kind: EventKind) {
        {
            let mut ring = lock(&self.0.ring);
            if ring.events.len() == EVENTS_MAX {
                ring.events.pop_front();
            }
            ring.last += 1;
            let event = Event {
                sequence: ring.last,
                unix_time_ns: unix_time_ns(),
                kind,
            };
            ring.events.push_back(event);
        }
        // Called without a lock, so that a subscriber may do anything with this log.
        let wakes: Vec<Wake> = lock(&self.0.subscribers)
            .wakes
            .iter()
            .map(|(_, wake)| wake.clone())
            .collect();
        for wake in wakes {
            wake();
        }
    }

    /// The events after number `sequence`; 0 gives all that are kept.
    pub fn since(&self, sequence: u64) -> Tail {
        let ring = lock(&self.0.ring);
        let first_kept = ring.last + 1 - ring.events.len() as u64;
        let from_elsewhere = sequence > ring.last;
        let wanted = if from_elsewhere { first_kept } else { sequence + 1 };
        Tail {
            events: ring
                .events
                .iter()
                .filter(|event| event.sequence >= wanted)
                .cloned()
                .collect(),
            gap: from_elsewhere || wanted < first_kept,
        }
    }

    /// Number of the newest event, 0 before the first.
    pub fn last(&self) -> u64 {
        lock(&self.0.ring).last
    }

    /// Has `wake` called after every event from now on, on whichever thread it happens: it must not wait.
    ///
    /// # Errors
    /// There are too many.
    pub fn subscribe(&self, wake: impl Fn() + Send + Sync + 'static) -> Result<Subscription, TooManySubscribers> {
        let mut subscribers = lock(&self.0.subscribers);
        if subscribers.wakes.len() == SUBSCRIBERS_MAX {
            return Err(TooManySubscribers);
        }
        let id = subscribers.next_id;
        subscribers.next_id += 1;
        subscribers.wakes.push((id, Arc::new(wake)));
        Ok(Subscription { log: self.clone(), id })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.log.0.subscribers).wakes.retain(|(id, _)| *id != self.id);
    }
}

fn unix_time_ns() -> u64 {
    // A clock set to before 1970 gives 0; what u64 holds of nanoseconds lasts until 2554.
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

/// Whoever panicked with the lock left a whole log behind: each change is complete before anything can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    fn sequences(tail: &Tail) -> Vec<u64> {
        tail.events.iter().map(|event| event.sequence).collect()
    }

    fn log_of(events: usize) -> EventLog {
        let log = EventLog::default();
        for _ in 0..events {
            log.push(EventKind::GuestReset);
        }
        log
    }

    #[test]
    fn events_are_numbered_from_one_and_a_reader_gets_those_it_has_not_seen() {
        let log = log_of(0);
        assert_eq!(
            log.since(0),
            Tail {
                events: Vec::new(),
                gap: false
            }
        );
        log.push(EventKind::VmState { state: State::Running });
        log.push(EventKind::GuestPanic);
        assert_eq!(sequences(&log.since(0)), [1, 2]);
        let tail = log.since(1);
        assert_eq!(tail.events[0].kind, EventKind::GuestPanic);
        assert_eq!((sequences(&tail), tail.gap), (vec![2], false));
        assert_eq!(
            log.since(2),
            Tail {
                events: Vec::new(),
                gap: false
            }
        );
    }

    #[test]
    fn the_oldest_events_give_way_and_a_reader_that_missed_them_is_told() {
        let log = log_of(EVENTS_MAX + 10);
        let newest = log.last();
        let (all, missed_one, missed_none) = (log.since(0), log.since(9), log.since(10));
        assert_eq!(all.events.len(), EVENTS_MAX);
        assert_eq!(sequences(&all).first(), Some(&11));
        assert_eq!(sequences(&all).last(), Some(&newest));
        assert!(all.gap);
        assert!(missed_one.gap);
        assert!(!missed_none.gap);
        assert_eq!(missed_none.events, all.events);
    }

    #[test]
    fn a_reader_that_comes_from_another_process_gets_everything_and_is_told() {
        let tail = log_of(3).since(7);
        assert_eq!(sequences(&tail), [1, 2, 3]);
        assert!(tail.gap);
        assert!(log_of(0).since(u64::MAX).gap);
    }

    #[test]
    fn subscribers_are_woken_after_the_event_can_be_read_and_until_they_leave() {
        let log = log_of(0);
        let (saw, seen) = channel();
        let subscription = {
            let log = log.clone();
            let reader = log.clone();
            log.subscribe(move || saw.send(reader.last()).expect("the test listens"))
                .expect("the first subscriber")
        };
        log.push(EventKind::GuestReset);
        log.push(EventKind::GuestReset);
        drop(subscription);
        log.push(EventKind::GuestReset);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn one_subscriber_too_many_is_refused_until_another_leaves() {
        let log = log_of(0);
        let mut subscriptions: Vec<_> = (0..SUBSCRIBERS_MAX)
            .map(|_| log.subscribe(|| {}).expect("within the limit"))
            .collect();
        assert_eq!(log.subscribe(|| {}).err(), Some(TooManySubscribers));
        subscriptions.pop();
        assert!(log.subscribe(|| {}).is_ok());
    }

    #[test]
    fn readers_beside_writers_miss_nothing_and_see_nothing_twice() {
        const WRITERS: usize = 4;
        const EACH: usize = EVENTS_MAX / WRITERS;
        let log = EventLog::default();
        let (done, woken) = (AtomicBool::new(false), Arc::new(AtomicUsize::new(0)));
        let _subscription = log.subscribe({
            let woken = woken.clone();
            move || {
                woken.fetch_add(1, Ordering::Relaxed);
            }
        });
        let read = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut read = Vec::new();
                loop {
                    let last_round = done.load(Ordering::Acquire);
                    let tail = log.since(read.last().copied().unwrap_or(0));
                    assert!(!tail.gap);
                    read.extend(sequences(&tail));
                    if last_round {
                        return read;
                    }
                }
            });
            thread::scope(|scope| {
                for _ in 0..WRITERS {
                    scope.spawn(|| (0..EACH).for_each(|_| log.push(EventKind::GuestReset)));
                }
            });
            done.store(true, Ordering::Release);
            reader.join().expect("the reader's assertions hold")
        });
        assert_eq!(read, (1..=(WRITERS * EACH) as u64).collect::<Vec<_>>());
        assert_eq!(woken.load(Ordering::Relaxed), WRITERS * EACH);
    }

    #[test]
    fn an_event_is_written_flat_with_its_kind() {
        let log = log_of(0);
        log.push(EventKind::VmState { state: State::Paused });
        let event = serde_json::to_value(&log.since(0).events[0]).expect("an event is plain data");
        assert_eq!(event["kind"], "vm_state");
        assert_eq!(event["state"], "paused");
        assert_eq!(event["sequence"], 1);
    }
}
