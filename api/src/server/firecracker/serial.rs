//! `/serial`: where the guest's serial console goes.

use std::sync::Arc;

use axum::extract::State;
use cutover_snapshot::spec::SerialSpec;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rate_limiter::TokenBucket;
use super::rejection::Rejection;
use super::setup::Change;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialDevice {
    /// File that the guest's output is appended to, instead of the monitor's standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<String>,
    /// Limit of the guest's output: not supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(ignore)]
    pub rate_limiter: Option<TokenBucket>,
}

impl SerialDevice {
    /// Whether the console can go there.
    ///
    /// # Errors
    /// It asks for what is not supported.
    pub fn check(&self) -> Result<(), Rejection> {
        match self.rate_limiter {
            Some(_) => Err(Rejection::Unsupported("rate_limiter of the serial console")),
            None => Ok(()),
        }
    }

    /// Where the console goes.
    pub fn spec(&self) -> SerialSpec {
        match &self.serial_out_path {
            Some(path) => SerialSpec::File(path.into()),
            None => SerialSpec::Stdio,
        }
    }
}

/// Says where the guest's console goes. Before the start only.
#[utoipa::path(
    put, path = "/serial", operation_id = "putSerialDevice", tag = "firecracker",
    request_body = SerialDevice, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<SerialDevice>) -> Outcome {
    instance.configure(Change::Serial(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_goes_to_the_standard_output_or_to_a_file() {
        assert_eq!(SerialDevice::default().spec(), SerialSpec::Stdio);
        let device: SerialDevice = serde_json::from_str(r#"{"serial_out_path":"out"}"#).expect("valid");
        assert_eq!(
            (device.check(), device.spec()),
            (Ok(()), SerialSpec::File("out".into()))
        );
    }

    #[test]
    fn a_limit_is_refused_because_it_would_not_hold() {
        let json = r#"{"rate_limiter":{"size":1,"refill_time":1}}"#;
        let device: SerialDevice = serde_json::from_str(json).expect("Firecracker's form");
        assert!(matches!(device.check(), Err(Rejection::Unsupported(_))));
    }
}
