//! `/v1/snapshots`: snapshots of the running VM, into a store of them.
//!
//! ```text
//!  POST /v1/snapshots ──────────── … ──────────────► 201, the report: the snapshot is permanent
//!       GET /v1/snapshots/current ──► how far it is
//!       DELETE /v1/snapshots/current ──► it is cancelled, and refused to whoever asked for it
//! ```

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use cutover_vmm::snapshot::{Disks, Kind, Method, SnapshotProgress, SnapshotReport, SnapshotRequest, Target};

use super::types::{
    COMPRESSION_MAX, Fault, ProgressV1, SnapshotDisksV1, SnapshotKindV1, SnapshotMethodV1, SnapshotReportV1, SnapshotV1,
};
use crate::server::firecracker::rejection::Rejection;
use crate::server::http::{Changed, Failure, Json, Outcome, Refused, json};
use crate::server::instance::Instance;

/// Makes a snapshot of the VM, which goes on running if it runs.
///
/// The answer comes when the snapshot is permanent, which may take minutes. `snapshot_*` events tell of it as well, and
/// it is made whether or not the client waits. There is one at a time.
#[utoipa::path(
    post, path = "/v1/snapshots", operation_id = "postSnapshot", tag = "cutover",
    request_body = SnapshotV1,
    responses(
        (status = 201, body = SnapshotReportV1, description = "It is permanent"),
        (status = 408, body = Fault, description = "The body did not arrive in time"),
        (status = 413, body = Fault, description = "The body is too long"),
        Refused
    )
)]
pub async fn post(State(instance): State<Arc<Instance>>, Json(body): Json<SnapshotV1>) -> Result<Response, Failure> {
    let report = instance.snapshot(body.try_into()?).await?;
    Ok((StatusCode::CREATED, json(&SnapshotReportV1::from(report))).into_response())
}

/// How far the snapshot that is being made is.
#[utoipa::path(
    get, path = "/v1/snapshots/current", operation_id = "getSnapshotProgress", tag = "cutover",
    responses((status = 200, body = ProgressV1), Refused)
)]
pub async fn progress(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    let progress = instance.snapshot_progress().await?;
    Ok(json(&progress.map(ProgressV1::of_work).unwrap_or_default()))
}

/// Cancels the snapshot that is being made; the guest does not notice, and nothing is left of the snapshot.
#[utoipa::path(
    delete,
    path = "/v1/snapshots/current",
    operation_id = "cancelSnapshot",
    tag = "cutover",
    responses(Changed)
)]
pub async fn cancel(State(instance): State<Arc<Instance>>) -> Outcome {
    instance.cancel_snapshot().await
}

impl ProgressV1 {
    /// What there is to tell of work that is under way.
    pub fn of_work(SnapshotProgress { done, total }: SnapshotProgress) -> Self {
        Self {
            under_way: true,
            done_bytes: done,
            total_bytes: total,
        }
    }
}

impl TryFrom<SnapshotV1> for SnapshotRequest {
    type Error = Rejection;

    fn try_from(body: SnapshotV1) -> Result<Self, Rejection> {
        if let Some(level) = body.compress
            && !(1..=COMPRESSION_MAX).contains(&level)
        {
            return Err(Rejection::Compression(level));
        }
        Ok(Self {
            target: Target::Store {
                store: body.store.into(),
                name: body.name,
            },
            kind: body.kind.into(),
            disks: body.disks.into(),
            compress: body.compress,
        })
    }
}

impl From<SnapshotKindV1> for Kind {
    fn from(kind: SnapshotKindV1) -> Self {
        match kind {
            SnapshotKindV1::Full => Self::Full,
            SnapshotKindV1::Incremental => Self::Incremental,
        }
    }
}

impl From<SnapshotDisksV1> for Disks {
    fn from(disks: SnapshotDisksV1) -> Self {
        match disks {
            SnapshotDisksV1::Copied => Self::Copied,
            SnapshotDisksV1::Referenced => Self::Referenced,
        }
    }
}

impl From<SnapshotReport> for SnapshotReportV1 {
    fn from(report: SnapshotReport) -> Self {
        Self {
            path: report.path.display().to_string(),
            id: report.id.map(|id| id.to_string()),
            parent: report.parent,
            kind: match report.kind {
                Kind::Full => SnapshotKindV1::Full,
                Kind::Incremental => SnapshotKindV1::Incremental,
            },
            method: match report.method {
                Method::CopyOnWrite => SnapshotMethodV1::CopyOnWrite,
                Method::Paused => SnapshotMethodV1::Paused,
            },
            method_reason: report.method_reason,
            pause_ns: report.pause_ns,
            total_ns: report.total_ns,
            memory_bytes: report.memory_bytes,
            disk_bytes: report.disk_bytes,
            file_bytes: report.file_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<SnapshotRequest, Rejection> {
        serde_json::from_str::<SnapshotV1>(json).expect("valid").try_into()
    }

    #[test]
    fn a_store_and_a_name_are_enough_for_a_full_snapshot_with_its_disks() {
        let request = SnapshotRequest {
            target: Target::Store {
                store: "s".into(),
                name: "n".to_owned(),
            },
            kind: Kind::Full,
            disks: Disks::Copied,
            compress: None,
        };
        assert_eq!(read(r#"{"store":"s","name":"n"}"#), Ok(request.clone()));
        let json = r#"{"store":"s","name":"n","kind":"incremental","disks":"referenced","compress":19}"#;
        let other = SnapshotRequest {
            kind: Kind::Incremental,
            disks: Disks::Referenced,
            compress: Some(19),
            ..request
        };
        assert_eq!(read(json), Ok(other));
    }

    #[test]
    fn a_level_that_zstd_does_not_have_is_refused() {
        for level in [i32::MIN, 0, 20] {
            let json = format!(r#"{{"store":"s","name":"n","compress":{level}}}"#);
            assert_eq!(read(&json), Err(Rejection::Compression(level)));
        }
    }
}
