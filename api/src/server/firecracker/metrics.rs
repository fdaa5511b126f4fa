//! `/metrics`: the file that metrics are written to in Firecracker's form.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::setup::Change;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfiguration {
    /// File or named pipe that metrics are appended to, a JSON object a line.
    pub metrics_path: String,
    /// Whether each line has the id of the VM.
    #[serde(default)]
    pub emit_id: bool,
    /// What each line has under `properties`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

/// Has metrics written to a file. Once, and before the start only.
#[utoipa::path(
    put, path = "/metrics", operation_id = "putMetrics", tag = "firecracker",
    request_body = MetricsConfiguration, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<MetricsConfiguration>) -> Outcome {
    instance.configure(Change::Metrics(body))
}
