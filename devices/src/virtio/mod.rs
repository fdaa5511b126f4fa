//! Virtio devices on the MMIO transport (virtio 1.2).
//!
//! ```text
//!  guest writes status DRIVER_OK ──► transport: start(queues) ──► device serves them on the event loop
//!  reset, pause, save, end       ──► transport: stop() -> queues ──► nothing of the device touches guest memory
//! ```

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

/// A device behind the virtio transport.
///
/// Lifecycle: `start` hands it its queues, `stop` takes them back with every request finished or not begun; a device
/// cannot tell a guest's reset from a pause or a snapshot. While started it is an event-loop subscriber.
pub trait VirtioDevice: event_manager::MutEventSubscriber + Send {
    /// Device type of virtio 1.2 §5.
    fn device_type(&self) -> u32;
    /// Largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Feature bits offered beyond the transport's own.
    fn features(&self) -> u64;
    /// Fills `data` from the configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Takes a write to the configuration space; bytes that are not writable are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Begins to serve `queues`.
    ///
    /// # Errors
    /// The device cannot serve; it keeps none of the queues.
    fn start(&mut self, queues: StartedQueues) -> Result<(), DeviceError>;
    /// Finishes or leaves unstarted every request, and gives the queues back. Does nothing on a stopped device.
    fn stop(&mut self) -> Vec<Queue>;
}

/// What a device gets when it starts.
pub struct StartedQueues {
    /// The guest's memory.
    pub memory: crate::GuestMemory,
    /// One entry for each of [`VirtioDevice::queue_sizes`], validated against `memory`.
    pub queues: Vec<(Queue, EventFd)>,
    /// Feature bits the driver accepted.
    pub features: u64,
}

/// Why a virtio device cannot be made or started.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {}
