//! `/balloon`, `/balloon/statistics`: the memory balloon, what it is asked for while the VM runs, and what it tells.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_devices::virtio::balloon::{Statistics, Tag};
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::BalloonSpec;
use cutover_vmm::BalloonUpdate;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rejection::Rejection;
use super::setup::Change;
use crate::server::http::{Changed, Failure, Json, Outcome, Refused, json};
use crate::server::instance::Instance;

/// Body of `PUT /balloon`, and answer to `GET`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonDevice {
    /// How many MiB the guest is asked for, at most all of its memory.
    pub amount_mib: u32,
    /// The guest may take memory out of the balloon before it is out of it.
    pub deflate_on_oom: bool,
    /// Every how many seconds the guest tells of its memory; never if 0, and then not later either.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest reports memory that it does not use, without being asked.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Not supported: only `false`.
    #[serde(default)]
    pub free_page_hinting: bool,
}

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// How many MiB the guest is asked for, at most all of its memory.
    pub amount_mib: u32,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsPatch {
    /// Every how many seconds the guest tells of its memory, for the first time at once.
    pub stats_polling_interval_s: u16,
}

/// Answer to `GET /balloon/statistics`. What the guest has not told is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonStatistics {
    /// Pages of 4 KiB that the guest is asked for.
    pub target_pages: u32,
    /// Those that are in the balloon.
    pub actual_pages: u32,
    /// The same in whole MiB.
    pub target_mib: u32,
    /// The same in whole MiB.
    pub actual_mib: u32,
    /// Bytes that were swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes that were swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that had to wait for a disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that had not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// Bytes of all memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes that new programs can have without swapping, as the guest guesses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes that can be had at once, mostly of files that are on disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages that programs got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that they did not get.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Programs that were killed for want of memory. As the rest, of Linux since 6.12.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    /// Times that somebody had to wait for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    /// Memory looked at in the background, for what can be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    /// The same by whoever wanted memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    /// Memory that was had in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    /// The same by whoever wanted memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

impl BalloonDevice {
    /// The device that is asked for.
    pub fn spec(&self) -> BalloonSpec {
        BalloonSpec {
            amount: mib(self.amount_mib),
            deflate_on_oom: self.deflate_on_oom,
            stats_interval_s: self.stats_polling_interval_s,
            free_page_reporting: self.free_page_reporting,
        }
    }

    /// Whether there can be such a device; how much memory there is for it is known at the start.
    ///
    /// # Errors
    /// There cannot.
    pub fn check(&self) -> Result<(), Rejection> {
        match self.free_page_hinting {
            true => Err(Rejection::Unsupported("free_page_hinting: only reporting")),
            false => Ok(()),
        }
    }
}

impl From<&BalloonSpec> for BalloonDevice {
    fn from(spec: &BalloonSpec) -> Self {
        Self {
            amount_mib: u32::try_from(spec.amount.bytes() >> 20).unwrap_or(u32::MAX),
            deflate_on_oom: spec.deflate_on_oom,
            stats_polling_interval_s: spec.stats_interval_s,
            free_page_reporting: spec.free_page_reporting,
            free_page_hinting: false,
        }
    }
}

impl From<BalloonPatch> for BalloonUpdate {
    fn from(patch: BalloonPatch) -> Self {
        Self {
            amount: Some(mib(patch.amount_mib)),
            stats_interval_s: None,
        }
    }
}

impl From<BalloonStatisticsPatch> for BalloonUpdate {
    fn from(patch: BalloonStatisticsPatch) -> Self {
        Self {
            amount: None,
            stats_interval_s: Some(patch.stats_polling_interval_s),
        }
    }
}

impl From<Statistics> for BalloonStatistics {
    fn from(statistics: Statistics) -> Self {
        let told = |tag| statistics.guest.get(tag);
        Self {
            target_pages: statistics.target_pages,
            actual_pages: statistics.actual_pages,
            target_mib: statistics.target_mib(),
            actual_mib: statistics.actual_mib(),
            swap_in: told(Tag::SwapIn),
            swap_out: told(Tag::SwapOut),
            major_faults: told(Tag::MajorFaults),
            minor_faults: told(Tag::MinorFaults),
            free_memory: told(Tag::FreeMemory),
            total_memory: told(Tag::TotalMemory),
            available_memory: told(Tag::AvailableMemory),
            disk_caches: told(Tag::DiskCaches),
            hugetlb_allocations: told(Tag::HugetlbAllocations),
            hugetlb_failures: told(Tag::HugetlbFailures),
            oom_kill: told(Tag::OomKill),
            alloc_stall: told(Tag::AllocStall),
            async_scan: told(Tag::AsyncScan),
            direct_scan: told(Tag::DirectScan),
            async_reclaim: told(Tag::AsyncReclaim),
            direct_reclaim: told(Tag::DirectReclaim),
        }
    }
}

fn mib(count: u32) -> ByteSize {
    ByteSize::from_mib(count.into())
}

/// Gives the guest a balloon, or changes the one it is to have. Before the start only.
#[utoipa::path(
    put, path = "/balloon", operation_id = "putBalloon", tag = "firecracker",
    request_body = BalloonDevice, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<BalloonDevice>) -> Outcome {
    instance.configure(Change::Balloon(body))
}

/// Asks the guest for more memory, or for less. After the start only.
#[utoipa::path(
    patch, path = "/balloon", operation_id = "patchBalloon", tag = "firecracker",
    request_body = BalloonPatch, responses(Changed)
)]
pub async fn patch(State(instance): State<Arc<Instance>>, Json(body): Json<BalloonPatch>) -> Outcome {
    instance.update_balloon(body.into()).await
}

/// The balloon as it is configured.
#[utoipa::path(
    get, path = "/balloon", operation_id = "describeBalloonConfig", tag = "firecracker",
    responses((status = 200, body = BalloonDevice), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    let balloon = instance.configuration().balloon.ok_or(Rejection::NoBalloon)?;
    Ok(json(&balloon))
}

/// Has the guest tell of its memory more often, or less often. After the start only.
#[utoipa::path(
    patch, path = "/balloon/statistics", operation_id = "patchBalloonStatsInterval", tag = "firecracker",
    request_body = BalloonStatisticsPatch, responses(Changed)
)]
pub async fn patch_statistics(
    State(instance): State<Arc<Instance>>,
    Json(body): Json<BalloonStatisticsPatch>,
) -> Outcome {
    instance.update_balloon(body.into()).await
}

/// What the balloon has, and what the guest last told of its memory. After the start only.
#[utoipa::path(
    get, path = "/balloon/statistics", operation_id = "describeBalloonStats", tag = "firecracker",
    responses((status = 200, body = BalloonStatistics), Refused)
)]
pub async fn get_statistics(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    let statistics = instance.balloon_statistics().await?;
    Ok(json(&BalloonStatistics::from(statistics)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecrackers_body_is_a_device() {
        let json = r#"{"amount_mib":64,"deflate_on_oom":true,"stats_polling_interval_s":1,"free_page_reporting":true,
            "free_page_hinting":false}"#;
        let device: BalloonDevice = serde_json::from_str(json).expect("valid");
        assert_eq!(device.check(), Ok(()));
        let spec = BalloonSpec {
            amount: ByteSize::from_mib(64),
            deflate_on_oom: true,
            stats_interval_s: 1,
            free_page_reporting: true,
        };
        assert_eq!(device.spec(), spec);
        assert_eq!(BalloonDevice::from(&spec), device);
        let least: BalloonDevice = serde_json::from_str(r#"{"amount_mib":0,"deflate_on_oom":false}"#).expect("valid");
        assert_eq!(least, BalloonDevice::default());
    }

    #[test]
    fn hinting_is_refused_by_name() {
        let json = r#"{"amount_mib":0,"deflate_on_oom":false,"free_page_hinting":true}"#;
        let device: BalloonDevice = serde_json::from_str(json).expect("well-formed");
        let refused = device.check().expect_err("not there").to_string();
        assert!(refused.contains("free_page_hinting"), "{refused}");
    }

    #[test]
    fn what_the_guest_has_not_told_is_not_there() {
        let statistics = Statistics {
            target_pages: 512,
            actual_pages: 300,
            ..Statistics::default()
        };
        assert_eq!(
            serde_json::to_string(&BalloonStatistics::from(statistics)).expect("JSON"),
            r#"{"target_pages":512,"actual_pages":300,"target_mib":2,"actual_mib":1}"#
        );
    }
}
