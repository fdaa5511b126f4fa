//! `/v1/groups/NAME/checkpoints`: checkpoints of a group that are kept.
//!
//! ```text
//!  POST …/checkpoints ──────────── … ──────────────► 201, its manifest: all of it is permanent
//!       GET …/checkpoints/current ──► how far it is
//!       DELETE …/checkpoints/current ──► it is given up, and refused to whoever asked for it
//! ```

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use cutover_cluster::checkpoint::{CheckpointId, Manifest, StoreRequest};
use cutover_cluster::runtime::coordinator::{Ask, Coordinator};

use super::ask;
use super::types::{CheckpointMemberV1, CheckpointRequestV1, CheckpointV1};
use crate::server::http::{Changed, Failure, Id, Json, Outcome, Refused, json};
use crate::server::v1::types::{COMPRESSION_MAX, Fault, ProgressV1};

/// Stores a checkpoint of a group, whose members go on running.
///
/// The answer comes when all of it is permanent, which may take minutes; it is made whether or not the client waits. There is
/// one of a group at a time. If any member fails meanwhile, there is none, and the group goes on as it does then.
#[utoipa::path(
    post, path = "/v1/groups/{name}/checkpoints", operation_id = "storeCheckpoint", tag = "cutover",
    request_body = CheckpointRequestV1,
    params(("name" = String, Path, description = "Name of the group")),
    responses(
        (status = 201, body = CheckpointV1, description = "It is permanent"),
        (status = 404, body = Fault, description = "There is no such group"),
        Refused
    )
)]
pub async fn store(
    State(coordinator): State<Arc<Coordinator>>,
    Id(group): Id,
    Json(body): Json<CheckpointRequestV1>,
) -> Result<Response, Failure> {
    let request = body.into();
    // A client that goes away takes only its own request with it.
    let stored = tokio::spawn(async move { store_whole(&coordinator, group, request).await });
    let manifest = stored.await.map_err(|_| Failure::CoordinatorOver)??;
    Ok((StatusCode::CREATED, json(&CheckpointV1::from(manifest))).into_response())
}

async fn store_whole(coordinator: &Coordinator, group: String, request: StoreRequest) -> Result<Manifest, Failure> {
    let refused = |reason| cutover_cluster::Error::NotNow {
        group: group.clone(),
        action: "be stored",
        reason,
    };
    if let Some(level) = request.compress.filter(|level| !(1..=COMPRESSION_MAX).contains(level)) {
        let reason = format!("compression levels are 1 to {COMPRESSION_MAX}, not {level}");
        return Err(refused(reason).into());
    }
    let (dir, name) = (request.store.clone(), request.name.clone());
    // Files may be on a slow file system: the coordinator's clients wait for none of it, here and below.
    let (at, of, called) = (dir.clone(), group.clone(), name.clone());
    let is_taken = tokio::task::spawn_blocking(move || Manifest::exists(&at, &of, &called));
    if is_taken.await.map_err(|_| Failure::CoordinatorOver)? {
        return Err(refused(format!("there is a checkpoint called '{name}' already")).into());
    }
    let manifest = ask(coordinator, |reply| Ask::Store { group, request, reply }).await?;
    let written = tokio::task::spawn_blocking(move || manifest.write(&dir).map(|()| manifest));
    Ok(written.await.map_err(|_| Failure::CoordinatorOver)??)
}

/// How far the checkpoint is that is being stored: of all members together.
#[utoipa::path(
    get, path = "/v1/groups/{name}/checkpoints/current", operation_id = "getCheckpointProgress", tag = "cutover",
    params(("name" = String, Path, description = "Name of the group")),
    responses((status = 200, body = ProgressV1), (status = 404, body = Fault, description = "There is none"), Refused)
)]
pub async fn progress(State(coordinator): State<Arc<Coordinator>>, Id(name): Id) -> Result<Response, Failure> {
    let progress = ask(&coordinator, |reply| Ask::StoreProgress(name, reply)).await?;
    let progress = progress.map(|(done_bytes, total_bytes)| ProgressV1 {
        under_way: true,
        done_bytes,
        total_bytes,
    });
    Ok(json(&progress.unwrap_or_default()))
}

/// Gives up the checkpoint that is being stored; guests do not notice.
#[utoipa::path(
    delete, path = "/v1/groups/{name}/checkpoints/current", operation_id = "cancelCheckpoint", tag = "cutover",
    params(("name" = String, Path, description = "Name of the group")),
    responses((status = 404, body = Fault, description = "There is none"), Changed)
)]
pub async fn cancel(State(coordinator): State<Arc<Coordinator>>, Id(name): Id) -> Outcome {
    ask(&coordinator, |reply| Ask::CancelStore(name, reply)).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl From<CheckpointRequestV1> for StoreRequest {
    fn from(body: CheckpointRequestV1) -> Self {
        Self {
            id: CheckpointId::made_up(),
            store: body.store.into(),
            name: body.name,
            full: body.full,
            compress: body.compress,
        }
    }
}

impl From<Manifest> for CheckpointV1 {
    fn from(manifest: Manifest) -> Self {
        let members = manifest.members.into_iter().map(|member| CheckpointMemberV1 {
            vm: member.vm,
            snapshot: member.snapshot.name,
            id: member.snapshot.id.to_string(),
            parent: member.snapshot.parent,
            file_bytes: member.snapshot.file_bytes,
            pause_ns: member.snapshot.pause_ns,
        });
        Self {
            group: manifest.group,
            name: manifest.name,
            created_unix_s: manifest.created,
            cut: manifest.cut,
            generation: manifest.generation.0,
            members: members.collect(),
        }
    }
}
