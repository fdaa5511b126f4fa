//! `/openapi.json`: the description of this API, generated from the types of its bodies.
//!
//! What is served is `resources/openapi.json`, which a test keeps equal to what the types say: generating it takes
//! memory and time that no VM should spend. To write it anew: `UPDATE_OPENAPI=1 cargo test -p cutover-api openapi`.

use std::sync::Arc;

use axum::Router;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use utoipa::OpenApi;

use super::firecracker::{
    actions, balloon, boot_source, drives, entropy, instance_info, logger, machine_config, metrics, mmds,
    network_interfaces, serial, snapshot, vm, vsock,
};
use super::instance::Instance;
use super::v1::{self, dirty_rate, events, info, migration, power, protection, restore, snapshots, stats};

const DOCUMENT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/openapi.json"));

/// The API as the types describe it.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Cutover",
        description = "The API of one VM, on its Unix socket: Firecracker's, and Cutover's own under /v1."
    ),
    servers((url = "http://localhost", description = "The Unix socket of a VM")),
    tags(
        (name = "firecracker", description = "As in Firecracker's API"),
        (name = "cutover", description = "Cutover's own")
    ),
    paths(
        instance_info::get, instance_info::version, actions::put, balloon::put, balloon::patch,
        balloon::get, balloon::patch_statistics, balloon::get_statistics, boot_source::put, drives::put, drives::patch,
        entropy::put, logger::put, machine_config::get, machine_config::put, machine_config::patch, metrics::put,
        mmds::configure, mmds::put, mmds::patch, mmds::get, network_interfaces::put, network_interfaces::patch, serial::put, snapshot::create, snapshot::load, vm::patch,
        vm::config, vsock::put, events::get, info::get, v1::metrics::get, power::put, stats::get, dirty_rate::get,
        snapshots::post, snapshots::progress, snapshots::cancel, restore::put, restore::get, migration::post,
        migration::get, migration::cancel, migration::receive, migration::reclaim, protection::put, protection::get,
        document
    )
)]
pub struct Api;

/// The route of the document.
pub fn routes() -> Router<Arc<Instance>> {
    Router::new().route("/openapi.json", get(document))
}

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "getOpenApi", tag = "cutover",
    responses((status = 200, content_type = "application/json", body = Object))
)]
pub async fn document() -> Response {
    written(DOCUMENT)
}

/// `document` as it is written.
pub(super) fn written(document: &'static str) -> Response {
    ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], document).into_response()
}

#[cfg(test)]
pub(super) mod tests {
    use std::{env, fs};

    use super::*;

    /// Whether `document`, the file of this `name` among the resources, is what the types of an API say. It becomes that
    /// with `UPDATE_OPENAPI`.
    pub fn check<A: OpenApi>(name: &str, document: &str) {
        let generated = A::openapi().to_pretty_json().expect("a document") + "\n";
        if env::var_os("UPDATE_OPENAPI").is_some() {
            let path = format!(concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/{}"), name);
            fs::write(path, &generated).expect("the document can be written");
        } else {
            assert_eq!(
                generated, document,
                "write it anew: UPDATE_OPENAPI=1 cargo test -p cutover-api openapi"
            );
        }
    }

    #[test]
    fn the_document_says_what_the_types_say() {
        check::<Api>("openapi.json", DOCUMENT);
    }
}
