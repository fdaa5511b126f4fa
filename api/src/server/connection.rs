//! Connections: how many there may be, how long they may take, how they end.
//!
//! A client that hangs holds one of [`CONNECTIONS_MAX`] places for a bounded time: until its header has to be there
//! ([`HEADER_TIMEOUT`]), its body ([`BODY_TIMEOUT`](super::http::BODY_TIMEOUT)), or until what it is sent has to be
//! read ([`WRITE_TIMEOUT`]). Clients beyond the limit wait in the socket's backlog.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 64;
/// Time in which a connection has to send the header of a request, its first or its next.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Time in which a client has to read something of what it is sent.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of a request's header, and of an answer that the client has not read yet.
const BUFFER_MAX: usize = 16 << 10;
/// Time that answers on their way get when the process ends.
const FAREWELL: Duration = Duration::from_secs(1);
/// Time to wait for descriptors when the process is out of them.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// Serves clients until `stop` says so or its other end is gone; then answers on their way are finished.
pub async fn serve(listener: UnixListener, router: Router, stop: oneshot::Receiver<()>) {
    let connections = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tokio::select! {
        () = accept_all(&listener, &router, &connections, &places) => {}
        _ = stop => {}
    }
    // Whoever has not read its answer by then does not want it.
    let _ = timeout(FAREWELL, connections.shutdown()).await;
}

async fn accept_all(listener: &UnixListener, router: &Router, connections: &GracefulShutdown, places: &Arc<Semaphore>) {
    // The semaphore is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(converse(stream, router.clone(), connections.watcher(), place));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                sleep(OUT_OF_DESCRIPTORS).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, router: Router, watcher: Watcher, _place: OwnedSemaphorePermit) {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BUFFER_MAX)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router));
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a client is dropped");
    }
}
