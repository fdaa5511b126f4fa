//! `/v1/restore`: a VM from a snapshot, in a process that has no VM yet.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_snapshot::spec::SerialSpec;
use cutover_vmm::snapshot::{ClockPolicy, NetOverride, RestoreRequest, Source, Trust};

use super::types::{ClockV1, NetOverrideV1, ProgressV1, RestoreV1, TrustV1};
use crate::server::firecracker::rejection::Rejection;
use crate::server::http::{Changed, Failure, Json, Outcome, Refused, json};
use crate::server::instance::Instance;

/// Makes a VM of a snapshot, and runs it. Before the start only, and instead of it.
///
/// The answer says that everything that can be verified beforehand is as it should be, and that the VM is there; its
/// memory and disks may still be on their way behind the running guest, of which a `restore_finished` event tells.
#[utoipa::path(
    put, path = "/v1/restore", operation_id = "putRestore", tag = "cutover",
    request_body = RestoreV1, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<RestoreV1>) -> Outcome {
    instance.restore(body.try_into()?).await
}

/// How much of the restored VM's memory and disks is there.
#[utoipa::path(
    get, path = "/v1/restore", operation_id = "getRestoreProgress", tag = "cutover",
    responses((status = 200, body = ProgressV1), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    let progress = instance.restore_progress().await?;
    Ok(json(&ProgressV1 {
        under_way: progress.done < progress.total,
        ..ProgressV1::of_work(progress)
    }))
}

impl TryFrom<RestoreV1> for RestoreRequest {
    type Error = Rejection;

    fn try_from(body: RestoreV1) -> Result<Self, Rejection> {
        let nets = body.nets.into_iter().map(|(id, net)| Ok((id, net.try_into()?)));
        Ok(Self {
            source: Source::Snapshot(body.snapshot.into()),
            endpoints: body.endpoints,
            trust: body.trust.into(),
            clock: body.clock.into(),
            name: None,
            nets: nets.collect::<Result<_, Rejection>>()?,
            disks: body
                .disks
                .into_iter()
                .map(|(id, path)| (id, PathBuf::from(path)))
                .collect(),
            disks_dir: body.disks_dir.map(PathBuf::from),
            vsock: body.vsock_uds.map(PathBuf::from),
            replace_disks: body.replace_disks,
            serial: SerialSpec::default(),
            hugepages: body.hugepages,
            track: body.track,
            paused: body.paused,
        })
    }
}

impl From<TrustV1> for Trust {
    fn from(trust: TrustV1) -> Self {
        match trust {
            TrustV1::VerifyOnRead => Self::VerifyOnRead,
            TrustV1::VerifyFirst => Self::VerifyFirst,
            TrustV1::Trusted => Self::Trusted,
        }
    }
}

impl From<ClockV1> for ClockPolicy {
    fn from(clock: ClockV1) -> Self {
        match clock {
            ClockV1::Corrected => Self::Corrected,
            ClockV1::Stopped => Self::Stopped,
        }
    }
}

impl TryFrom<NetOverrideV1> for NetOverride {
    type Error = Rejection;

    fn try_from(net: NetOverrideV1) -> Result<Self, Rejection> {
        Ok(Self {
            tap: net.tap,
            mac: net.mac.map(|mac| mac.parse()).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<RestoreRequest, Rejection> {
        serde_json::from_str::<RestoreV1>(json).expect("valid").try_into()
    }

    #[test]
    fn a_path_is_enough_and_then_nothing_is_trusted_and_time_has_passed() {
        let request = read(r#"{"snapshot":"store/monday"}"#).expect("valid");
        assert_eq!(request.source, Source::Snapshot("store/monday".into()));
        assert_eq!(
            (request.trust, request.clock),
            (Trust::VerifyOnRead, ClockPolicy::Corrected)
        );
        assert!(!request.track && !request.paused && !request.replace_disks);
        assert!(request.nets.is_empty() && request.disks.is_empty() && request.endpoints.is_empty());
        assert_eq!((request.hugepages, request.disks_dir), (None, None));
    }

    #[test]
    fn everything_that_can_be_different_is_read() {
        let request = read(
            r#"{"snapshot":"s","endpoints":["http://a:1","https://b"],"trust":"trusted","clock":"stopped","nets":{"eth0":{"tap":"t1"},
                "eth1":{"mac":"02:00:00:00:00:07"}},"disks":{"root":"a.img"},"disks_dir":"d",
                "replace_disks":true,"vsock_uds":"v","hugepages":false,"track":true,"paused":true}"#,
        )
        .expect("valid");
        assert_eq!((request.trust, request.clock), (Trust::Trusted, ClockPolicy::Stopped));
        assert_eq!(request.endpoints, ["http://a:1", "https://b"]);
        assert_eq!(request.nets["eth0"].tap.as_deref(), Some("t1"));
        assert_eq!(request.nets["eth1"].mac.map(|mac| mac.0[5]), Some(7));
        assert_eq!(request.disks["root"], PathBuf::from("a.img"));
        assert_eq!((request.hugepages, request.disks_dir), (Some(false), Some("d".into())));
        assert_eq!(request.vsock, Some("v".into()));
        assert!(request.replace_disks && request.track && request.paused);
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let error = read(r#"{"snapshot":"s","nets":{"eth0":{"mac":"01:00:00:00:00:00"}}}"#).expect_err("multicast");
        assert!(error.to_string().contains("is not a unicast MAC address"), "{error}");
    }
}
