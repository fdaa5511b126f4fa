//! `/v1/stats`: what the VM has done so far, in numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_devices::stats::{DiskStats, NetStats};
use cutover_vmm::VmStats;
use cutover_vmm::stats::{VcpuExits, VcpuStats};

use super::types::{CpuStatsV1, DiskStatsV1, MemoryStatsV1, NetStatsV1, StatsV1};
use crate::server::http::{Failure, Refused, json};
use crate::server::instance::Instance;

/// What the VM has done since it was built.
#[utoipa::path(
    get, path = "/v1/stats", operation_id = "getStats", tag = "cutover",
    responses((status = 200, body = StatsV1), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    Ok(json(&StatsV1::from(instance.stats().await?)))
}

impl From<VmStats> for StatsV1 {
    fn from(stats: VmStats) -> Self {
        Self {
            state: stats.state.into(),
            boots: stats.boots,
            uptime_ns: stats.uptime_ns,
            cpus: stats.vcpus.into_iter().map(Into::into).collect(),
            memory: MemoryStatsV1 {
                size_bytes: stats.memory.size_bytes,
                resident_bytes: stats.memory.resident_bytes,
            },
            disks: stats.devices.disks.into_iter().map(Into::into).collect(),
            nets: stats.devices.nets.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<VcpuStats> for CpuStatsV1 {
    fn from(vcpu: VcpuStats) -> Self {
        Self {
            cpu: vcpu.cpu,
            time_ns: vcpu.cpu_time_ns,
            exits: exits(vcpu.exits),
        }
    }
}

impl From<DiskStats> for DiskStatsV1 {
    fn from(disk: DiskStats) -> Self {
        Self {
            id: disk.id,
            reads: disk.reads,
            writes: disk.writes,
            flushes: disk.flushes,
            discards: disk.discards,
            read_bytes: disk.read_bytes,
            written_bytes: disk.written_bytes,
            failed: disk.failed,
            throttled: disk.throttled,
        }
    }
}

impl From<NetStats> for NetStatsV1 {
    fn from(net: NetStats) -> Self {
        Self {
            id: net.id,
            rx_frames: net.rx_frames,
            rx_bytes: net.rx_bytes,
            tx_frames: net.tx_frames,
            tx_bytes: net.tx_bytes,
            tx_dropped: net.tx_dropped,
            rx_throttled: net.rx_throttled,
            tx_throttled: net.tx_throttled,
        }
    }
}

/// Exits by the names that clients see.
fn exits(exits: VcpuExits) -> BTreeMap<String, u64> {
    let VcpuExits {
        io_in,
        io_out,
        mmio_read,
        mmio_write,
        interrupted,
        failed,
    } = exits;
    [
        ("io_in", io_in),
        ("io_out", io_out),
        ("mmio_read", mmio_read),
        ("mmio_write", mmio_write),
        ("interrupted", interrupted),
        ("failed", failed),
    ]
    .map(|(name, count)| (name.to_owned(), count))
    .into()
}
