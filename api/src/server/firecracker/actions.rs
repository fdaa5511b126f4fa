//! `/actions`: start the VM, press its power button, write its metrics.

use std::sync::Arc;

use axum::extract::State;
use cutover_vmm::Request;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceAction {
    /// What to do.
    pub action_type: ActionType,
}

/// What can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum ActionType {
    /// Build the VM as it is configured, and run it.
    InstanceStart,
    /// Ask the guest to shut down. Where Firecracker presses Ctrl, Alt and Del, this presses the ACPI power button,
    /// which is what the guests of this monitor have.
    SendCtrlAltDel,
    /// Write the metrics now.
    FlushMetrics,
}

/// Starts the VM, asks its guest to shut down, or writes its metrics.
#[utoipa::path(
    put, path = "/actions", operation_id = "createSyncAction", tag = "firecracker",
    request_body = InstanceAction, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<InstanceAction>) -> Outcome {
    match body.action_type {
        ActionType::InstanceStart => instance.start().await,
        ActionType::SendCtrlAltDel => instance.request(Request::PressPowerButton).await,
        ActionType::FlushMetrics => instance.flush_metrics().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_those_of_firecracker_and_no_others() {
        for (json, action) in [
            (r#"{"action_type":"InstanceStart"}"#, ActionType::InstanceStart),
            (r#"{"action_type":"SendCtrlAltDel"}"#, ActionType::SendCtrlAltDel),
            (r#"{"action_type":"FlushMetrics"}"#, ActionType::FlushMetrics),
        ] {
            let body: InstanceAction = serde_json::from_str(json).expect(json);
            assert_eq!(body.action_type, action);
        }
        for json in [
            r#"{"action_type":"Halt"}"#,
            r#"{"action_type":"InstanceStart","payload":1}"#,
            "{}",
        ] {
            assert!(serde_json::from_str::<InstanceAction>(json).is_err(), "{json}");
        }
    }
}
