//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2): one register window in front of one device.
//!
//! The status register is a ladder (virtio 1.2 §3.1.1): a driver may only climb it, rung by rung, or write 0, which
//! resets the device from anywhere.
//!
//! ```text
//!  reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK          FAILED: the driver gave up; only reset helps
//!                          negotiate   set queues up   queues served   NEEDS_RESET: the device gave up
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::SubscriberId;
use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::queue_setup::QueueSetup;
use super::{
    ConfigSpace, DeviceError, Notifier, ServedQueue, StartedQueues, TRANSPORT_FEATURES, VirtioDevice, has_feature,
};
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::event_loop::{EventLoopError, EventLoopHandle, Subscriber};
use crate::guest_event::GuestEventSink;

mod queue_setup;
mod state;
#[cfg(test)]
mod tests;

pub use self::state::TransportState;

/// Offset of the register a driver writes a queue's index to; a hypervisor turns such writes into doorbell events.
pub const QUEUE_NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Bytes of address space the registers and the configuration space take.
pub const WINDOW_SIZE: u64 = 0x1000;

/// `virt` in little-endian ASCII.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Any value identifies a vendor; Linux shows it and does nothing with it: `CTVR`.
const VENDOR_ID: u32 = 0x5256_5443;
/// Reading a shared memory region that does not exist gives a length of all ones (virtio 1.2 §4.2.2).
const NO_SHARED_MEMORY: u32 = u32::MAX;

const ACKNOWLEDGED: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGED | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

/// The transport of one device.
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    /// The same device, as the event loop sees it.
    subscriber: Subscriber,
    device_type: u32,
    offered_features: u64,
    config: ConfigSpace,
    memory: Arc<GuestMemory>,
    event_loop: EventLoopHandle,
    notifier: Notifier,
    doorbells: Vec<Arc<EventFd>>,
    service: Service,
    /// Bits the driver wrote, always a rung of the ladder, perhaps with FAILED.
    status: u32,
    accepted_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueSetup>,
}

/// Who has the queues.
enum Service {
    /// Nobody: the driver has not set them up, or the device failed to start.
    Idle,
    /// The device.
    Running(SubscriberId),
    /// The transport, between [`MmioTransport::pause`] and [`MmioTransport::resume`].
    Paused(Vec<Queue>),
}

impl MmioTransport {
    /// A transport for `device`, which is called `name` in messages and served on `event_loop`.
    ///
    /// # Errors
    /// No event descriptors could be had.
    pub fn new<D: VirtioDevice + 'static>(
        name: String,
        device: Arc<Mutex<D>>,
        memory: GuestMemory,
        event_loop: EventLoopHandle,
        events: GuestEventSink,
    ) -> Result<Self, DeviceError> {
        let new_event = || EventFd::new(EFD_NONBLOCK).map_err(DeviceError::system("create an eventfd"));
        let notifier = Notifier::new(name, new_event()?, events);
        let (device_type, offered_features, config, queues) = {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let queues: Vec<_> = device.queue_sizes().iter().map(|&size| QueueSetup::new(size)).collect();
            (
                device.device_type(),
                device.features() | TRANSPORT_FEATURES,
                device.config(),
                queues,
            )
        };
        let doorbells = queues
            .iter()
            .map(|_| new_event().map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            subscriber: device.clone(),
            device,
            device_type,
            offered_features,
            config,
            memory: Arc::new(memory),
            event_loop,
            notifier,
            doorbells,
            service: Service::Idle,
            status: 0,
            accepted_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
        })
    }

    /// Written to whenever the device interrupts; edge-triggered.
    pub fn interrupt(&self) -> &EventFd {
        self.notifier.interrupt()
    }

    /// One for each queue, to be written to when the driver writes the queue's index at [`QUEUE_NOTIFY_OFFSET`].
    pub fn doorbells(&self) -> &[Arc<EventFd>] {
        &self.doorbells
    }

    /// Stops the device; on return it touches guest memory no more. Its queues are kept for [`resume`](Self::resume).
    pub fn pause(&mut self) {
        if let Some(queues) = self.stop_service() {
            self.service = Service::Paused(queues);
        }
    }

    /// Goes on where [`pause`](Self::pause) stopped.
    pub fn resume(&mut self) {
        // It may have been on its way when the interrupt controllers were saved: not in their state, nor seen by the
        // guest. One too many does no harm.
        self.notifier.raise_again();
        match std::mem::replace(&mut self.service, Service::Idle) {
            // It had given up before: only a reset helps.
            Service::Paused(_) if self.notifier.has_failed() => {}
            Service::Paused(queues) => self.start_service(queues, true),
            other => self.service = other,
        }
    }

    /// Tells the driver, if it has set the device up, that the device changed its configuration space. A driver that
    /// has not will read it then.
    pub fn config_changed(&self) {
        if self.status & DRIVER_OK == DRIVER_OK {
            self.notifier.config_changed();
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR_ID,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered_features, self.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected_queue().map_or(0, |queue| queue.size_max().into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected_queue().is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.notifier.interrupt_status(),
            VIRTIO_MMIO_STATUS if self.notifier.has_failed() => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status == DRIVER => {
                set_half(&mut self.accepted_features, self.driver_features_select, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM..=VIRTIO_MMIO_QUEUE_READY
            | VIRTIO_MMIO_QUEUE_DESC_LOW..=VIRTIO_MMIO_QUEUE_USED_HIGH
                if self.status == FEATURES_OK =>
            {
                self.set_queue_up(offset, value);
            }
            VIRTIO_MMIO_QUEUE_NOTIFY => self.ring_doorbell(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.notifier.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => tracing::debug!(
                device = self.notifier.name(),
                offset,
                value,
                status = self.status,
                "write ignored"
            ),
        }
    }

    fn set_queue_up(&mut self, offset: u32, value: u32) {
        let Some(queue) = usize::try_from(self.queue_select)
            .ok()
            .and_then(|index| self.queues.get_mut(index))
        else {
            return;
        };
        match offset {
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 != 0,
            // A queue that is ready is not changed under the device (virtio 1.2 §4.2.2.2).
            _ if queue.ready => {}
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptor_table, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptor_table, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available_ring, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available_ring, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used_ring, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used_ring, 1, value),
            _ => {}
        }
    }

    fn selected_queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn ring_doorbell(&self, queue: u32) {
        let doorbell = usize::try_from(queue).ok().and_then(|index| self.doorbells.get(index));
        if let Some(doorbell) = doorbell
            && let Err(error) = doorbell.write(1)
        {
            tracing::error!(device = self.notifier.name(), queue, %error, "cannot ring a doorbell");
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let failed = (value | self.status) & VIRTIO_CONFIG_S_FAILED;
        let rung = value & !(VIRTIO_CONFIG_S_FAILED | VIRTIO_CONFIG_S_NEEDS_RESET);
        match (self.status, rung) {
            _ if failed != 0 => {
                tracing::debug!(device = self.notifier.name(), "the driver gave the device up");
                self.stop_service();
                self.status |= VIRTIO_CONFIG_S_FAILED;
            }
            (0, ACKNOWLEDGED) | (ACKNOWLEDGED, DRIVER) => self.status = rung,
            // Accepting VERSION_1 and nothing that was not offered is what earns FEATURES_OK (virtio 1.2 §3.1.1, §6.1).
            (DRIVER, FEATURES_OK) if self.acceptable(self.accepted_features) => self.status = rung,
            (FEATURES_OK, DRIVER_OK) => {
                self.status = rung;
                self.begin_service();
            }
            (old, _) if old != rung => {
                tracing::debug!(device = self.notifier.name(), old, new = value, "status change refused");
            }
            _ => {}
        }
    }

    fn acceptable(&self, features: u64) -> bool {
        has_feature(features, VIRTIO_F_VERSION_1) && features & !self.offered_features == 0
    }

    /// Returns only when no request is under way: the driver reuses the memory at once. A request that the host's disk
    /// never answers therefore keeps the resetting vCPU waiting; its memory could not be given back safely.
    fn reset(&mut self) {
        self.stop_service();
        self.notifier.reset();
        self.config.forget();
        self.status = 0;
        self.accepted_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.size_max());
        }
    }

    fn begin_service(&mut self) {
        let event_index = has_feature(self.accepted_features, VIRTIO_RING_F_EVENT_IDX);
        let queues: Result<Vec<_>, _> = self
            .queues
            .iter()
            .take(self.queues_with(self.accepted_features))
            .enumerate()
            .map(|(index, setup)| {
                setup
                    .to_queue(event_index, &self.memory)
                    .map_err(|reason| DeviceError::QueueSetup { index, reason })
            })
            .collect();
        match queues {
            Ok(queues) => self.start_service(queues, false),
            Err(error) => self.notifier.fail(error),
        }
    }

    /// How many queues there are with `features`, the first ones of all.
    fn queues_with(&self, features: u64) -> usize {
        lock(&self.device).queues_with(features).min(self.queues.len())
    }

    fn start_service(&mut self, queues: Vec<Queue>, go_on: bool) {
        match self.try_start(queues, go_on) {
            Ok(subscriber) => self.service = Service::Running(subscriber),
            Err(error) => self.notifier.fail(error),
        }
    }

    fn try_start(&self, queues: Vec<Queue>, go_on: bool) -> Result<SubscriberId, DeviceError> {
        let serve = |(queue, doorbell): (Queue, &Arc<EventFd>)| {
            let queue = ServedQueue::new(queue, doorbell.clone(), self.memory.clone());
            // What the driver offered before, or while nobody served, was announced to nobody.
            queue.ring_doorbell();
            queue
        };
        let started = StartedQueues {
            queues: queues.into_iter().zip(&self.doorbells).map(serve).collect(),
            features: self.accepted_features,
            go_on,
            notifier: self.notifier.clone(),
        };
        let (device, subscriber) = (self.device.clone(), self.subscriber.clone());
        self.event_loop.call(move |subscribers| {
            lock(&device).start(started)?;
            Ok(subscribers.add_subscriber(subscriber))
        })?
    }

    /// Takes the queues back from whoever has them.
    fn stop_service(&mut self) -> Option<Vec<Queue>> {
        match std::mem::replace(&mut self.service, Service::Idle) {
            Service::Idle => None,
            Service::Paused(queues) => Some(queues),
            Service::Running(id) => match self.try_stop(id) {
                Ok(queues) => Some(queues),
                Err(error) => {
                    self.notifier.fail(error);
                    None
                }
            },
        }
    }

    fn try_stop(&self, id: SubscriberId) -> Result<Vec<Queue>, EventLoopError> {
        let device = self.device.clone();
        self.event_loop.call(move |subscribers| {
            subscribers.remove_subscriber(id)?;
            Ok(lock(&device).stop())
        })?
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.stop_service();
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match Access::of(offset, data.len()) {
            Access::Register(register) => data.copy_from_slice(&self.read_register(register).to_le_bytes()),
            Access::Config(start) => self.config.read(start, data),
            Access::Invalid => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match Access::of(offset, data.len()) {
            Access::Register(register) => {
                if let Ok(value) = data.try_into() {
                    self.write_register(register, u32::from_le_bytes(value));
                }
            }
            Access::Config(start) => self.config.write(start, data),
            Access::Invalid => {}
        }
    }
}

/// What an access to the window is about.
enum Access {
    /// A register; all are aligned 32-bit words (virtio 1.2 §4.2.2.2).
    Register(u32),
    /// The configuration space, from this byte on.
    Config(usize),
    /// Nothing: reads give zero, writes do nothing.
    Invalid,
}

impl Access {
    fn of(offset: u64, len: usize) -> Self {
        let Ok(offset) = u32::try_from(offset) else {
            return Self::Invalid;
        };
        match offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            Some(start) => usize::try_from(start).map_or(Self::Invalid, Self::Config),
            None if len == 4 && offset.is_multiple_of(4) => Self::Register(offset),
            None => Self::Invalid,
        }
    }
}

fn lock(device: &Mutex<dyn VirtioDevice>) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The 32-bit half of `value` that `select` names: 0 low, 1 high, anything else reads as zero.
fn half(value: u64, select: u32) -> u32 {
    let bytes = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        1 => u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        _ => 0,
    }
}

/// Sets the half of `value` that `select` names, as [`half`] reads it.
fn set_half(value: &mut u64, select: u32, half: u32) {
    let half = u64::from(half);
    match select {
        0 => *value = *value & !u64::from(u32::MAX) | half,
        1 => *value = *value & u64::from(u32::MAX) | half << 32,
        _ => {}
    }
}
