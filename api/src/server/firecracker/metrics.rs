//! `/metrics`: the file that metrics are written to in Firecracker's form.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};
use utoipa::ToSchema;

use super::setup::Change;
use crate::metrics::firecracker::{Extras, MetricsError, MetricsFile, PERIOD};
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

impl MetricsConfiguration {
    /// Opens the file for the metrics of the VM called `id`.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(&self, id: &str) -> Result<MetricsFile, MetricsError> {
        let extras = Extras {
            id: self.emit_id.then(|| id.to_owned()),
            properties: self.properties.clone(),
        };
        MetricsFile::open(self.metrics_path.as_ref(), extras)
    }
}

/// Writes the metrics of `instance`, from the start of its VM on, at regular intervals, if they have a file.
pub async fn write_regularly(instance: Arc<Instance>) {
    instance.wait_for_start().await;
    // From then on none can be configured.
    if !instance.has_metrics_file() {
        return;
    }
    let mut clock = interval(PERIOD);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        clock.tick().await;
        if let Err(error) = instance.flush_metrics().await {
            tracing::warn!(%error, "metrics are not written");
        }
    }
}

/// Has metrics written to a file. Once, and before the start only.
#[utoipa::path(
    put, path = "/metrics", operation_id = "putMetrics", tag = "firecracker",
    request_body = MetricsConfiguration, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<MetricsConfiguration>) -> Outcome {
    instance.configure(Change::Metrics(body))
}
