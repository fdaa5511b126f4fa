//! `/openapi.json` of a coordinator, generated and kept as that [of a VM](crate::server::openapi) is.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::get;
use cutover_cluster::runtime::coordinator::Coordinator;
use utoipa::OpenApi;

use crate::server::openapi::written;

const DOCUMENT: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../resources/openapi-coordinator.json"
));

/// The API as the types describe it.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Cutover's coordinator",
        description = "The API of a coordinator of groups of VMs, on its Unix socket."
    ),
    servers((url = "http://localhost", description = "The Unix socket of a coordinator")),
    tags((name = "cutover", description = "Cutover's own")),
    paths(super::create, super::list, super::status, super::dissolve, super::failover, super::events::get, super::resume,
        super::checkpoints::store, super::checkpoints::progress, super::checkpoints::cancel, document)
)]
pub struct Api;

/// The route of the document.
pub fn routes() -> Router<Arc<Coordinator>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::openapi::tests::check;

    #[test]
    fn the_document_says_what_the_types_say() {
        check::<Api>("openapi-coordinator.json", DOCUMENT);
    }
}
