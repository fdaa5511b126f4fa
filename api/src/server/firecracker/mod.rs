//! Firecracker's API: its paths, verbs, bodies and status codes, one resource a file.
//!
//! Compatible with `src/firecracker/swagger/firecracker.yaml` of Firecracker 1.17; `docs/api.md` lists the differences.
//! What is not supported is refused, never ignored.

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, patch, put};

use super::instance::Instance;

pub mod actions;
pub mod balloon;
pub mod boot_source;
pub mod config_file;
pub mod drives;
pub mod entropy;
pub mod instance_info;
pub mod logger;
pub mod machine_config;
pub mod metrics;
pub mod mmds;
pub mod network_interfaces;
pub mod rate_limiter;
pub mod rejection;
pub mod serial;
pub mod setup;
pub mod snapshot;
pub mod unsupported;
pub mod vm;
pub mod vsock;

/// Which handler serves which path.
pub fn routes() -> Router<Arc<Instance>> {
    let machine_config = get(machine_config::get)
        .put(machine_config::put)
        .patch(machine_config::patch);
    Router::new()
        .route("/", get(instance_info::get))
        .route("/actions", put(actions::put))
        .route("/balloon", get(balloon::get).put(balloon::put).patch(balloon::patch))
        .route(
            "/balloon/statistics",
            get(balloon::get_statistics).patch(balloon::patch_statistics),
        )
        .route("/boot-source", put(boot_source::put))
        .route("/drives/{drive_id}", put(drives::put).patch(drives::patch))
        .route("/entropy", put(entropy::put))
        .route("/logger", put(logger::put))
        .route("/machine-config", machine_config)
        .route("/metrics", put(metrics::put))
        .route("/mmds", get(mmds::get).put(mmds::put).patch(mmds::patch))
        .route("/mmds/config", put(mmds::configure))
        .route(
            "/network-interfaces/{iface_id}",
            put(network_interfaces::put).patch(network_interfaces::patch),
        )
        .route("/serial", put(serial::put))
        .route("/snapshot/create", put(snapshot::create))
        .route("/snapshot/load", put(snapshot::load))
        .route("/version", get(instance_info::version))
        .route("/vm", patch(vm::patch))
        .route("/vm/config", get(vm::config))
        .route("/vsock", put(vsock::put))
}
