//! The REST API of a coordinator, on its Unix socket.
//!
//! ```text
//!  POST /v1/groups ──► 204: the coordinator knows of it, and sees to it
//!   GET /v1/groups, /v1/groups/NAME ──► how they are doing
//!   GET /v1/groups/NAME/events ──► what happens to it, as server-sent events
//!  POST /v1/groups/NAME/failover ── … ──► 204: a member failed, and the group has recovered
//!  POST /v1/groups/NAME/checkpoints ── … ──► 201: a cut of it is kept
//!  DELETE /v1/groups/NAME ──► 204: its VMs go on on their own
//! ```
//! Decides nothing: requests go to the coordinator's thread, and answers come back.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Router};
use cutover_cluster::engine::{self, GroupStatus, MemberState, Place};
use cutover_cluster::id::{Host, Seat};
use cutover_cluster::runtime::coordinator::{Ask, Coordinator, GroupView, Reply};
use cutover_cluster::runtime::recovery::Recovery;
use cutover_cluster::spec::{GroupSpec, Interval, MemberSpec, Timing};
use tokio::sync::oneshot;

use super::connection;
use super::http::{Failure, Id, Json, Outcome, json, no_such_method, no_such_path};

pub mod checkpoints;
pub mod events;
pub mod openapi;
pub mod types;

use events::EventLog;
use types::{
    FailoverV1, GroupStateV1, GroupStatusV1, GroupTimingV1, GroupV1, IntervalV1, MemberStateV1, MemberStatusV1,
    RecoveryV1, StandbyStatusV1,
};

use super::v1::types::Fault;
use crate::runtime_dir::{NAME_MAX, VmName};
use crate::server::http::{Changed, Refused};

/// Most bytes of a request's body: a group of as many members as there can be, with long names.
const BODY_MAX: usize = 1 << 20;

/// Serves clients of `coordinator`, whose observer notes `events`, on `listener`, until `stop` says so.
///
/// # Errors
/// The socket cannot be used.
pub async fn serve(
    listener: std::os::unix::net::UnixListener,
    coordinator: Arc<Coordinator>,
    events: EventLog,
    stop: oneshot::Receiver<()>,
) -> io::Result<()> {
    let listener = tokio::net::UnixListener::from_std(listener)?;
    connection::serve(listener, router(coordinator, events), stop).await;
    Ok(())
}

fn router(coordinator: Arc<Coordinator>, log: EventLog) -> Router {
    Router::new()
        .route("/v1/groups", get(list).post(create))
        .route("/v1/groups/{name}", get(status).delete(dissolve))
        .route("/v1/groups/{name}/failover", post(failover))
        .route("/v1/groups/{name}/events", get(events::get).layer(Extension(log)))
        .route("/v1/groups/{name}/resume", post(resume))
        .route("/v1/groups/{name}/checkpoints", post(checkpoints::store))
        .route(
            "/v1/groups/{name}/checkpoints/current",
            get(checkpoints::progress).delete(checkpoints::cancel),
        )
        .merge(openapi::routes())
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(coordinator)
}

/// Asks the coordinator's thread, and waits for its answer.
async fn ask<T: Send + 'static>(coordinator: &Coordinator, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T, Failure> {
    let (answer, answered) = oneshot::channel();
    coordinator.ask(ask(Box::new(move |result| {
        // What a client asked for is done also when it has gone away.
        let _ = answer.send(result);
    })));
    Ok(answered.await.map_err(|_| Failure::CoordinatorOver)??)
}

/// Has VMs be protected together. The answer comes when that is durable; then the coordinator sees to it, by itself and
/// for as long as it takes.
#[utoipa::path(
    post, path = "/v1/groups", operation_id = "createGroup", tag = "cutover", request_body = GroupV1,
    responses(Changed)
)]
pub async fn create(State(coordinator): State<Arc<Coordinator>>, Json(body): Json<GroupV1>) -> Outcome {
    check_name(&body.name)?;
    ask(&coordinator, |reply| Ask::Create(body.into(), reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A group's name is part of a path here.
fn check_name(name: &str) -> Result<(), cutover_cluster::Error> {
    name.parse::<VmName>()
        .map(drop)
        .map_err(|_| cutover_cluster::Error::Spec {
            group: name.to_owned(),
            reason: format!(
                "its name has 1 to {NAME_MAX} letters, digits, '-', '_' or '.', the first a letter or digit"
            ),
        })
}

/// All groups.
#[utoipa::path(
    get, path = "/v1/groups", operation_id = "getGroups", tag = "cutover",
    responses((status = 200, body = Vec<GroupStatusV1>), Refused)
)]
pub async fn list(State(coordinator): State<Arc<Coordinator>>) -> Result<Response, Failure> {
    let groups = ask(&coordinator, Ask::Groups).await?;
    Ok(json(&groups.into_iter().map(GroupStatusV1::from).collect::<Vec<_>>()))
}

/// How a group is doing.
#[utoipa::path(
    get, path = "/v1/groups/{name}", operation_id = "getGroup", tag = "cutover",
    params(("name" = String, Path, description = "Name of the group")),
    responses((status = 200, body = GroupStatusV1), (status = 404, body = Fault, description = "There is none"), Refused)
)]
pub async fn status(State(coordinator): State<Arc<Coordinator>>, Id(name): Id) -> Result<Response, Failure> {
    let group = ask(&coordinator, |reply| Ask::Group(name, reply)).await?;
    Ok(json(&GroupStatusV1::from(group)))
}

/// Protects the VMs of a group no more: what is held is sent, standbys end, and the VMs go on on their own.
#[utoipa::path(
    delete, path = "/v1/groups/{name}", operation_id = "stopGroup", tag = "cutover",
    params(("name" = String, Path, description = "Name of the group")),
    responses((status = 404, body = Fault, description = "There is none"), Changed)
)]
pub async fn dissolve(State(coordinator): State<Arc<Coordinator>>, Id(name): Id) -> Outcome {
    ask(&coordinator, |reply| Ask::Dissolve(name, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Has a member fail. The answer comes when the group has recovered.
#[utoipa::path(
    post, path = "/v1/groups/{name}/failover", operation_id = "failOver", tag = "cutover", request_body = FailoverV1,
    params(("name" = String, Path, description = "Name of the group")),
    responses((status = 404, body = Fault, description = "There is none"), Changed)
)]
pub async fn failover(
    State(coordinator): State<Arc<Coordinator>>,
    Id(group): Id,
    Json(FailoverV1 { member }): Json<FailoverV1>,
) -> Outcome {
    ask(&coordinator, |reply| Ask::Failover { group, member, reply }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Has VMs of a group run that were started paused, from snapshots: when all have joined, so that they run together.
#[utoipa::path(
    post, path = "/v1/groups/{name}/resume", operation_id = "resumeGroup", tag = "cutover",
    params(("name" = String, Path, description = "Name of the group")),
    responses((status = 404, body = Fault, description = "There is none"), Changed)
)]
pub async fn resume(State(coordinator): State<Arc<Coordinator>>, Id(name): Id) -> Outcome {
    ask(&coordinator, |reply| Ask::Resume(name, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl From<GroupV1> for GroupSpec {
    fn from(group: GroupV1) -> Self {
        let ms = Duration::from_millis;
        let member = |member: types::GroupMemberV1| MemberSpec {
            name: member.name,
            host: Host(member.host),
            restore: member.restore.map(PathBuf::from),
        };
        let GroupTimingV1 {
            heartbeat_ms,
            lease_ms,
            suspicion_ms,
            cut_ms,
            ship_ms,
            roll_back_ms,
        } = group.timing;
        Self {
            name: group.name,
            members: group.members.into_iter().map(member).collect(),
            backups: group.backups.into_iter().map(Host).collect(),
            interval: match group.interval {
                IntervalV1::Fixed { ms: interval } => Interval::Fixed(ms(interval)),
                IntervalV1::Adaptive { max_ms } => Interval::Adaptive { max: ms(max_ms) },
            },
            timing: Timing {
                heartbeat: ms(heartbeat_ms),
                lease: ms(lease_ms),
                suspicion: ms(suspicion_ms),
                cut: ms(cut_ms),
                ship: ms(ship_ms),
                roll_back: ms(roll_back_ms),
            },
        }
    }
}

impl From<GroupView> for GroupStatusV1 {
    fn from(view: GroupView) -> Self {
        let GroupView {
            status,
            connected,
            refusal,
            last_recovery,
        } = view;
        let is_connected = |seat: Seat| connected.contains(&seat);
        let last_recovery = last_recovery.map(|recovery| recovered(&recovery, &status));
        Self {
            state: state(status.state),
            reason: refusal.or(status.reason),
            generation: status.generation.0,
            permanent_cut: status.permanent,
            interval_ms: u64::try_from(status.interval.as_millis()).unwrap_or(u64::MAX),
            cuts: status.cuts,
            invalid_cuts: status.invalid,
            recoveries: status.recoveries,
            pause_ns: status.last_cut.pause_ns,
            members: status
                .members
                .into_iter()
                .map(|member| member_status(member, is_connected))
                .collect(),
            last_recovery,
            name: status.name,
        }
    }
}

fn state(state: engine::State) -> GroupStateV1 {
    match state {
        engine::State::Unprotected => GroupStateV1::Unprotected,
        engine::State::Protecting => GroupStateV1::Protecting,
        engine::State::Protected => GroupStateV1::Protected,
        engine::State::Judging => GroupStateV1::Judging,
        engine::State::Recovering => GroupStateV1::Recovering,
        engine::State::Dissolved => GroupStateV1::Dissolved,
    }
}

fn member_status(member: MemberState, is_connected: impl Fn(Seat) -> bool) -> MemberStatusV1 {
    let (state, reason, primary, standby) = match member.place {
        Place::Expected => (MemberStateV1::Expected, None, None, None),
        Place::In { primary, standby } => (MemberStateV1::Member, None, Some(primary), standby),
        Place::Ended => (MemberStateV1::Ended, None, None, None),
        Place::Lost { reason, .. } => (MemberStateV1::Lost, Some(reason), None, None),
    };
    MemberStatusV1 {
        name: member.name,
        state,
        reason,
        connected: primary.as_ref().is_some_and(|primary| is_connected(primary.seat)),
        incarnation: primary.as_ref().map(|primary| primary.seat.incarnation.0),
        host: primary.map(|primary| primary.host.0),
        standby: standby.map(|standby| StandbyStatusV1 {
            incarnation: standby.seat.incarnation.0,
            connected: is_connected(standby.seat),
            host: standby.host.0,
        }),
        pause_ns: member.status.pause_ns,
        dirty_pages: member.status.dirty_pages,
        held_frames: member.status.held_frames,
        held_bytes: member.status.held_bytes,
        lag: member.status.lag,
        shipped_bytes: member.status.shipped_bytes,
    }
}

fn recovered(recovery: &Recovery, status: &GroupStatus) -> RecoveryV1 {
    let name = |seat: &Seat| {
        let member = status.members.get(usize::from(seat.member.0));
        member.map(|member| member.name.clone()).unwrap_or_default()
    };
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    RecoveryV1 {
        cut: recovery.cut,
        lost: recovery.lost.iter().map(name).collect(),
        detect_ns: ns(recovery.detect),
        decide_ns: ns(recovery.decide),
        restore_ns: recovery.restore.map(ns),
        resume_ns: recovery.resume.map(ns),
    }
}

#[cfg(test)]
mod tests;
