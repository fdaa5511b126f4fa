//! Requests and answers: bodies in, JSON out, and every failure as a [`Fault`] with its status code.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use cutover_devices::mmds::MetadataError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use utoipa::IntoResponses;

use super::firecracker::rejection::Rejection;
use super::firecracker::unsupported;
use super::v1::types::Fault;
use crate::exit::with_causes;
use crate::log::LogError;
use crate::metrics::firecracker::MetricsError;

/// Time in which the body of a request has to arrive.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// What a request that answers without content came to.
pub type Outcome = Result<StatusCode, Failure>;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A request that needs a body came without.
    #[error("the request has no body")]
    NoBody,
    /// The body is no JSON, or not of this path's form.
    #[error("the body is not of the form that this path takes: {0}")]
    Body(#[from] serde_json::Error),
    /// The body is longer than allowed.
    #[error("the body is too long: --http-api-max-payload-size sets the limit")]
    BodyTooLong,
    /// The body did not arrive.
    #[error("the body has not arrived within {BODY_TIMEOUT:?}")]
    BodyTooSlow,
    /// The connection broke, or the body breaks the rules of HTTP.
    #[error("the body cannot be read")]
    BodyBroken,
    /// The path has bytes that are no text.
    #[error("the id in the path is not text")]
    PathId,
    /// The header's value is no number of an event.
    #[error("Last-Event-ID is not the number of an event")]
    LastEventId,
    /// There is nothing at this path.
    #[error("there is nothing at {0}: GET /openapi.json tells what there is")]
    NoSuchPath(String),
    /// The path is known, but not with this method.
    #[error("{method} is not possible at {path}")]
    NoSuchMethod {
        /// The method.
        method: Method,
        /// The path.
        path: String,
    },
    /// Part of Firecracker's API, but not of this one.
    #[error("not supported: {0}")]
    NotInThisApi(&'static str),
    /// Every place for those who watch events is taken.
    #[error("{0} clients watch the events already, which is the most")]
    TooManyWatchers(usize),
    /// The request makes no sense now, or asks for what cannot be.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The monitor refused, or failed.
    #[error(transparent)]
    Vm(#[from] cutover_vmm::Error),
    /// The log cannot be like that.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The metrics file cannot be opened, or takes no more.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The metadata cannot be like that.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The coordinator of groups refused, or failed.
    #[error(transparent)]
    Cluster(#[from] cutover_cluster::Error),
    /// It cannot go on.
    #[error("the coordinator has ended")]
    CoordinatorOver,
    /// Nobody answers for the VM any more.
    #[error("the VM has ended")]
    Ended,
}

impl Failure {
    /// Failures are the client's: what it asks for cannot be. But one that it cannot know of, and must.
    fn status(&self) -> StatusCode {
        match self {
            Self::BodyTooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::NoSuchMethod { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooManyWatchers(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Cluster(cutover_cluster::Error::NoGroup(_)) => StatusCode::NOT_FOUND,
            Self::Cluster(cutover_cluster::Error::NotDeciding { .. }) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Vm(error) if is_gone(error) => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::BAD_REQUEST,
        }
    }

    /// Whether there may be more of the request on its way, which nobody will read.
    fn leaves_rest(&self) -> bool {
        matches!(self, Self::BodyTooLong | Self::BodyTooSlow | Self::BodyBroken)
    }
}

/// Whether the VM was handed over to another monitor and is not known to run there.
fn is_gone(error: &cutover_vmm::Error) -> bool {
    use cutover_migration::Error::{Lost, OutcomeUnknown};
    matches!(error, cutover_vmm::Error::Migration(OutcomeUnknown(_) | Lost(_)))
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let fault = Fault {
            fault_message: with_causes(&self),
        };
        tracing::info!(fault = fault.fault_message, "a request of a client is refused");
        let mut response = (self.status(), json(&fault)).into_response();
        if self.leaves_rest() {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// An answer with a JSON body.
pub fn json(body: &impl Serialize) -> Response {
    let body = serde_json::to_vec(body).expect("answers have string keys only, which always can be written");
    ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
}

/// The body of a request, read from JSON whatever its content type says, as Firecracker does.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let body = timeout(BODY_TIMEOUT, Bytes::from_request(request, state))
            .await
            .map_err(|_| Failure::BodyTooSlow)?
            .map_err(broken)?;
        if body.is_empty() {
            return Err(Failure::NoBody);
        }
        Ok(Self(serde_json::from_slice(&body)?))
    }
}

fn broken(rejection: BytesRejection) -> Failure {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Failure::BodyTooLong,
        _ => Failure::BodyBroken,
    }
}

/// The id in the path of a request.
pub struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let Path(id) = Path::from_request_parts(parts, state)
            .await
            .map_err(|_| Failure::PathId)?;
        Ok(Self(id))
    }
}

/// Answers for paths that are not there.
pub async fn no_such_path(uri: Uri) -> Failure {
    match unsupported::feature(uri.path()) {
        Some(feature) => Failure::NotInThisApi(feature),
        None => Failure::NoSuchPath(uri.path().to_owned()),
    }
}

/// Answers for methods that a path does not have.
pub async fn no_such_method(method: Method, uri: Uri) -> Failure {
    Failure::NoSuchMethod {
        method,
        path: uri.path().to_owned(),
    }
}

/// The answers of requests that change something, for the OpenAPI document.
#[derive(IntoResponses)]
pub enum Changed {
    /// Done.
    #[response(status = 204)]
    Done,
    /// Refused: the body is wrong, it is too early or too late, or the host or the guest is in the way.
    #[response(status = 400)]
    Refused(Fault),
    /// The body did not arrive in time.
    #[response(status = 408)]
    TooSlow(Fault),
    /// The body is too long.
    #[response(status = 413)]
    TooLong(Fault),
}

/// The answers of requests that tell something, beside what they tell, for the OpenAPI document.
#[derive(IntoResponses)]
pub enum Refused {
    /// Refused.
    #[response(status = 400)]
    Refused(Fault),
}
