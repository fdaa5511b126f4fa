//! `/entropy`: the entropy device.

use std::sync::Arc;

use axum::extract::State;
use cutover_snapshot::spec::RngSpec;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rate_limiter::{RateLimiter, limiter, limits};
use super::setup::Change;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /entropy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EntropyDevice {
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

impl From<EntropyDevice> for RngSpec {
    fn from(device: EntropyDevice) -> Self {
        Self {
            rate_limiter: limits(device.rate_limiter),
        }
    }
}

impl From<RngSpec> for EntropyDevice {
    fn from(spec: RngSpec) -> Self {
        Self {
            rate_limiter: limiter(spec.rate_limiter),
        }
    }
}

/// Gives the guest an entropy device. Before the start only.
#[utoipa::path(
    put, path = "/entropy", operation_id = "putEntropyDevice", tag = "firecracker",
    request_body = EntropyDevice, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<EntropyDevice>) -> Outcome {
    instance.configure(Change::Entropy(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_body_is_a_device_without_limits() {
        let device: EntropyDevice = serde_json::from_str("{}").expect("valid");
        assert_eq!(RngSpec::from(device), RngSpec::default());
    }

    #[test]
    fn a_limiter_is_taken_over() {
        let json = r#"{"rate_limiter":{"bandwidth":{"size":1000,"refill_time":100}}}"#;
        let device: EntropyDevice = serde_json::from_str(json).expect("valid");
        let spec = RngSpec::from(device);
        assert_eq!(spec.rate_limiter.bandwidth.expect("a limit").size, 1000);
        assert_eq!(EntropyDevice::from(spec), device);
    }
}
