//! The thread on which devices serve their queues: an epoll loop of the event-manager crate.
//!
//! A device joins the loop when it starts and leaves it when it stops. Both happen on the loop's thread through
//! [`EventLoopHandle::call`], between two rounds of events, so that they have the device to themselves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps};

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
    thread: Option<JoinHandle<EventManager<Subscriber>>>,
}

/// A way to the loop's thread and subscribers, from any thread but the loop's own.
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
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(crate::THREAD_STACK_SIZE)
            .spawn(move || {
                on_thread();
                while !stop.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        tracing::error!(%error, "device event loop");
                    }
                }
                manager
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
            // The last subscribers clean up here, where more is allowed than on the loop's thread. A panic of the loop
            // was reported by the panic hook when it happened.
            drop(thread.join());
        }
    }
}

impl EventLoopHandle {
    /// Puts `subscriber` on the loop and lets it register its file descriptors.
    ///
    /// # Errors
    /// The loop has ended.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, EventLoopError> {
        self.call(move |subscribers| subscribers.add_subscriber(subscriber))
    }

    /// Runs `task` on the loop's thread, where no subscriber's code runs meanwhile, and waits for its result. Must not
    /// be called while holding a lock the subscribers or `task` take.
    ///
    /// # Errors
    /// The loop has ended.
    pub fn call<T: Send + 'static>(
        &self,
        task: impl FnOnce(&mut dyn SubscriberOps<Subscriber = Subscriber>) -> T + Send + 'static,
    ) -> Result<T, EventLoopError> {
        self.endpoint
            .call_blocking(move |subscribers| Ok::<T, EventLoopError>(task(subscribers)))
    }
}
