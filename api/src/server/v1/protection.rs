//! `/v1/protection`: the VM is a member of a group.
//!
//! ```text
//!  PUT /v1/protection ──► 204: it has joined, and calls the coordinator
//!  GET /v1/protection ──► how it does as a member
//! ```
//! Coordinators ask for that, by the agent of the VM's host; people ask a coordinator. A VM leaves its group when the
//! coordinator says so: that it is a member no more has to be durable before anything of it is let go of.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_cluster::id::{GroupId, Host, Identity, Incarnation, MemberId, Seat};
use cutover_cluster::message::Stage;
use cutover_cluster::runtime::seat::SeatView;
use cutover_migration::transport::Endpoint;

use super::migration::endpoint;
use super::types::{Fault, MembershipV1, ProtectionStageV1, ProtectionStatusV1, ProtectionV1};
use crate::server::firecracker::rejection::Rejection;
use crate::server::http::{Changed, Failure, Json, Outcome, Refused, json};
use crate::server::instance::{Instance, JoinRequest};

/// Has the VM join a group, which its coordinator asks for.
///
/// The answer comes when it takes part; from then on the coordinator says what is done.
#[utoipa::path(
    put, path = "/v1/protection", operation_id = "putProtection", tag = "cutover", request_body = ProtectionV1,
    responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<ProtectionV1>) -> Outcome {
    instance.join_group(body.try_into()?).await
}

/// Whether the VM is a member of a group, and how it does.
#[utoipa::path(
    get, path = "/v1/protection", operation_id = "getProtection", tag = "cutover",
    responses((status = 200, body = ProtectionStatusV1), (status = 408, body = Fault), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    let member = instance.membership().map(MembershipV1::from);
    Ok(json(&ProtectionStatusV1 { member }))
}

impl TryFrom<ProtectionV1> for JoinRequest {
    type Error = Rejection;

    fn try_from(body: ProtectionV1) -> Result<Self, Rejection> {
        let (coordinator, _) = endpoint(&body.coordinator, body.insecure, body.tls_dir.as_deref())?;
        let group = body.group.parse().map_err(|_| Rejection::NotAGroup(body.group))?;
        let seat = Seat {
            member: MemberId(body.member),
            incarnation: Incarnation(body.incarnation),
        };
        Ok(Self {
            who: Identity {
                group: GroupId(group),
                seat,
            },
            host: Host(body.host),
            coordinator,
            insecure: body.insecure,
            tls_dir: body.tls_dir.map(PathBuf::from),
        })
    }
}

impl From<SeatView> for MembershipV1 {
    fn from(view: SeatView) -> Self {
        let SeatView {
            who,
            coordinators,
            connected,
            generation,
            standing,
            status,
            ..
        } = view;
        Self {
            group: who.group.to_string(),
            member: who.seat.member.0,
            incarnation: who.seat.incarnation.0,
            coordinator: coordinators.first().map(Endpoint::to_string).unwrap_or_default(),
            connected,
            generation: generation.0,
            stage: standing.stage.into(),
            cut: standing.cut,
            permanent: standing.permanent,
            held_frames: status.held_frames,
            held_bytes: status.held_bytes,
            pause_ns: status.pause_ns,
            dirty_pages: status.dirty_pages,
            lag: status.lag,
            shipped_bytes: status.shipped_bytes,
        }
    }
}

impl From<Stage> for ProtectionStageV1 {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::Open => Self::Open,
            Stage::Seeding => Self::Seeding,
            Stage::Ready => Self::Ready,
            Stage::Blocking => Self::Blocking,
            Stage::Blocked => Self::Blocked,
            Stage::Taking => Self::Taking,
            Stage::Tentative => Self::Tentative,
            Stage::Shipping => Self::Shipping,
            Stage::Held => Self::Held,
            Stage::Ended => Self::Ended,
            Stage::GoingBack => Self::GoingBack,
            Stage::AtCut => Self::AtCut,
            Stage::Empty | Stage::Whole => Self::Standby,
        }
    }
}
