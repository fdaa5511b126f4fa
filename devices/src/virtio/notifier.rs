//! What a device tells its driver: buffers were used, or the device gave up (virtio 1.2 §2.3, §4.2.2 `InterruptStatus`).
//!
//! Shared between the transport, whose registers show it, and the device, which raises it from the event loop's thread.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use super::log_limit::LogLimit;
use crate::guest_event::{GuestEvent, GuestEventSink};

/// Raises a device's interrupt. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Notifier {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    interrupt: EventFd,
    interrupt_status: AtomicU32,
    failed: AtomicBool,
    events: GuestEventSink,
    /// A guest can make its device fail and reset it over and over.
    reports: Mutex<LogLimit>,
}

impl Notifier {
    pub(super) fn new(name: String, interrupt: EventFd, events: GuestEventSink) -> Self {
        let shared = Shared {
            name,
            interrupt,
            interrupt_status: AtomicU32::new(0),
            failed: AtomicBool::new(false),
            events,
            reports: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The device's name, for messages.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Tells the driver that it finds used buffers in a queue.
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Tells the driver that the device serves no longer, until it is reset; and the monitor, at most every now and then.
    pub fn fail(&self, reason: impl Display) {
        if self.shared.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        if self
            .shared
            .reports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .allows()
        {
            self.report(reason.to_string());
        }
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn report(&self, reason: String) {
        let device = self.shared.name.clone();
        tracing::error!(device, reason, "device stopped; it needs a reset by its driver");
        (self.shared.events)(GuestEvent::DeviceFailed { device, reason });
    }

    pub(super) fn interrupt(&self) -> &EventFd {
        &self.shared.interrupt
    }

    pub(super) fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.shared.interrupt_status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.shared.interrupt_status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Forgets everything, as a reset does.
    pub(super) fn reset(&self) {
        self.shared.interrupt_status.store(0, Ordering::Release);
        self.shared.failed.store(false, Ordering::Release);
    }

    /// Has the status that was saved. The interrupt itself is raised by [`raise_again`](Self::raise_again).
    pub(super) fn restore(&self, interrupt_status: u32, failed: bool) {
        self.shared.interrupt_status.store(interrupt_status, Ordering::Release);
        self.shared.failed.store(failed, Ordering::Release);
    }

    /// Interrupts the driver if there is something it has not acknowledged.
    pub(super) fn raise_again(&self) {
        if self.interrupt_status() != 0 {
            self.interrupt_driver();
        }
    }

    /// The status bit is set before the interrupt: the driver's handler reads it to learn why it was called.
    fn raise(&self, bit: u32) {
        self.shared.interrupt_status.fetch_or(bit, Ordering::AcqRel);
        self.interrupt_driver();
    }

    fn interrupt_driver(&self) {
        if let Err(error) = self.shared.interrupt.write(1) {
            tracing::error!(device = self.shared.name, %error, "cannot raise the interrupt");
        }
    }
}
