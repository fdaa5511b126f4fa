//! `/v1/events`: what happens to the VM, as server-sent events.
//!
//! Every client has a cursor into the one [`EventLog`]; nothing is buffered per client but what it is being sent. A
//! client that reads too slowly finds a gap, and one that does not read at all is dropped with its connection
//! ([`WRITE_TIMEOUT`](crate::server::connection::WRITE_TIMEOUT)).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use cutover_vmm::events::{Event, EventKind, Tail};
use cutover_vmm::{EventLog, Exit};
use futures_util::stream::{self, Stream};
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::types::{EventKindV1, EventV1, ExitV1};
use crate::server::http::{Failure, Refused};
use crate::server::instance::Instance;

/// Most clients that watch at a time.
pub const WATCHERS_MAX: usize = 32;
/// How often a client that nothing is sent to is sent a comment, so that dead connections are noticed.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// The header by which a client that comes back says which event it saw last.
const LAST_EVENT_ID: &str = "last-event-id";

/// What happens to the VM, as server-sent events: first what is known of the past, then what happens.
///
/// Each has its number as `id`, its kind as `event`, and an `EventV1` as `data`. A client that comes back with the last
/// id as `Last-Event-ID` gets what it has missed; a `gap` event tells it if that is no longer known.
#[utoipa::path(
    get, path = "/v1/events", operation_id = "getEvents", tag = "cutover",
    params(("Last-Event-ID" = Option<u64>, Header, description = "The last event that the client has seen")),
    responses(
        (status = 200, body = EventV1, content_type = "text/event-stream"),
        (status = 429, body = crate::server::v1::types::Fault, description = "Too many clients watch already"),
        Refused
    )
)]
pub async fn get(State(instance): State<Arc<Instance>>, headers: HeaderMap) -> Result<Response, Failure> {
    let watcher = instance.watch(last_seen(&headers)?)?;
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    Ok(Sse::new(events(watcher)).keep_alive(keep_alive).into_response())
}

/// The last event that a client has seen; 0 if none.
///
/// # Errors
/// What it says is no number.
pub fn last_seen(headers: &HeaderMap) -> Result<u64, Failure> {
    let Some(value) = headers.get(LAST_EVENT_ID) else {
        return Ok(0);
    };
    let text = value.to_str().map_err(|_| Failure::LastEventId)?;
    text.parse().map_err(|_| Failure::LastEventId)
}

/// A client's place in the log.
pub struct Watcher {
    /// The log.
    pub log: EventLog,
    /// Changes with every event; closed when no more will come.
    pub changed: watch::Receiver<()>,
    /// The last event that the client has seen.
    pub seen: u64,
    /// Its place among the [`WATCHERS_MAX`].
    pub _place: OwnedSemaphorePermit,
}

fn events(watcher: Watcher) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    stream::unfold(
        (watcher, VecDeque::<EventV1>::new()),
        |(mut watcher, mut ready)| async move {
            loop {
                if let Some(event) = ready.pop_front() {
                    return Some((Ok(written(event.sequence, &event)), (watcher, ready)));
                }
                // Marked as seen before the log is read, so that nothing falls between.
                watcher.changed.mark_unchanged();
                let open = watcher.changed.has_changed().is_ok();
                ready = news(watcher.log.since(watcher.seen));
                match ready.back() {
                    Some(event) => watcher.seen = event.sequence,
                    None if open => {
                        // That it is closed is found in the next round, after what came last.
                        let _ = watcher.changed.changed().await;
                    }
                    None => return None,
                }
            }
        },
    )
}

/// What a client is sent.
fn news(tail: Tail) -> VecDeque<EventV1> {
    let gap = tail.events.first().filter(|_| tail.gap).map(|first| EventV1 {
        sequence: first.sequence - 1,
        unix_time_ns: first.unix_time_ns,
        kind: EventKindV1::Gap,
    });
    gap.into_iter()
        .chain(tail.events.into_iter().map(EventV1::from))
        .collect()
}

/// An event as it is sent.
pub fn written(sequence: u64, event: &impl Serialize) -> sse::Event {
    let data = serde_json::to_value(event).expect("an event has string keys only, which always can be written");
    let kind = data["kind"].as_str().unwrap_or_default();
    sse::Event::default()
        .id(sequence.to_string())
        .event(kind)
        .data(data.to_string())
}

impl From<Event> for EventV1 {
    fn from(event: Event) -> Self {
        Self {
            sequence: event.sequence,
            unix_time_ns: event.unix_time_ns,
            kind: event.kind.into(),
        }
    }
}

impl From<EventKind> for EventKindV1 {
    fn from(kind: EventKind) -> Self {
        match kind {
            EventKind::VmState { state } => Self::VmState { state: state.into() },
            EventKind::VmEnded { exit } => Self::VmEnded { exit: exit.into() },
            EventKind::VmFailed { reason } => Self::VmFailed { reason },
            EventKind::GuestShutdown => Self::GuestShutdown,
            EventKind::GuestReset => Self::GuestReset,
            EventKind::GuestPanic => Self::GuestPanic,
            EventKind::ConsoleQuit => Self::ConsoleQuit,
            EventKind::DeviceFailed { device, reason } => Self::DeviceFailed { device, reason },
            EventKind::DirtyLogFallback { reason } => Self::DirtyLogFallback { reason },
            EventKind::OperationRequested { operation } => Self::OperationRequested {
                operation: operation.to_owned(),
            },
            EventKind::OperationForced { state } => Self::OperationForced { state: state.into() },
            EventKind::DriveUpdated { drive } => Self::DriveUpdated { drive },
            EventKind::NetworkInterfaceUpdated { interface } => Self::NetworkInterfaceUpdated { interface },
            EventKind::BalloonUpdated => Self::BalloonUpdated,
            EventKind::SnapshotStarted { path } => Self::SnapshotStarted {
                path: path.display().to_string(),
            },
            EventKind::SnapshotFinished { report } => Self::SnapshotFinished { report: report.into() },
            EventKind::SnapshotFailed { path, reason } => Self::SnapshotFailed {
                path: path.display().to_string(),
                reason,
            },
            EventKind::RestoreFinished => Self::RestoreFinished,
            EventKind::MigrationStarted { to } => Self::MigrationStarted { to },
            EventKind::MigrationRound { progress } => Self::MigrationRound {
                progress: progress.into(),
            },
            EventKind::MigrationFinished { to, report } => Self::MigrationFinished {
                to,
                report: (&report).into(),
            },
            EventKind::MigrationFailed { to, reason } => Self::MigrationFailed { to, reason },
            EventKind::Migrated => Self::Migrated,
            EventKind::Protected { to } => Self::Protected { to },
            EventKind::Unprotected => Self::Unprotected,
            EventKind::CheckpointFailed { epoch, reason } => Self::CheckpointFailed { epoch, reason },
            EventKind::RolledBack { cut } => Self::RolledBack { cut },
            EventKind::Promoted { cut } => Self::Promoted { cut },
        }
    }
}

impl From<Exit> for ExitV1 {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Shutdown => Self::Shutdown,
            Exit::Reboot => Self::Reboot,
            Exit::Panic => Self::Panic,
            Exit::Ended => Self::Ended,
            Exit::Migrated => Self::Migrated,
        }
    }
}
