//! `/v1/groups/NAME/events`: what happens to a group, as server-sent events.
//!
//! ```text
//!  coordinator's thread ── note ──► EventLog: the last events of all groups ── changed ──► each client, from its place on
//! ```
//! As [of a VM](crate::server::v1::events), with a cursor for each client, and nothing else. Permanent cuts, up to a
//! hundred a second, are none: the status counts them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Extension;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use cutover_cluster::engine::{Record, Report};
use cutover_cluster::id::{MemberId, Seat};
use cutover_cluster::runtime::coordinator::{Ask, Coordinator};
use futures_util::stream::{self, Stream};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use utoipa::ToSchema;

use super::ask;
use crate::server::http::{Failure, Id, Refused};
use crate::server::instance::lock;
use crate::server::v1::events::{KEEP_ALIVE, WATCHERS_MAX, last_seen, written};
use crate::server::v1::types::Fault;

/// Events that are kept, of all groups together.
const EVENTS_MAX: usize = 1024;

/// One event of `GET /v1/groups/NAME/events`: the `data` of a server-sent event, whose `id` is `sequence` and whose
/// `event` is `kind`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupEventV1 {
    /// Number of the event, higher than those before.
    pub sequence: u64,
    /// When it happened, by the wall clock of the coordinator's host: nanoseconds since the beginning of 1970 (UTC).
    pub unix_time_ns: u64,
    /// What happened.
    #[serde(flatten)]
    pub kind: GroupEventKindV1,
}

/// What happened to a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum GroupEventKindV1 {
    /// Any one host may be lost from here on.
    Protected,
    /// No host may be lost from here on.
    Unprotected {
        /// Why.
        reason: String,
    },
    /// A cut came to nothing.
    CutInvalid {
        /// Which.
        cut: u64,
        /// Why.
        reason: String,
    },
    /// A member or standby failed.
    Failed {
        /// Name of the member.
        member: String,
        /// Which of its processes.
        incarnation: u32,
        /// How that is known.
        reason: String,
    },
    /// All go back to a cut.
    RollingBack {
        /// Which.
        cut: u64,
    },
    /// All go on from there.
    Recovered {
        /// From where.
        cut: u64,
    },
    /// A member is lost.
    Lost {
        /// Its name.
        member: String,
        /// Why nobody can take its place.
        reason: String,
    },
    /// A member's guest has ended.
    Ended {
        /// Its name.
        member: String,
    },
    /// A VM cannot join, or have a standby; it will be tried again.
    Refused {
        /// Its name.
        member: String,
        /// Why.
        reason: String,
    },
    /// Events before this one are not known any more.
    Gap,
}

impl GroupEventKindV1 {
    /// What `report` is to those who watch the group of `record`; nothing if they need not know.
    fn of(record: &Record, report: &Report) -> Option<Self> {
        let name = |member: MemberId| record.name(member).to_owned();
        Some(match report {
            Report::Permanent { .. } => return None,
            Report::Protected => Self::Protected,
            Report::Unprotected { reason } => Self::Unprotected { reason: reason.clone() },
            Report::Invalid { cut, reason } => Self::CutInvalid {
                cut: *cut,
                reason: reason.clone(),
            },
            Report::Failed {
                seat: Seat { member, incarnation },
                reason,
            } => Self::Failed {
                member: name(*member),
                incarnation: incarnation.0,
                reason: reason.clone(),
            },
            Report::RollingBack { cut } => Self::RollingBack { cut: *cut },
            Report::Recovered { cut } => Self::Recovered { cut: *cut },
            Report::Lost { member, reason } => Self::Lost {
                member: name(*member),
                reason: reason.clone(),
            },
            Report::Ended { member } => Self::Ended { member: name(*member) },
            Report::Refused { seat, reason } => Self::Refused {
                member: name(seat.member),
                reason: reason.clone(),
            },
        })
    }
}

/// What has happened to the groups of a coordinator. Clones are the same.
#[derive(Clone, Debug)]
pub struct EventLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    kept: Mutex<Kept>,
    changed: watch::Sender<()>,
    places: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    /// With the names of their groups, in order.
    events: VecDeque<(String, GroupEventV1)>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self(Arc::new(Shared {
            kept: Mutex::default(),
            changed: watch::Sender::new(()),
            places: Arc::new(Semaphore::new(WATCHERS_MAX)),
        }))
    }
}

impl EventLog {
    /// Something has happened to the group of `record`.
    pub fn note(&self, record: &Record, report: &Report) {
        let Some(kind) = GroupEventKindV1::of(record, report) else {
            return;
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut kept = lock(&self.0.kept);
        kept.last += 1;
        let event = GroupEventV1 {
            sequence: kept.last,
            unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            kind,
        };
        kept.events.push_back((record.spec.name.clone(), event));
        if kept.events.len() > EVENTS_MAX {
            kept.events.pop_front();
        }
        drop(kept);
        self.0.changed.send_replace(());
    }

    /// What has happened to `group` after event `seen`, with a gap before it if that may not be all, or another
    /// coordinator's number; and the last event there is.
    fn since(&self, group: &str, seen: u64) -> (VecDeque<GroupEventV1>, u64) {
        let kept = lock(&self.0.kept);
        let (is_other, seen) = (seen > kept.last, if seen > kept.last { 0 } else { seen });
        let first = kept.events.front().map(|(_, first)| first);
        let gap = first
            .filter(|first| is_other || first.sequence > seen + 1)
            .map(|first| GroupEventV1 {
                sequence: first.sequence - 1,
                unix_time_ns: first.unix_time_ns,
                kind: GroupEventKindV1::Gap,
            });
        let news = kept
            .events
            .iter()
            .filter(|(name, event)| name == group && event.sequence > seen);
        (
            gap.into_iter().chain(news.map(|(_, event)| event.clone())).collect(),
            kept.last,
        )
    }
}

/// What happens to a group, as server-sent events: first what is known of the past, then what happens.
///
/// Each has its number as `id`, its kind as `event`, and a `GroupEventV1` as `data`. A client that comes back with the
/// last id as `Last-Event-ID` gets what it has missed; a `gap` event tells it if that is no longer known. What is known
/// is what this coordinator has decided.
#[utoipa::path(
    get, path = "/v1/groups/{name}/events", operation_id = "getGroupEvents", tag = "cutover",
    params(
        ("name" = String, Path, description = "Name of the group"),
        ("Last-Event-ID" = Option<u64>, Header, description = "The last event that the client has seen")
    ),
    responses(
        (status = 200, body = GroupEventV1, content_type = "text/event-stream"),
        (status = 404, body = Fault, description = "There is none"),
        (status = 429, body = Fault, description = "Too many clients watch already"),
        Refused
    )
)]
pub async fn get(
    State(coordinator): State<Arc<Coordinator>>,
    Extension(log): Extension<EventLog>,
    Id(name): Id,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let seen = last_seen(&headers)?;
    let places = Arc::clone(&log.0.places);
    let place = places
        .try_acquire_owned()
        .map_err(|_| Failure::TooManyWatchers(WATCHERS_MAX))?;
    // Whether there is one.
    ask(&coordinator, |reply| Ask::Group(name.clone(), reply)).await?;
    let watcher = Watcher {
        changed: log.0.changed.subscribe(),
        log,
        group: name,
        seen,
        ready: VecDeque::new(),
        _place: place,
    };
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    Ok(Sse::new(events(watcher)).keep_alive(keep_alive).into_response())
}

/// A client's place in the log.
struct Watcher {
    log: EventLog,
    changed: watch::Receiver<()>,
    group: String,
    /// The last event that it need not be sent.
    seen: u64,
    ready: VecDeque<GroupEventV1>,
    _place: OwnedSemaphorePermit,
}

fn events(watcher: Watcher) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    stream::unfold(watcher, |mut watcher| async move {
        loop {
            if let Some(event) = watcher.ready.pop_front() {
                return Some((Ok(written(event.sequence, &event)), watcher));
            }
            // Marked as seen before the log is read, so that nothing falls between.
            watcher.changed.mark_unchanged();
            (watcher.ready, watcher.seen) = watcher.log.since(&watcher.group, watcher.seen);
            if watcher.ready.is_empty() && watcher.changed.changed().await.is_err() {
                return None;
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use cutover_cluster::id::{GroupId, Host, Incarnation};
    use cutover_cluster::spec::GroupSpec;

    use super::*;

    fn record(name: &str) -> Record {
        let spec: GroupSpec = serde_json::from_value(serde_json::json!({
            "name": name, "members": [{"name": "web", "host": Host("unix:a".to_owned())}], "backups": ["unix:b"]
        }))
        .expect("a group");
        Record::new(GroupId(uuid::Uuid::nil()), spec).expect("there can be such a group")
    }

    fn kinds(log: &EventLog, group: &str, seen: u64) -> Vec<GroupEventKindV1> {
        log.since(group, seen).0.into_iter().map(|event| event.kind).collect()
    }

    #[test]
    fn a_client_gets_what_happened_to_its_group_since_and_nothing_of_others() {
        let log = EventLog::default();
        let failed = Report::Failed {
            seat: Seat {
                member: MemberId(0),
                incarnation: Incarnation(3),
            },
            reason: "it is silent".to_owned(),
        };
        log.note(&record("a"), &Report::Protected);
        log.note(&record("b"), &Report::RollingBack { cut: 1 });
        log.note(&record("a"), &failed);
        log.note(
            &record("a"),
            &Report::Permanent {
                cut: 2,
                cost: Default::default(),
            },
        );
        let failed = GroupEventKindV1::Failed {
            member: "web".to_owned(),
            incarnation: 3,
            reason: "it is silent".to_owned(),
        };
        assert_eq!(kinds(&log, "a", 0), [GroupEventKindV1::Protected, failed.clone()]);
        assert_eq!(kinds(&log, "a", 1), [failed]);
        assert!(kinds(&log, "a", 3).is_empty());
        assert_eq!(kinds(&log, "b", 0), [GroupEventKindV1::RollingBack { cut: 1 }]);
    }

    #[test]
    fn a_client_that_was_away_for_too_long_or_saw_another_coordinator_is_told_of_a_gap() {
        let log = EventLog::default();
        log.note(&record("a"), &Report::Protected);
        assert_eq!(
            kinds(&log, "a", 7),
            [GroupEventKindV1::Gap, GroupEventKindV1::Protected]
        );
        for _ in 0..EVENTS_MAX {
            log.note(&record("b"), &Report::Protected);
        }
        assert_eq!(kinds(&log, "a", 0), [GroupEventKindV1::Gap]);
        assert!(kinds(&log, "a", 1).is_empty());
    }
}
