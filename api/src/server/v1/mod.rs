//! Our own part of the API, under `/v1`.

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, put};

use super::instance::Instance;

pub mod dirty_rate;
pub mod events;
pub mod info;
pub mod metrics;
pub mod power;
pub mod stats;
pub mod types;

/// Which handler serves which path.
pub fn routes() -> Router<Arc<Instance>> {
    Router::new()
        .route("/v1/events", get(events::get))
        .route("/v1/info", get(info::get))
        .route("/v1/metrics", get(metrics::get))
        .route("/v1/power", put(power::put))
        .route("/v1/stats", get(stats::get))
        .route("/v1/stats/dirty-rate", get(dirty_rate::get))
}
