//! Virtio devices on the MMIO transport (virtio 1.2).
//!
//! ```text
//!  guest writes status DRIVER_OK ──► transport: start(queues) ──► device serves them on the event loop
//!  reset, pause, save, end       ──► transport: stop() -> queues ──► nothing of the device touches guest memory
//! ```
//!
//! Threads and locks: vCPU threads and the state driver call the transport under the transport's lock; everything a
//! device does, starting and stopping included, happens on the event loop's thread under the device's lock. The order
//! is transport, then loop, then device; a device never calls back into its transport, it reports through [`Notifier`].

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

pub use config_space::ConfigSpace;
pub use error::DeviceError;
pub use notifier::Notifier;
pub use queue::ServedQueue;

pub mod balloon;
pub mod block;
mod buffers;
mod config_space;
#[cfg(test)]
mod dirty_pages;
mod error;
#[cfg(test)]
mod hostile_rings;
mod log_limit;
pub mod mmio;
pub mod net;
mod notifier;
mod queue;
mod rate_limiter;
pub mod rng;
#[cfg(test)]
mod testing;
pub mod vsock;

/// Feature bits every device offers through the transport: modern interface, indirect descriptors, event index.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A device behind the virtio transport.
///
/// Lifecycle: `start` hands it its queues, `stop` takes them back with every request finished or not begun; a device
/// cannot tell a guest's reset from a pause or a snapshot. Between the two it is an event-loop subscriber. What the
/// other methods return never changes, but for the contents of the configuration space.
pub trait VirtioDevice: event_manager::MutEventSubscriber + Send {
    /// Device type of virtio 1.2 §5.
    fn device_type(&self) -> u32;
    /// Largest size of each queue, a power of two; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// How many of these queues, the first ones, a driver sets up that accepts `features`.
    fn queues_with(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }
    /// Feature bits offered beyond [`TRANSPORT_FEATURES`].
    fn features(&self) -> u64;
    /// The configuration space.
    fn config(&self) -> ConfigSpace;
    /// Begins to serve `queues`. Called on the event loop's thread, before the device is made a subscriber.
    ///
    /// # Errors
    /// The device cannot serve; it keeps none of the queues.
    fn start(&mut self, queues: StartedQueues) -> Result<(), DeviceError>;
    /// Finishes or leaves unstarted every request, and gives the queues back; none on a stopped device. Called on the
    /// event loop's thread, when the device is no longer a subscriber.
    fn stop(&mut self) -> Vec<Queue>;
}

/// What a device gets when it starts.
pub struct StartedQueues {
    /// One for each of the [queues](VirtioDevice::queues_with) that there are, validated against guest memory.
    pub queues: Vec<ServedQueue>,
    /// Feature bits the driver accepted.
    pub features: u64,
    /// Whether they go on from where they were when they were [given back](VirtioDevice::stop), by this device or by one
    /// before it, instead of being those of a driver that has just set the device up.
    pub go_on: bool,
    /// The way to tell the driver.
    pub notifier: Notifier,
}

impl StartedQueues {
    /// The queues by name, of a device that always has all of them.
    ///
    /// # Panics
    /// If there are not `N`: the transport hands such a device as many queues as it has sizes.
    fn take_queues<const N: usize>(&mut self) -> [ServedQueue; N] {
        let queues = std::mem::take(&mut self.queues);
        let count = queues.len();
        queues
            .try_into()
            .unwrap_or_else(|_| panic!("{count} queues for a device of {N}"))
    }
}

/// Whether feature `bit` is in `features`.
fn has_feature(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}
