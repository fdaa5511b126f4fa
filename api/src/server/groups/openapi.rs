//! `/openapi.json` of a coordinator, generated and kept as that [of a VM](crate::server::openapi) is.

use std::sync::Arc;

use axum::Router;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use cutover_cluster::runtime::coordinator::Coordinator;
use utoipa::OpenApi;

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
    paths(super::create, super::list, super::status, super::dissolve, super::failover, super::resume,
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
    ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], DOCUMENT).into_response()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/openapi-coordinator.json");

    #[test]
    fn the_document_says_what_the_types_say() {
        let generated = Api::openapi().to_pretty_json().expect("a document") + "\n";
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            fs::write(PATH, &generated).expect("the document can be written");
        } else {
            assert_eq!(
                generated, DOCUMENT,
                "write it anew: UPDATE_OPENAPI=1 cargo test -p cutover-api openapi"
            );
        }
    }
}
