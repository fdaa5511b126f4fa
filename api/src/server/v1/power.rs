//! `/v1/power`: shut down, reboot, cycle, destroy.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use cutover_vmm::Request;

use super::types::{POWER_TIMEOUT_DEFAULT_MS, POWER_TIMEOUT_MAX_MS, PowerAction, PowerRequest};
use crate::server::firecracker::rejection::Rejection;
use crate::server::http::{Changed, Json, Outcome};
use crate::server::instance::Instance;

/// Shuts the guest down, reboots it, or does either by force.
///
/// The answer says that it has begun; `/v1/events` tells how it goes on.
#[utoipa::path(
    put, path = "/v1/power", operation_id = "putPower", tag = "cutover",
    request_body = PowerRequest, responses(Changed)
)]
pub async fn put(State(instance): State<Arc<Instance>>, Json(body): Json<PowerRequest>) -> Outcome {
    instance.request(request(&body)?).await
}

fn request(body: &PowerRequest) -> Result<Request, Rejection> {
    let timeout_ms = body.timeout_ms.unwrap_or(POWER_TIMEOUT_DEFAULT_MS);
    if timeout_ms > POWER_TIMEOUT_MAX_MS {
        return Err(Rejection::PowerTimeout(timeout_ms));
    }
    let timeout = Duration::from_millis(timeout_ms);
    let request = match body.action {
        PowerAction::Shutdown => Request::Shutdown { timeout },
        PowerAction::Reboot => Request::Reboot { timeout },
        PowerAction::Cycle | PowerAction::Destroy if body.timeout_ms.is_some() => {
            return Err(Rejection::NoPowerTimeout);
        }
        PowerAction::Cycle => Request::Cycle,
        PowerAction::Destroy => Request::Destroy,
    };
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Request, Rejection> {
        request(&serde_json::from_str(json).expect("valid"))
    }

    #[test]
    fn a_guest_has_half_a_minute_to_power_down_unless_the_request_says_otherwise() {
        let half_a_minute = Duration::from_secs(30);
        assert_eq!(
            read(r#"{"action":"shutdown"}"#),
            Ok(Request::Shutdown { timeout: half_a_minute })
        );
        let one_second = Duration::from_secs(1);
        assert_eq!(
            read(r#"{"action":"reboot","timeout_ms":1000}"#),
            Ok(Request::Reboot { timeout: one_second })
        );
    }

    #[test]
    fn force_takes_no_time() {
        assert_eq!(read(r#"{"action":"cycle"}"#), Ok(Request::Cycle));
        assert_eq!(read(r#"{"action":"destroy"}"#), Ok(Request::Destroy));
        assert_eq!(
            read(r#"{"action":"destroy","timeout_ms":5}"#),
            Err(Rejection::NoPowerTimeout)
        );
    }

    #[test]
    fn more_than_a_day_is_refused() {
        let json = r#"{"action":"shutdown","timeout_ms":86400001}"#;
        assert_eq!(read(json), Err(Rejection::PowerTimeout(86_400_001)));
    }
}
