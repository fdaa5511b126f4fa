//! Several endpoints with the same content, asked one after the other until one answers.

use std::fmt::{self, Display};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::{BackoffConfig, ClientOptions, Error as StoreError, RetryConfig};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::{Access, ENDPOINT_VARIABLES};

/// Threads that talk to endpoints.
const THREADS: usize = 2;
/// Threads that look up addresses of endpoints.
const RESOLVER_THREADS: usize = 2;
/// How long it may take until a connection is there.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long any request may take; parts that are uploaded are large.
const UPLOAD_LIMIT: Duration = Duration::from_secs(60);
/// How often one endpoint is asked in vain before the next one is.
const RETRIES: usize = 2;
/// The first pause between asking an endpoint again, which then get longer.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause between asking the same endpoint, or all, again.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Most characters of what an endpoint says is wrong.
const REASON_MAX: usize = 400;

/// Why none of the endpoints did what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// All say that there is no such object.
    NotFound,
    /// What each of them has done last.
    Failed(String),
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("there is no such object"),
            Self::Failed(reasons) => f.write_str(reasons),
        }
    }
}

impl std::error::Error for Failure {}

/// The endpoints of a bucket, and the threads that talk to them.
#[derive(Debug)]
pub(super) struct Cluster {
    /// There until this is dropped.
    inside: Option<Inside>,
    /// Where it goes then.
    end: Option<oneshot::Sender<Inside>>,
}

/// What talks to endpoints. It is let go of where it can be waited for, and by a thread that may close connections: who
/// reads may be confined to less.
#[derive(Debug)]
struct Inside {
    runtime: Handle,
    endpoints: Arc<Endpoints>,
}

#[derive(Debug)]
struct Endpoints {
    list: Vec<Endpoint>,
    /// Position of the one that answered last.
    preferred: AtomicUsize,
    request_limit: Duration,
    rounds: u32,
}

struct Endpoint {
    /// What messages call it.
    name: String,
    store: Arc<AmazonS3>,
}

/// The client has keys, which are nobody's business.
impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.name).finish()
    }
}

/// What one endpoint has done last.
struct Refusal {
    reason: String,
    /// Whether it says that there is no such object.
    not_found: bool,
    /// Whether it makes no sense to ask again, as far as that can be known.
    is_final: bool,
}

impl Cluster {
    /// The endpoints that have the bucket called `bucket`. None of them is asked anything yet.
    pub fn new(access: &Access, bucket: &str) -> Result<Self, Failure> {
        let failed = |error: &dyn Display| Failure::Failed(printable(error));
        // Whoever came first has installed a provider that is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let urls = access.endpoints();
        let list = match urls.as_slice() {
            [] => vec![Endpoint::new(access, bucket, None).map_err(|error| failed(&error))?],
            urls => {
                let endpoints = urls.iter().map(|url| Endpoint::new(access, bucket, Some(url)));
                endpoints.collect::<Result<_, _>>().map_err(|error| failed(&error))?
            }
        };
        let endpoints = Endpoints {
            list,
            preferred: AtomicUsize::new(0),
            request_limit: access.request_limit,
            rounds: access.rounds.max(1),
        };
        let (end, ended) = oneshot::channel();
        let runtime = start(ended).map_err(|error| failed(&error))?;
        Ok(Self {
            inside: Some(Inside {
                runtime,
                endpoints: Arc::new(endpoints),
            }),
            end: Some(end),
        })
    }

    fn inside(&self) -> &Inside {
        self.inside.as_ref().expect("there until this is dropped")
    }

    /// Has the endpoints do what `request` asks of one, until one has done it.
    pub fn ask<T, F>(&self, request: impl Fn(Arc<AmazonS3>) -> F + Send + Sync + 'static) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        self.wait_for(self.asking(request))
    }

    /// The same as work for the threads of this cluster.
    pub fn asking<T, F, R>(&self, request: R) -> impl Future<Output = Result<T, Failure>> + Send + use<T, F, R>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
        R: Fn(Arc<AmazonS3>) -> F + Send + Sync + 'static,
    {
        let endpoints = self.inside().endpoints.clone();
        async move { endpoints.ask(request).await }
    }

    /// Has the threads of this cluster do something; the calling thread waits.
    pub fn wait_for<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<T, Failure> {
        let (done, result) = mpsc::sync_channel(1);
        self.spawn(async move {
            // Who asked waits for this.
            let _ = done.send(work.await);
        });
        let gone = |_| Failure::Failed("the thread that asked is gone".to_owned());
        result.recv().map_err(gone)?
    }

    /// Has the threads of this cluster do something meanwhile.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.inside().runtime.spawn(work);
    }

    /// The endpoint that answered last.
    pub fn preferred(&self) -> Arc<AmazonS3> {
        let endpoints = &self.inside().endpoints;
        let preferred = endpoints.preferred.load(Ordering::Relaxed);
        endpoints.list[preferred].store.clone()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let (Some(inside), Some(end)) = (self.inside.take(), self.end.take()) {
            // The thread waits for this.
            let _ = end.send(inside);
        }
    }
}

/// Starts the threads that talk to endpoints, and one that waits for the end of what it is told through `ended`.
fn start(ended: oneshot::Receiver<Inside>) -> io::Result<Handle> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(RESOLVER_THREADS)
        .thread_name("store-io")
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    thread::Builder::new().name("store".to_owned()).spawn(move || {
        let inside = ended.blocking_recv();
        runtime.shutdown_background();
        drop(inside);
    })?;
    Ok(handle)
}

impl Endpoint {
    fn new(access: &Access, bucket: &str, url: Option<&str>) -> Result<Self, StoreError> {
        let mut builder = AmazonS3Builder::new();
        let variables = access.variables.iter();
        for (name, value) in variables.filter(|(name, _)| !name.starts_with(ENDPOINT_VARIABLES)) {
            if let Ok(key) = name.to_ascii_lowercase().parse() {
                builder = builder.with_config(key, value);
            }
        }
        // Who names an endpoint without encryption wants it so; for that no certificates have to be there.
        let plain = url.is_some_and(|url| url.starts_with("http://"));
        let options = ClientOptions::new()
            .with_allow_http(plain)
            .with_no_system_certificates(plain)
            .with_connect_timeout(CONNECT_LIMIT)
            .with_timeout(UPLOAD_LIMIT);
        builder = builder
            .with_bucket_name(bucket)
            .with_client_options(options)
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: RETRY_PAUSE,
                    max_backoff: PAUSE_MAX,
                    ..BackoffConfig::default()
                },
                max_retries: RETRIES,
                retry_timeout: UPLOAD_LIMIT,
            });
        if let Some(url) = url {
            builder = builder.with_endpoint(url);
        }
        Ok(Self {
            name: url.unwrap_or("Amazon S3").to_owned(),
            store: Arc::new(builder.build()?),
        })
    }
}

impl Endpoints {
    async fn ask<T, F>(&self, request: impl Fn(Arc<AmazonS3>) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let count = self.list.len();
        let mut pause = RETRY_PAUSE;
        for round in 1.. {
            let first = self.preferred.load(Ordering::Relaxed);
            let mut refusals = Vec::with_capacity(count);
            for index in (first..count).chain(0..first) {
                let endpoint = &self.list[index];
                match timeout(self.request_limit, request(endpoint.store.clone())).await {
                    Ok(Ok(answer)) => {
                        self.prefer(index, &refusals);
                        return Ok(answer);
                    }
                    Ok(Err(error)) => refusals.push(Refusal::new(endpoint, &error)),
                    Err(_) => refusals.push(Refusal::late(endpoint, self.request_limit)),
                }
            }
            if round >= self.rounds || refusals.iter().all(|refusal| refusal.is_final) {
                return Err(Failure::of(&refusals));
            }
            sleep(pause).await;
            pause = (pause * 4).min(PAUSE_MAX);
        }
        unreachable!("some round is the last")
    }

    /// Asks the endpoint at `index` first from now on.
    fn prefer(&self, index: usize, refusals: &[Refusal]) {
        let before = self.preferred.swap(index, Ordering::Relaxed);
        if let Some(refusal) = refusals.first().filter(|_| before != index) {
            tracing::warn!("{}: going on with {}", refusal.reason, self.list[index].name);
        }
    }
}

impl Refusal {
    fn new(endpoint: &Endpoint, error: &StoreError) -> Self {
        let not_found = matches!(error, StoreError::NotFound { .. });
        let forbidden = matches!(
            error,
            StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. }
        );
        Self {
            reason: printable(&format_args!("{}: {error}", endpoint.name)),
            not_found,
            is_final: not_found || forbidden,
        }
    }

    fn late(endpoint: &Endpoint, limit: Duration) -> Self {
        Self {
            reason: format!("{}: no answer within {limit:?}", endpoint.name),
            not_found: false,
            is_final: false,
        }
    }
}

impl Failure {
    fn of(refusals: &[Refusal]) -> Self {
        if refusals.iter().all(|refusal| refusal.not_found) {
            return Self::NotFound;
        }
        let reasons: Vec<&str> = refusals.iter().map(|refusal| &refusal.reason[..]).collect();
        Self::Failed(reasons.join("; "))
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { .. } => Self::NotFound,
            _ => Self::Failed(printable(&error)),
        }
    }
}

/// `text`, in which there can be what a server has sent, on one line and not too long.
fn printable(text: &dyn Display) -> String {
    let text = text.to_string();
    let blank = |character: char| if character.is_control() { ' ' } else { character };
    text.chars().take(REASON_MAX).map(blank).collect()
}
