//! What is saved of a transport, and how a new one goes on from there.
//!
//! Of a device's queues only the positions in the rings are saved: the rest is what the driver wrote into the registers.
//! Devices have nothing else to save. A stopped one has finished each request or not begun it, and what depends on the
//! negotiated features follows from them. Rate limiters start anew, with full buckets.
//!
//! ```text
//!  pause ─► save ─► TransportState ═══► restore, on a transport nobody has used ─► resume: serves what was offered
//!                                       │
//!                                       └ nothing of it is trusted: status, features, queues are checked
//! ```
//! A position in a ring needs no check. The guest itself can write any into its rings, so that the device has to cope:
//! it gives up and says so.

use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, Section};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FAILED;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

use super::queue_setup::QueueSetup;
use super::{ACKNOWLEDGED, DRIVER, DRIVER_OK, DeviceError, FEATURES_OK, MmioTransport, Service, has_feature};

/// The state of a transport and of the device behind it, as it is saved. Not to be trusted when it is read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    needs_reset: bool,
    interrupt_status: u32,
    accepted_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    /// For each queue, if the device was serving them.
    positions: Vec<Position>,
    /// The configuration space as it was: the guest is told if it has changed.
    config: Vec<u8>,
    config_generation: u32,
}

/// What the driver wrote about a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    descriptor_table: u64,
    available_ring: u64,
    used_ring: u64,
}

/// How far the device has come with a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    next_available: u16,
    next_used: u16,
}

impl Section for TransportState {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl From<&QueueSetup> for QueueRegisters {
    fn from(setup: &QueueSetup) -> Self {
        Self {
            size: setup.size,
            ready: setup.ready,
            descriptor_table: setup.descriptor_table,
            available_ring: setup.available_ring,
            used_ring: setup.used_ring,
        }
    }
}

impl QueueRegisters {
    /// The registers of a queue of at most `size_max` descriptors; as long as they are not in use, any values will do.
    fn to_setup(&self, size_max: u16) -> QueueSetup {
        let mut setup = QueueSetup::new(size_max);
        setup.size = self.size;
        setup.ready = self.ready;
        setup.descriptor_table = self.descriptor_table;
        setup.available_ring = self.available_ring;
        setup.used_ring = self.used_ring;
        setup
    }
}

impl Position {
    fn of(queue: &Queue) -> Self {
        Self {
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    fn set(self, queue: &mut Queue) {
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
    }
}

impl MmioTransport {
    /// The state of the transport and its device, which is [paused](Self::pause). Changes nothing and reads no guest
    /// memory.
    ///
    /// # Panics
    /// If the device is not paused: only it knows how far it has come.
    pub fn save(&self) -> TransportState {
        let positions = match &self.service {
            Service::Idle => Vec::new(),
            Service::Paused(_) if self.notifier.has_failed() => Vec::new(),
            Service::Paused(queues) => queues.iter().map(Position::of).collect(),
            Service::Running(_) => panic!("{} is not paused", self.notifier.name()),
        };
        TransportState {
            status: self.status,
            needs_reset: self.notifier.has_failed(),
            interrupt_status: self.notifier.interrupt_status(),
            accepted_features: self.accepted_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(QueueRegisters::from).collect(),
            positions,
            config: self.config.bytes(),
            config_generation: self.config.generation(),
        }
    }

    /// Puts the transport, which nobody has used yet, into `state`, paused.
    ///
    /// # Errors
    /// It cannot be the state of this device. The transport is as it was.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), DeviceError> {
        let checked = self.queues_of(state).and_then(|setups| {
            let service = self.service_of(state, &setups)?;
            Ok((setups, service))
        });
        let (queues, service) = checked.map_err(|reason| DeviceError::SavedState {
            device: self.notifier.name().to_owned(),
            reason,
        })?;
        self.queues = queues;
        self.service = service;
        self.status = state.status;
        self.accepted_features = state.accepted_features;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.notifier.restore(state.interrupt_status, state.needs_reset);
        self.config.follow(&state.config, state.config_generation);
        if self.config.bytes() != state.config {
            self.config_changed();
        }
        Ok(())
    }

    /// The queues' registers in `state`, which has to be one of a driver that kept to the rules.
    fn queues_of(&self, state: &TransportState) -> Result<Vec<QueueSetup>, String> {
        let rung = state.status & !VIRTIO_CONFIG_S_FAILED;
        if ![0, ACKNOWLEDGED, DRIVER, FEATURES_OK, DRIVER_OK].contains(&rung) {
            return Err(format!("there is no device status {:#x}", state.status));
        }
        let interrupts = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
        if state.interrupt_status & !interrupts != 0 {
            return Err(format!("there is no interrupt status {:#x}", state.interrupt_status));
        }
        if rung >= FEATURES_OK && !self.acceptable(state.accepted_features) {
            let (accepted, offered) = (state.accepted_features, self.offered_features);
            return Err(format!(
                "its driver uses the features {accepted:#x}, of {offered:#x} that the device has here"
            ));
        }
        if state.queues.len() != self.queues.len() {
            let (found, expected) = (state.queues.len(), self.queues.len());
            return Err(format!("it has {found} queues instead of {expected}"));
        }
        let pairs = state.queues.iter().zip(&self.queues);
        Ok(pairs.map(|(saved, own)| saved.to_setup(own.size_max())).collect())
    }

    /// Who has the queues after `state` is restored.
    fn service_of(&self, state: &TransportState, setups: &[QueueSetup]) -> Result<Service, String> {
        let served = state.status == DRIVER_OK && !state.needs_reset;
        let expected = if served {
            self.queues_with(state.accepted_features)
        } else {
            0
        };
        if state.positions.len() != expected {
            let found = state.positions.len();
            return Err(format!("{found} of its queues are in service instead of {expected}"));
        }
        if !served {
            return Ok(Service::Idle);
        }
        let event_index = has_feature(state.accepted_features, VIRTIO_RING_F_EVENT_IDX);
        let to_queue = |(index, (setup, position)): (usize, (&QueueSetup, &Position))| {
            let mut queue = setup
                .to_queue(event_index, &self.memory)
                .map_err(|reason| format!("queue {index}: {reason}"))?;
            position.set(&mut queue);
            Ok(queue)
        };
        let queues = setups.iter().zip(&state.positions).enumerate().map(to_queue);
        Ok(Service::Paused(queues.collect::<Result<_, String>>()?))
    }
}

#[cfg(test)]
mod tests;
