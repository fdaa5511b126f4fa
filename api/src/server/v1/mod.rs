//! Our own part of the API, under `/v1`.

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post, put};

use super::instance::Instance;

pub mod dirty_rate;
pub mod events;
pub mod info;
pub mod metrics;
pub mod migration;
pub mod power;
pub mod protection;
pub mod restore;
pub mod snapshots;
pub mod stats;
pub mod types;

/// Which handler serves which path.
pub fn routes() -> Router<Arc<Instance>> {
    Router::new()
        .route("/v1/events", get(events::get))
        .route("/v1/info", get(info::get))
        .route("/v1/metrics", get(metrics::get))
        .route(
            "/v1/migration",
            get(migration::get).post(migration::post).delete(migration::cancel),
        )
        .route("/v1/migration/receive", put(migration::receive))
        .route("/v1/migration/reclaim", put(migration::reclaim))
        .route("/v1/power", put(power::put))
        .route("/v1/protection", get(protection::get).put(protection::put))
        .route("/v1/restore", get(restore::get).put(restore::put))
        .route("/v1/snapshots", post(snapshots::post))
        .route(
            "/v1/snapshots/current",
            get(snapshots::progress).delete(snapshots::cancel),
        )
        .route("/v1/stats", get(stats::get))
        .route("/v1/stats/dirty-rate", get(dirty_rate::get))
}
