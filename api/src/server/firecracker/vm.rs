//! `/vm`: pause and resume; `/vm/config`: everything that is configured.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_vmm::Request;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::server::http::{Changed, Json, Outcome, Refused, json};
use crate::server::instance::Instance;

use super::config_file::FullConfiguration;

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdate {
    /// What the VM is to do.
    pub state: VmTarget,
}

/// What a VM can be told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum VmTarget {
    /// Stand still.
    Paused,
    /// Go on.
    Resumed,
}

/// Pauses the VM, or has it go on. To ask for what it does already is no error.
#[utoipa::path(
    patch, path = "/vm", operation_id = "patchVm", tag = "firecracker",
    request_body = VmUpdate, responses(Changed)
)]
pub async fn patch(State(instance): State<Arc<Instance>>, Json(body): Json<VmUpdate>) -> Outcome {
    let request = match body.state {
        VmTarget::Paused => Request::Pause,
        VmTarget::Resumed => Request::Resume,
    };
    instance.reach(request).await
}

/// Everything that is configured, in the form of a configuration file.
#[utoipa::path(
    get, path = "/vm/config", operation_id = "getExportVmConfig", tag = "firecracker",
    responses((status = 200, body = FullConfiguration), Refused)
)]
pub async fn config(State(instance): State<Arc<Instance>>) -> Response {
    json(&FullConfiguration::from(instance.configuration()))
}
