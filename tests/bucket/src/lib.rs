//! Servers that speak as much of S3 as snapshots need, and fail as they are told.
//!
//! ```text
//!  Objects ◄─┬─ Server A   http://127.0.0.1:…   dies at the tenth request
//!            └─ Server B   http://127.0.0.1:…   goes on with the same content
//! ```
//! There is one bucket, called [`BUCKET`]. Objects have the key under which they are, without the bucket. Nothing is
//! authenticated, but requests must be signed with the key that [`variables`] has.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use futures_util::stream;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::time::timeout;

/// Name of the bucket.
pub const BUCKET: &str = "bucket";
/// The key that requests have to be signed with.
const KEY: &str = "key";
/// Most bytes of a request.
const BODY_MAX: usize = 64 << 20;

/// Objects by key: what servers have in common that stand for each other.
pub type Objects = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// While it answers this request, from 0, it dies, and does not answer any more.
    Dies(usize),
    /// It takes requests and never answers.
    Hangs,
    /// It takes this request, from 0, and all that follow, and answers none of them.
    Holds(usize),
    /// It answers all with this.
    Says(StatusCode),
    /// It refuses what would change an object whose key ends so.
    RefusesToWrite(&'static str),
    /// It lists all objects, however far below.
    ListsAll,
    /// It answers the first request for a range or with a part only when there is a second.
    WaitsForTwo,
}

struct Inner {
    objects: Objects,
    /// Parts by upload and number.
    parts: Mutex<BTreeMap<(String, u32), Bytes>>,
    fault: Mutex<Fault>,
    requests: AtomicUsize,
    /// Keys in the order in which they were written.
    written: Mutex<Vec<String>>,
    /// Requests that have come while [`Fault::WaitsForTwo`], or are not answered while [`Fault::Holds`].
    arrived: watch::Sender<usize>,
}

/// A running server.
pub struct Server {
    inner: Arc<Inner>,
    url: String,
    runtime: Option<Runtime>,
}

impl Server {
    /// A server that has these objects.
    ///
    /// # Panics
    /// The system has no port for it.
    #[track_caller]
    pub fn start(objects: &Objects) -> Self {
        let inner = Arc::new(Inner {
            objects: objects.clone(),
            parts: Mutex::default(),
            fault: Mutex::default(),
            requests: AtomicUsize::new(0),
            written: Mutex::default(),
            arrived: watch::Sender::new(0),
        });
        let runtime = Runtime::new().expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let app = Router::new().fallback(handle).with_state(inner.clone());
        runtime.spawn(async { axum::serve(listener, app).await });
        Self {
            inner,
            url,
            runtime: Some(runtime),
        }
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// From now on it goes wrong like this.
    pub fn fail(&self, fault: Fault) {
        *self.inner.fault.lock().expect("not poisoned") = fault;
    }

    /// Waits until there is a request that is not answered because of [`Fault::Holds`], but for no longer than `limit`.
    /// Returns whether there is one.
    pub fn wait_for_held(&self, limit: Duration) -> bool {
        let mut arrived = self.inner.arrived.subscribe();
        let Some(runtime) = &self.runtime else {
            return false;
        };
        runtime.block_on(async { timeout(limit, arrived.wait_for(|arrived| *arrived > 0)).await.is_ok() })
    }

    /// How many requests have come; counts from anew.
    pub fn take_requests(&self) -> usize {
        self.inner.requests.swap(0, Ordering::Relaxed)
    }

    /// Keys in the order in which objects were completed.
    pub fn written(&self) -> Vec<String> {
        self.inner.written.lock().expect("not poisoned").clone()
    }

    /// Closes all connections, and takes no more.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the environment of a client of these servers has to say.
pub fn variables() -> [(&'static str, &'static str); 3] {
    [
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "here"),
    ]
}

async fn handle(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let number = inner.requests.fetch_add(1, Ordering::Relaxed);
    let signature = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(|value| value.as_bytes());
    let expected = format!("AWS4-HMAC-SHA256 Credential={KEY}/");
    if !signature.is_some_and(|value| value.starts_with(expected.as_bytes())) {
        return respond(StatusCode::FORBIDDEN, "not signed");
    }
    let fault = *inner.fault.lock().expect("not poisoned");
    let is_part = request.uri().query().is_some_and(|query| query.contains("partNumber"));
    match fault {
        Fault::Hangs => pending().await,
        Fault::Holds(from) if number >= from => {
            inner.arrived.send_modify(|arrived| *arrived += 1);
            pending().await
        }
        Fault::Dies(at) if number > at => broken(Bytes::new(), 1),
        Fault::Says(status) => respond(status, "<Error>no</Error>"),
        Fault::RefusesToWrite(end) if request.method() != Method::GET && request.uri().path().ends_with(end) => {
            respond(StatusCode::FORBIDDEN, "read only")
        }
        Fault::Dies(at) if number == at => {
            let response = serve(&inner, request).await;
            let (_, body) = response.into_parts();
            let bytes = to_bytes(body, BODY_MAX).await.expect("made here");
            broken(bytes.slice(..bytes.len() / 2), bytes.len().max(1))
        }
        Fault::WaitsForTwo if is_part || request.headers().contains_key(header::RANGE) => {
            inner.arrived.send_modify(|arrived| *arrived += 1);
            let mut arrived = inner.arrived.subscribe();
            arrived.wait_for(|arrived| *arrived >= 2).await.expect("not closed");
            serve(&inner, request).await
        }
        _ => serve(&inner, request).await,
    }
}

/// A response that ends after `bytes`, although it was to have `length`.
fn broken(bytes: Bytes, length: usize) -> Response {
    let body = Body::from_stream(stream::iter([Ok(bytes), Err(std::io::Error::other("dead"))]));
    let response = Response::builder().header(header::CONTENT_LENGTH, length);
    response.body(body).expect("valid")
}

fn respond(status: StatusCode, text: impl Into<Body>) -> Response {
    let response = Response::builder().status(status).header(header::ETAG, "\"etag\"");
    response.body(text.into()).expect("valid")
}

/// The value of a parameter, in which only slashes are encoded here.
fn parameter(query: &str, name: &str) -> Option<String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let value = pairs.into_iter().find(|(found, _)| *found == name)?.1;
    Some(value.replace("%2F", "/"))
}

async fn serve(inner: &Inner, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let Ok(body) = to_bytes(body, BODY_MAX).await else {
        return respond(StatusCode::BAD_REQUEST, "cut short");
    };
    let key = path
        .strip_prefix('/')
        .and_then(|path| path.strip_prefix(BUCKET))
        .expect("of this bucket")
        .trim_start_matches('/');
    match (parts.method, parameter(&query, "uploadId")) {
        (Method::GET, None) if key.is_empty() => {
            let is_flat = *inner.fault.lock().expect("not poisoned") == Fault::ListsAll;
            list(inner, &query, is_flat)
        }
        (method @ (Method::GET | Method::HEAD), None) => get(inner, key, method == Method::HEAD, &parts.headers),
        (Method::PUT, None) => write(inner, key, body.to_vec()),
        (Method::POST, None) => {
            let id = format!("upload-of-{}", key.replace('/', "-"));
            let text =
                format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>");
            respond(StatusCode::OK, text)
        }
        (Method::PUT, Some(upload)) => {
            let number = parameter(&query, "partNumber")
                .expect("a part")
                .parse()
                .expect("a number");
            inner.parts.lock().expect("not poisoned").insert((upload, number), body);
            respond(StatusCode::OK, "")
        }
        (Method::POST, Some(upload)) => {
            let mut parts = inner.parts.lock().expect("not poisoned");
            let own = parts.iter().filter(|((of, _), _)| *of == upload);
            let content = own.flat_map(|(_, bytes)| bytes.to_vec()).collect();
            parts.retain(|(of, _), _| *of != upload);
            write(inner, key, content);
            let text = "<CompleteMultipartUploadResult><ETag>etag</ETag></CompleteMultipartUploadResult>";
            respond(StatusCode::OK, text)
        }
        (Method::DELETE, Some(upload)) => {
            inner
                .parts
                .lock()
                .expect("not poisoned")
                .retain(|(of, _), _| *of != upload);
            respond(StatusCode::NO_CONTENT, "")
        }
        _ => respond(StatusCode::METHOD_NOT_ALLOWED, ""),
    }
}

fn write(inner: &Inner, key: &str, content: Vec<u8>) -> Response {
    inner
        .objects
        .lock()
        .expect("not poisoned")
        .insert(key.to_owned(), content);
    inner.written.lock().expect("not poisoned").push(key.to_owned());
    respond(StatusCode::OK, "")
}

/// Answers with an object, with a range of it, or (`head`) with its length alone. Nothing else of it is copied: it may
/// be as large as a guest.
fn get(inner: &Inner, key: &str, head: bool, headers: &HeaderMap) -> Response {
    let objects = inner.objects.lock().expect("not poisoned");
    let Some(object) = objects.get(key) else {
        return respond(StatusCode::NOT_FOUND, "");
    };
    let range = headers.get(header::RANGE).map(|value| value.to_str().expect("text"));
    let range = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let mut response = match range {
        Some((start, last)) => {
            let (start, last): (usize, usize) = (start.parse().expect("a number"), last.parse().expect("a number"));
            if start >= object.len() {
                return respond(StatusCode::RANGE_NOT_SATISFIABLE, "");
            }
            let end = object.len().min(last + 1);
            let mut response = respond(StatusCode::PARTIAL_CONTENT, object[start..end].to_vec());
            let value = format!("bytes {start}-{}/{}", end - 1, object.len());
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_RANGE, value.parse().expect("valid"));
            response
        }
        None if head => {
            let mut response = respond(StatusCode::OK, "");
            response
                .headers_mut()
                .insert(header::CONTENT_LENGTH, object.len().into());
            response
        }
        None => respond(StatusCode::OK, object.clone()),
    };
    let headers = response.headers_mut();
    let time = "Sat, 21 Nov 2026 12:00:00 GMT";
    headers.insert(header::LAST_MODIFIED, time.parse().expect("valid"));
    response
}

/// What `ListObjectsV2` answers, all on one page.
fn list(inner: &Inner, query: &str, is_flat: bool) -> Response {
    let prefix = parameter(query, "prefix").unwrap_or_default();
    let objects = inner.objects.lock().expect("not poisoned");
    let mut text = String::from("<ListBucketResult>");
    let mut last_prefix = String::new();
    for (key, content) in objects.iter() {
        let Some(rest) = key.strip_prefix(&prefix) else {
            continue;
        };
        match rest.split_once('/').filter(|_| !is_flat) {
            Some((first, _)) if first != last_prefix => {
                text += &format!("<CommonPrefixes><Prefix>{prefix}{first}/</Prefix></CommonPrefixes>");
                last_prefix = first.to_owned();
            }
            Some(_) => {}
            None => {
                let size = content.len();
                text += &format!("<Contents><Key>{key}</Key><Size>{size}</Size>");
                text += "<LastModified>2026-11-21T12:00:00Z</LastModified></Contents>";
            }
        }
    }
    respond(StatusCode::OK, text + "</ListBucketResult>")
}

/// An endpoint at which nobody listens.
pub fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    format!("http://{}", listener.local_addr().expect("an address"))
}
