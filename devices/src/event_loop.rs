//! The thread on which devices serve their queues: an epoll loop of the event-manager crate.
//!
//! A device joins the loop when it starts and leaves it when it stops; [`EventLoop::remove`] returns only when the
//! loop no longer runs the device's code, so what follows has the device to itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};

/// What the loop runs: shared with whoever starts and stops it.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Why the loop could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// The event-manager crate refused.
    #[error("the device event loop failed: {0}")]
    Manager(#[from] event_manager::Error),
    /// The thread could not be created.
    #[error("cannot create the device event loop's thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// A running loop; dropping it ends the thread.
pub struct EventLoop {
    endpoint: RemoteEndpoint<Subscriber>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A way to add subscribers to a loop and take them off, from any thread but the loop's own.
#[derive(Clone)]
pub struct EventLoopHandle {
    endpoint: RemoteEndpoint<Subscriber>,
}

impl EventLoop {
    /// Starts a loop on a thread called `name`, which calls `on_thread` first (to confine itself).
    ///
    /// # Errors
    /// No epoll instance or thread could be had.
    pub fn spawn(name: &str, on_thread: impl FnOnce() + Send + 'static) -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Subscriber>::new()?;
        let endpoint = manager.remote_endpoint();
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = stopping.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            on_thread();
            while !stop.load(Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    tracing::error!(%error, "device event loop");
                }
            }
        })?;
        Ok(Self {
            endpoint,
            stopping,
            thread: Some(thread),
        })
    }

    /// A handle for devices.
    pub fn handle(&self) -> EventLoopHandle {
        EventLoopHandle {
            endpoint: self.endpoint.clone(),
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        if self.endpoint.kick().is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic of the loop was reported by the panic hook when it happened.
            let _ = thread.join();
        }
    }
}

impl EventLoopHandle {
    /// Puts `subscriber` on the loop and lets it register its file descriptors.
    ///
    /// # Errors
    /// The loop has ended.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, EventLoopError> {
        self.endpoint
            .call_blocking(move |manager| Ok::<_, event_manager::Error>(event_manager::SubscriberOps::add_subscriber(manager, subscriber)))
            .map_err(EventLoopError::Manager)
    }

    /// Takes a subscriber off the loop. Must not be called while holding a lock the subscriber's code takes.
    ///
    /// # Errors
    /// The loop has ended, or does not know `id`.
    pub fn remove(&self, id: SubscriberId) -> Result<(), EventLoopError> {
        self.endpoint
            .call_blocking(move |manager| manager.remove_subscriber(id).map(drop))
            .map_err(EventLoopError::Manager)
    }
}
