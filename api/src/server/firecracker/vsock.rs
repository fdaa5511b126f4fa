//! `/vsock`: the socket device.

use std::sync::Arc;

use axum::extract::State;
use cutover_snapshot::spec::VsockSpec;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rejection::Rejection;
use super::setup::Change;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockDevice {
    /// The guest's address.
    #[schema(minimum = 3)]
    pub guest_cid: u32,
    /// Unix socket that is created for connections to the guest. For the guest's own connections to a port, somebody
    /// listens at this path with `_PORT` appended.
    pub uds_path: String,
    /// Means nothing any more; still read.
    #[serde(default, skip_serializing)]
    #[schema(deprecated)]
    pub vsock_id: Option<String>,
}

impl VsockDevice {
    /// The device that is asked for.
    pub fn spec(&self) -> VsockSpec {
        VsockSpec {
            cid: self.guest_cid,
            uds: self.uds_path.clone().into(),
        }
    }

    /// Whether there can be such a device.
    ///
    /// # Errors
    /// There cannot.
    pub fn check(&self) -> Result<(), Rejection> {
        Ok(self.spec().check()?)
    }
}

impl From<&VsockSpec> for VsockDevice {
    fn from(spec: &VsockSpec) -> Self {
        Self {
            guest_cid: spec.cid,
            uds_path: spec.uds.display().to_string(),
            vsock_id: None,
        }
    }
}

/// Gives the guest a socket device, or changes the one it is to have. Before the start only.
#[utoipa::path(
    put, path = "/vsock", operation_id = "putGuestVsock", tag = "firecracker",
    request_body = VsockDevice, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<VsockDevice>) -> Outcome {
    instance.configure(Change::Vsock(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecrackers_body_is_a_device_with_and_without_the_field_that_means_nothing() {
        let json = r#"{"guest_cid":3,"uds_path":"./v.sock","vsock_id":"1"}"#;
        let device: VsockDevice = serde_json::from_str(json).expect("valid");
        let spec = VsockSpec {
            cid: 3,
            uds: "./v.sock".into(),
        };
        assert_eq!(device.spec(), spec);
        let written = serde_json::to_string(&VsockDevice::from(&spec)).expect("JSON");
        assert_eq!(written, r#"{"guest_cid":3,"uds_path":"./v.sock"}"#);
    }

    #[test]
    fn an_address_that_no_guest_can_have_is_refused() {
        let device: VsockDevice = serde_json::from_str(r#"{"guest_cid":2,"uds_path":"v"}"#).expect("well-formed");
        assert!(matches!(device.check(), Err(Rejection::Spec(_))));
    }
}
