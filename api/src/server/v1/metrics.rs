//! `/v1/metrics`: what the VM has done so far, for Prometheus.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use crate::metrics::prometheus;
use crate::server::http::{Failure, Refused};
use crate::server::instance::Instance;

/// What the VM has done since it was built, in Prometheus's text format.
#[utoipa::path(
    get, path = "/v1/metrics", operation_id = "getMetrics", tag = "cutover",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    let text = instance.prometheus().await?;
    let content_type = HeaderValue::from_static(prometheus::CONTENT_TYPE);
    Ok(([(CONTENT_TYPE, content_type)], text).into_response())
}
