//! `/v1/info`: which VM this is, and what it is doing.

use std::path::Path;
use std::sync::Arc;

use axum::extract;
use axum::response::Response;
use cutover_snapshot::spec::{DiskSpec, NetSpec, SerialSpec, TapSpec, VmSpec};
use cutover_vmm::State;

use super::types::{BalloonInfoV1, DiskInfoV1, InfoV1, NetInfoV1, SerialInfoV1, StateV1, VsockInfoV1};
use crate::server::http::{Failure, Refused, json};
use crate::server::instance::Instance;

/// Which VM this is, and what it is doing.
#[utoipa::path(
    get, path = "/v1/info", operation_id = "getInfo", tag = "cutover",
    responses((status = 200, body = InfoV1), Refused)
)]
pub async fn get(extract::State(instance): extract::State<Arc<Instance>>) -> Result<Response, Failure> {
    let state = match instance.state().await? {
        Some(state) => state.into(),
        None if instance.is_arriving() => StateV1::Arriving,
        None => StateV1::NotStarted,
    };
    let spec = instance.configuration().draft()?;
    Ok(json(&info(instance.id(), state, &spec, instance.last_event())))
}

fn info(id: &str, state: StateV1, spec: &VmSpec, last_event: u64) -> InfoV1 {
    let has_kernel = !spec.boot.kernel.as_os_str().is_empty();
    InfoV1 {
        id: id.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        state,
        cpus: spec.cpus,
        memory_bytes: spec.memory.size.bytes(),
        kernel: has_kernel.then(|| text(&spec.boot.kernel)),
        initrd: spec.boot.initrd.as_deref().map(text),
        cmdline: has_kernel.then(|| spec.boot.cmdline.clone()),
        disks: (0..)
            .zip(&spec.disks)
            .map(|(index, disk)| disk_info(disk, index))
            .collect(),
        nets: (0..).zip(&spec.nets).map(|(index, net)| net_info(net, index)).collect(),
        rng: spec.rng.is_some(),
        vsock: spec.vsock.as_ref().map(|vsock| VsockInfoV1 {
            cid: vsock.cid,
            uds: text(&vsock.uds),
        }),
        balloon: spec.balloon.as_ref().map(|balloon| BalloonInfoV1 {
            amount_bytes: balloon.amount.bytes(),
            free_page_reporting: balloon.free_page_reporting,
        }),
        serial: match &spec.serial {
            SerialSpec::Stdio => SerialInfoV1::Stdio,
            SerialSpec::File(path) => SerialInfoV1::File { path: text(path) },
            SerialSpec::Socket(path) => SerialInfoV1::Socket { path: text(path) },
            SerialSpec::Pty => SerialInfoV1::Pty,
            SerialSpec::Null => SerialInfoV1::Null,
        },
        last_event,
    }
}

fn disk_info(disk: &DiskSpec, index: usize) -> DiskInfoV1 {
    DiskInfoV1 {
        id: disk.id_at(index),
        path: text(&disk.path),
        readonly: disk.readonly,
    }
}

fn net_info(net: &NetSpec, index: usize) -> NetInfoV1 {
    NetInfoV1 {
        id: net.id_at(index),
        tap: match &net.tap {
            TapSpec::Name(name) if !name.is_empty() => Some(name.clone()),
            _ => None,
        },
        mac: net.mac.map(|mac| mac.to_string()),
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

impl From<State> for StateV1 {
    fn from(state: State) -> Self {
        match state {
            State::Built => Self::Built,
            State::Running => Self::Running,
            State::Paused => Self::Paused,
            State::ShuttingDown { .. } => Self::ShuttingDown,
            State::HandingOver { .. } => Self::HandingOver,
            State::HandedOver { .. } => Self::HandedOver,
            State::Fenced { .. } => Self::Fenced,
            State::RolledBack { .. } => Self::RolledBack,
            State::Ended => Self::Ended,
        }
    }
}
