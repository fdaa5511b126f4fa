//! What requests wait for: the rate limiter, whoever copies chunks, and what a protected disk keeps.

use std::io;

use cutover_snapshot::spec::RateLimiterSpec;
use event_manager::EventOps;

use super::epochs::Epochs;
use super::gate::Gate;
use super::request::{Request, Status};
use super::{DeviceError, READY, RESUME};
use crate::stats::DiskCounters;
use crate::virtio::rate_limiter::Throttle;

/// See the module.
pub struct Waits {
    /// How much the guest may do.
    pub throttle: Throttle,
    /// Chunks that are being copied, out or in.
    pub gate: Gate,
    /// Chunks that are to be kept before they are changed.
    pub epochs: Epochs,
}

impl Waits {
    /// Those of a disk with these limits, which is neither copied nor protected.
    ///
    /// # Errors
    /// No timer or event can be had.
    pub fn new(limits: &RateLimiterSpec) -> Result<Self, DeviceError> {
        let event = |error: io::Error| DeviceError::system("create an event for a disk")(error);
        Ok(Self {
            throttle: Throttle::new(limits)?,
            gate: Gate::new().map_err(event)?,
            epochs: Epochs::new().map_err(event)?,
        })
    }

    /// Whether `request` may begin; then it is paid for.
    pub fn admit(&mut self, request: Result<Request, Status>, counters: &DiskCounters) -> bool {
        if request.is_ok_and(|request| !self.gate.admits(&request) || !self.epochs.admit(&request)) {
            return false;
        }
        let admitted = self.throttle.admit(request.map_or(0, |request| request.data_len()));
        if !admitted {
            counters.throttled.add(1);
        }
        admitted
    }

    /// Has the event loop report when it is worth asking again.
    pub fn watch(&self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        self.throttle.watch(ops, RESUME)?;
        self.gate.watch(ops, READY)?;
        self.epochs.watch(ops, READY)
    }

    /// Has the event loop report that no more.
    pub fn ignore(&self, ops: &mut EventOps) {
        self.throttle.ignore(ops);
        self.gate.ignore(ops);
        self.epochs.ignore(ops);
    }
}
