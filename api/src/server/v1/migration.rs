//! `/v1/migration`: the VM goes on under another monitor, or comes from there.
//!
//! ```text
//!  POST /v1/migration ──────────── … ──────────────► 200, the report: the VM runs at the destination
//!       GET /v1/migration ──► how far it is
//!       DELETE /v1/migration ──► it is cancelled, and refused to whoever asked for it
//!  PUT /v1/migration/receive ───── … ──────────────► 204: a VM has arrived, and runs here
//!  PUT /v1/migration/reclaim ──► it is here again, where nobody knew whether it arrived
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use cutover_migration::options::{BANDWIDTH_MIN, Compression, Options, PostCopy, STREAMS_MAX};
use cutover_migration::report::{Downtime, PageCounts, Report, RoundReport};
use cutover_migration::status::{Phase, Progress};
use cutover_migration::transport::Endpoint;
use cutover_vmm::Request;
use cutover_vmm::migration::{MigrateRequest, MigratedDisks, ReceiveRequest};
use cutover_vmm::snapshot::NetOverride;

use super::types::{
    DOWNTIME_MAX_MS, DowntimeV1, Fault, MigrationCompressionV1, MigrationDisksV1, MigrationPhaseV1,
    MigrationProgressV1, MigrationReportV1, MigrationStatusV1, MigrationV1, PageCountsV1, PostCopyV1, ReceptionV1,
    RoundV1,
};
use crate::server::firecracker::rejection::Rejection;
use crate::server::http::{Changed, Failure, Json, Outcome, Refused, json};
use crate::server::instance::Instance;

/// Has the VM go on under another monitor, which waits for it.
///
/// The answer comes when it runs there, which may take minutes; then this process ends. Whether or not the client waits,
/// it is done, and `migration_*` events tell of it. There is one at a time. Until the VM is handed over, whatever fails,
/// it goes on here.
#[utoipa::path(
    post, path = "/v1/migration", operation_id = "postMigration", tag = "cutover",
    request_body = MigrationV1,
    responses(
        (status = 200, body = MigrationReportV1, description = "It runs at the destination"),
        (status = 408, body = Fault, description = "The body did not arrive in time"),
        (status = 413, body = Fault, description = "The body is too long"),
        (status = 504, body = Fault, description = "It was handed over, and is lost or not known to run there"),
        Refused
    )
)]
pub async fn post(State(instance): State<Arc<Instance>>, Json(body): Json<MigrationV1>) -> Result<Response, Failure> {
    let report = instance.migrate(body.try_into()?).await?;
    Ok(json(&MigrationReportV1::from(&report)))
}

/// How far the migration is that is under way, from here or to here, and what came of the last one.
#[utoipa::path(
    get, path = "/v1/migration", operation_id = "getMigration", tag = "cutover",
    responses((status = 200, body = MigrationStatusV1), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    Ok(json(&instance.migration().await?))
}

/// Cancels the migration that is under way, from here or to here; the guest goes on at the source, and does not notice.
/// Refused once the VM is handed over.
#[utoipa::path(
    delete,
    path = "/v1/migration",
    operation_id = "cancelMigration",
    tag = "cutover",
    responses(Changed)
)]
pub async fn cancel(State(instance): State<Arc<Instance>>) -> Outcome {
    instance.cancel_migration().await
}

/// Waits for a VM that another monitor sends, and runs it. Before the start only, and instead of it.
///
/// The answer comes when the VM runs here, or if it does not come; then another can be waited for. `DELETE /v1/migration`
/// gives up.
#[utoipa::path(
    put, path = "/v1/migration/receive", operation_id = "putReception", tag = "cutover",
    request_body = ReceptionV1, responses(Changed)
)]
pub async fn receive(State(instance): State<Arc<Instance>>, Json(body): Json<ReceptionV1>) -> Outcome {
    instance.receive(body.try_into()?).await
}

/// Has a VM back that was handed over to another monitor and is not known to run there; it is paused then.
///
/// Whoever asks has made certain that it does not run there: two of it would ruin its disks.
#[utoipa::path(
    put,
    path = "/v1/migration/reclaim",
    operation_id = "reclaimVm",
    tag = "cutover",
    responses(Changed)
)]
pub async fn reclaim(State(instance): State<Arc<Instance>>) -> Outcome {
    instance.request(Request::Reclaim).await
}

/// The endpoint that `text` says, and where the certificate is that it takes.
pub(super) fn endpoint(
    text: &str,
    insecure: bool,
    tls_dir: Option<&str>,
) -> Result<(Endpoint, Option<PathBuf>), Rejection> {
    let endpoint: Endpoint = text.parse()?;
    if matches!(endpoint, Endpoint::Tcp(_)) && !insecure {
        return Err(Rejection::Insecure(endpoint));
    }
    let tls = match (&endpoint, tls_dir) {
        (Endpoint::Tls(_), None) => return Err(Rejection::Missing("tls_dir")),
        (Endpoint::Tls(_), Some(dir)) => Some(PathBuf::from(dir)),
        (Endpoint::Tcp(_) | Endpoint::Unix(_), _) => None,
    };
    Ok((endpoint, tls))
}

fn check(field: &'static str, given: u64, min: u64, max: u64) -> Result<(), Rejection> {
    if (min..=max).contains(&given) {
        return Ok(());
    }
    Err(Rejection::OutOfRange { field, given, min, max })
}

impl TryFrom<MigrationV1> for MigrateRequest {
    type Error = Rejection;

    fn try_from(body: MigrationV1) -> Result<Self, Rejection> {
        check("downtime_ms", body.downtime_ms, 1, DOWNTIME_MAX_MS)?;
        check("streams", body.streams.into(), 1, STREAMS_MAX.into())?;
        check("bandwidth", body.bandwidth.unwrap_or(u64::MAX), BANDWIDTH_MIN, u64::MAX)?;
        let (to, tls) = endpoint(&body.to, body.insecure, body.tls_dir.as_deref())?;
        Ok(Self {
            to,
            tls,
            options: Options {
                downtime: Duration::from_millis(body.downtime_ms),
                bandwidth: body.bandwidth,
                streams: body.streams,
                post_copy: match body.post_copy {
                    PostCopyV1::Never => PostCopy::Never,
                    PostCopyV1::Allow => PostCopy::LastResort,
                    PostCopyV1::Now => PostCopy::Always,
                },
                throttle: body.throttle,
                compression: match body.compression {
                    MigrationCompressionV1::Auto => Compression::Auto,
                    MigrationCompressionV1::Never => Compression::Never,
                    MigrationCompressionV1::Always => Compression::Always,
                },
                ..Options::default()
            },
            disks: match body.disks {
                MigrationDisksV1::Shared => MigratedDisks::Shared,
                MigrationDisksV1::Move => MigratedDisks::Moved,
            },
        })
    }
}

impl TryFrom<ReceptionV1> for ReceiveRequest {
    type Error = Rejection;

    fn try_from(body: ReceptionV1) -> Result<Self, Rejection> {
        let (listen, tls) = endpoint(&body.listen, body.insecure, body.tls_dir.as_deref())?;
        let net = |tap| NetOverride {
            tap: Some(tap),
            mac: None,
        };
        let disks = body.disks.into_iter();
        Ok(Self {
            listen,
            tls,
            name: None,
            nets: body.taps.into_iter().map(|(id, tap)| (id, net(tap))).collect(),
            disks: disks.map(|(id, path)| (id, PathBuf::from(path))).collect(),
            disks_dir: body.disks_dir.map(PathBuf::from),
            vsock: body.vsock_uds.map(PathBuf::from),
            serial: Default::default(),
        })
    }
}

impl From<Progress> for MigrationProgressV1 {
    fn from(progress: Progress) -> Self {
        Self {
            phase: match progress.phase {
                Phase::Connecting => MigrationPhaseV1::Connecting,
                Phase::Reserving => MigrationPhaseV1::Reserving,
                Phase::PreCopy => MigrationPhaseV1::PreCopy,
                Phase::Stopping => MigrationPhaseV1::Stopping,
                Phase::HandedOver => MigrationPhaseV1::HandedOver,
                Phase::PostCopy => MigrationPhaseV1::PostCopy,
                Phase::Done => MigrationPhaseV1::Done,
            },
            round: progress.round,
            pages_sent: progress.pages_sent,
            pages_left: progress.pages_left,
            bytes_sent: progress.bytes_sent,
            bytes_per_second: progress.bytes_per_second,
            dirty_pages_per_second: progress.dirty_pages_per_second,
            expected_downtime_ns: progress.expected_downtime.map(nanoseconds),
            throttle_percent: progress.throttle,
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl From<&Report> for MigrationReportV1 {
    fn from(report: &Report) -> Self {
        Self {
            preparation_ns: report.preparation_ns,
            downtime: report.downtime.into(),
            resume_ns: report.resume_ns,
            total_ns: report.total_ns,
            wire_bytes: report.wire_bytes,
            pages: report.pages.into(),
            duplicate_pages: report.duplicate_pages,
            deferred_pages_saved: report.deferred_pages_saved,
            pages_pulled: report.pages_pulled,
            pull_ns_max: report.pull_ns_max,
            throttle_percent_max: report.throttle_percent_max,
            throttled_ns: report.throttled_ns,
            rounds: report.rounds.iter().copied().map(RoundV1::from).collect(),
        }
    }
}

impl From<Downtime> for DowntimeV1 {
    fn from(downtime: Downtime) -> Self {
        Self {
            total_ns: downtime.total_ns,
            stop_ns: downtime.stop_ns,
            pages_ns: downtime.pages_ns,
            state_ns: downtime.state_ns,
            handoff_ns: downtime.handoff_ns,
        }
    }
}

impl From<RoundReport> for RoundV1 {
    fn from(round: RoundReport) -> Self {
        Self {
            took_ns: round.took_ns,
            pages: round.pages.into(),
            wire_bytes: round.wire_bytes,
            deferred_pages: round.deferred_pages,
            dirtied_pages: round.dirtied_pages,
            throttle_percent: round.throttle_percent,
        }
    }
}

impl From<PageCounts> for PageCountsV1 {
    fn from(pages: PageCounts) -> Self {
        Self {
            zero: pages.zero,
            unchanged: pages.unchanged,
            delta: pages.delta,
            compressed: pages.compressed,
            raw: pages.raw,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<MigrateRequest, Rejection> {
        serde_json::from_str::<MigrationV1>(json).expect("valid").try_into()
    }

    #[test]
    fn an_endpoint_is_enough_and_the_rest_is_as_documented() {
        let request = read(r#"{"to":"unix:/run/vm.sock"}"#).expect("valid");
        let expected = MigrateRequest {
            to: Endpoint::Unix("/run/vm.sock".into()),
            tls: None,
            options: Options {
                downtime: Duration::from_millis(30),
                bandwidth: None,
                streams: 1,
                post_copy: PostCopy::Never,
                throttle: true,
                compression: Compression::Auto,
                ..Options::default()
            },
            disks: MigratedDisks::Shared,
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn every_field_is_read() {
        let request = read(
            r#"{"to":"tls://h:1","downtime_ms":5,"bandwidth":70000,"streams":16,"post_copy":"now","throttle":false,
                "compression":"never","disks":"move","tls_dir":"/tls"}"#,
        )
        .expect("valid");
        let Options {
            downtime,
            bandwidth,
            streams,
            post_copy,
            throttle,
            compression,
            ..
        } = request.options;
        assert_eq!(
            (downtime, bandwidth, streams),
            (Duration::from_millis(5), Some(70_000), 16)
        );
        assert_eq!(
            (post_copy, throttle, compression, request.disks),
            (PostCopy::Always, false, Compression::Never, MigratedDisks::Moved)
        );
        assert!(request.tls == Some("/tls".into()));
        let plain = read(r#"{"to":"tcp://h:1","insecure":true,"post_copy":"allow"}"#).expect("allowed");
        assert_eq!((plain.tls, plain.options.post_copy), (None, PostCopy::LastResort));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_field() {
        for (json, reason) in [
            (r#"{"to":"h:1"}"#, "'h:1' is not an endpoint"),
            (r#"{"to":"tls://h:1"}"#, "tls_dir is missing"),
            (r#"{"to":"tcp://h:1"}"#, "use tls://, or set insecure"),
            (
                r#"{"to":"unix:a","downtime_ms":0}"#,
                "downtime_ms: 0 is out of range: it is 1 to 60000",
            ),
            (
                r#"{"to":"unix:a","streams":17}"#,
                "streams: 17 is out of range: it is 1 to 16",
            ),
            (r#"{"to":"unix:a","bandwidth":0}"#, "bandwidth: 0 is out of range"),
        ] {
            let error = read(json).expect_err(json).to_string();
            assert!(error.contains(reason), "{json}: {error}");
        }
    }

    #[test]
    fn a_reception_takes_other_taps_and_files() {
        let body: ReceptionV1 = serde_json::from_str(
            r#"{"listen":"unix:/a","taps":{"net0":"t1"},"disks":{"root":"b.img"},"disks_dir":"d"}"#,
        )
        .expect("valid");
        let request = ReceiveRequest::try_from(body).expect("valid");
        assert_eq!(request.nets["net0"].tap.as_deref(), Some("t1"));
        assert_eq!(request.disks["root"], PathBuf::from("b.img"));
        assert_eq!(request.disks_dir, Some("d".into()));
    }
}
