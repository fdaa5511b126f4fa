//! `/` and `/version`: what runs here.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_vmm::State as VmState;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::server::http::{Failure, Refused, json};
use crate::server::instance::Instance;

/// Version of Firecracker whose API this is.
pub const FIRECRACKER_VERSION: &str = "1.17.0";

/// Answer of `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceInfo {
    /// Name of the monitor.
    pub app_name: String,
    /// What `--id` said.
    pub id: String,
    /// What the VM is doing.
    pub state: InstanceState,
    /// Version of the monitor.
    pub vmm_version: String,
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum InstanceState {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
}

/// Answer of `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FirecrackerVersion {
    /// Version of Firecracker whose API this is.
    pub firecracker_version: String,
}

/// What runs here, and what it is doing.
#[utoipa::path(
    get, path = "/", operation_id = "describeInstance", tag = "firecracker",
    responses((status = 200, body = InstanceInfo), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    let state = match instance.state().await? {
        None => InstanceState::NotStarted,
        Some(
            VmState::Paused
            | VmState::HandingOver { .. }
            | VmState::HandedOver { .. }
            | VmState::Fenced { .. }
            | VmState::RolledBack { .. },
        ) => InstanceState::Paused,
        Some(_) => InstanceState::Running,
    };
    Ok(json(&InstanceInfo {
        app_name: "Cutover".to_owned(),
        id: instance.id().to_owned(),
        state,
        vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
    }))
}

/// Version of Firecracker whose API this is.
#[utoipa::path(
    get, path = "/version", operation_id = "getFirecrackerVersion", tag = "firecracker",
    responses((status = 200, body = FirecrackerVersion), Refused)
)]
pub async fn version() -> Response {
    json(&FirecrackerVersion {
        firecracker_version: FIRECRACKER_VERSION.to_owned(),
    })
}
