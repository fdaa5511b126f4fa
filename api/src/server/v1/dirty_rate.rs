//! `/v1/stats/dirty-rate`: how fast the guest changes its memory. Apart from the other statistics because watching it has
//! a price.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use cutover_vmm::dirty::DirtyRate;

use super::types::DirtyRateV1;
use crate::server::http::{Failure, Refused, json};
use crate::server::instance::Instance;

/// How fast the guest has changed its memory since this was last asked.
///
/// The first answer is of no time: from then on the guest is watched, which makes it slower, until nobody has asked for a
/// minute.
#[utoipa::path(
    get, path = "/v1/stats/dirty-rate", operation_id = "getDirtyRate", tag = "cutover",
    responses((status = 200, body = DirtyRateV1), Refused)
)]
pub async fn get(State(instance): State<Arc<Instance>>) -> Result<Response, Failure> {
    Ok(json(&DirtyRateV1::from(instance.dirty_rate().await?)))
}

impl From<DirtyRate> for DirtyRateV1 {
    fn from(rate: DirtyRate) -> Self {
        Self {
            interval_ns: u64::try_from(rate.interval.as_nanos()).unwrap_or(u64::MAX),
            pages: rate.pages,
            pages_per_second: rate.pages_per_second(),
            bytes_per_second: rate.bytes_per_second(),
        }
    }
}
