//! The REST API of a VM, on a Unix socket: Firecracker's, and our own under `/v1`.
//!
//! ```text
//!  client ── socket ─► connection ─► router ─► firecracker::*, v1::* ─► Instance ─┬─► main thread: build the VM
//!            0600       limits,      bodies,                                      └─► state driver: Command, Reply
//!                       timeouts     faults
//! ```
//! All of it runs on one thread, `api`, which is confined like every other. It decides nothing about a running VM:
//! requests go to the state driver, and answers come back.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use cutover_devices::THREAD_STACK_SIZE;
use cutover_devices::listener::Listener;
use cutover_vmm::seccomp::{self, ThreadKind};
use tokio::runtime;
use tokio::sync::oneshot;

pub mod connection;
pub mod firecracker;
pub mod groups;
pub mod http;
pub mod instance;
pub mod openapi;
pub mod v1;

use firecracker::metrics;
use instance::Instance;

/// Most bytes of a request's body, unless the command line says otherwise: as in Firecracker.
pub const BODY_MAX: usize = 51200;

/// How to serve.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Confine the thread to the system calls it needs.
    pub seccomp: bool,
    /// Most bytes of a request's body.
    pub body_max: usize,
}

/// A server that runs.
pub struct Server {
    thread: JoinHandle<()>,
    stop: oneshot::Sender<()>,
    instance: Arc<Instance>,
    /// Its file is removed when the server has stopped.
    _listener: Option<Listener>,
}

impl Server {
    /// Serves `instance` to the clients of `listener`, if there is one, and writes its metrics, from a thread of its own.
    ///
    /// # Errors
    /// The operating system refused a thread or what an async runtime takes.
    pub fn start(listener: Option<Listener>, instance: Arc<Instance>, options: Options) -> io::Result<Self> {
        let socket = listener.as_ref().map(|listener| listener.as_fd().try_clone_to_owned());
        let socket = socket.transpose()?.map(UnixListener::from);
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let served = instance.clone();
        let thread = thread::Builder::new()
            .name("api".to_owned())
            .stack_size(THREAD_STACK_SIZE)
            .spawn(move || {
                if options.seccomp {
                    seccomp::confine_or_abort(ThreadKind::Api);
                }
                if let Err(error) = runtime.block_on(serve(socket, served, options.body_max, stopped)) {
                    tracing::error!(%error, "the API cannot be served");
                }
            })?;
        Ok(Self {
            thread,
            stop,
            instance,
            _listener: listener,
        })
    }

    /// Serves what is on its way, tells those who watch the events that no more will come, and ends.
    pub fn stop(self) {
        self.instance.end_events();
        // A server that has ended by itself has nothing left to stop.
        let _ = self.stop.send(());
        if self.thread.join().is_err() {
            tracing::error!("the API's thread has panicked");
        }
    }
}

async fn serve(
    socket: Option<UnixListener>,
    instance: Arc<Instance>,
    body_max: usize,
    stop: oneshot::Receiver<()>,
) -> io::Result<()> {
    tokio::spawn(metrics::write_regularly(instance.clone()));
    match socket {
        Some(socket) => {
            let listener = tokio::net::UnixListener::from_std(socket)?;
            connection::serve(listener, router(instance, body_max), stop).await;
        }
        // Whether it is told to stop or the other end is gone is the same.
        None => drop(stop.await),
    }
    Ok(())
}

/// Which handler serves which path.
pub fn router(instance: Arc<Instance>, body_max: usize) -> Router {
    Router::new()
        .merge(firecracker::routes())
        .merge(v1::routes())
        .merge(openapi::routes())
        .fallback(http::no_such_path)
        .method_not_allowed_fallback(http::no_such_method)
        .layer(DefaultBodyLimit::max(body_max))
        .with_state(instance)
}

#[cfg(test)]
mod tests;
