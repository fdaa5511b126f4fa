//! The balloon of a VM: made, asked for other amounts, and where the memory goes that it gives back.

use std::sync::Arc;
use std::time::Duration;

use cutover_devices::stats::BalloonCounters;
use cutover_devices::virtio::balloon::{Balloon, Statistics};
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::BalloonSpec;

use super::{DeviceManager, Placed, VirtioBuilder, lock};
use crate::Error;
use crate::reclaim::{Kept, Reclaim};

/// What it is called.
const NAME: &str = "virtio-balloon";

/// What is to be changed about the balloon; what is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonUpdate {
    /// How much the guest is asked for.
    pub amount: Option<ByteSize>,
    /// Every how many seconds it tells of its memory, if it does so at all.
    pub stats_interval_s: Option<u16>,
}

impl BalloonUpdate {
    /// What becomes of `spec`.
    pub fn apply(&self, spec: &mut BalloonSpec) {
        spec.amount = self.amount.unwrap_or(spec.amount);
        spec.stats_interval_s = self.stats_interval_s.unwrap_or(spec.stats_interval_s);
    }
}

impl VirtioBuilder<'_> {
    /// Places the balloon of `spec`, which gives memory to `reclaim`.
    pub(super) fn add_balloon(
        &mut self,
        spec: &BalloonSpec,
        reclaim: &Reclaim,
    ) -> Result<Placed<Balloon, BalloonCounters>, Error> {
        let device = Balloon::new(spec, Arc::new(reclaim.clone()))?;
        let counters = device.counters().clone();
        let (device, transport) = self.add(NAME.to_owned(), device)?;
        Ok(Placed {
            id: NAME.to_owned(),
            device,
            transport,
            counters,
        })
    }
}

impl DeviceManager {
    /// Changes what the balloon is asked for while its guest uses it, or while the VM is paused. Statistics are neither
    /// switched on nor off by that.
    ///
    /// # Errors
    /// There is no balloon.
    pub fn update_balloon(&self, spec: &BalloonSpec, update: &BalloonUpdate) -> Result<(), Error> {
        let balloon = self.balloon.as_ref().ok_or(Error::NoBalloon)?;
        let (device, spec, update) = (balloon.device.clone(), *spec, *update);
        self.event_loop.call(move |_| {
            let mut balloon = lock(&device);
            if update.amount.is_some() {
                balloon.ask_for(spec.pages());
            }
            if update.stats_interval_s.is_some() {
                balloon.ask_every(Duration::from_secs(spec.stats_interval_s.into()));
            }
        })?;
        if update.amount.is_some() {
            lock(&balloon.transport).config_changed();
        }
        Ok(())
    }

    /// How the balloon does.
    ///
    /// # Errors
    /// There is none.
    pub fn balloon_statistics(&self) -> Result<Statistics, Error> {
        let balloon = self.balloon.as_ref().ok_or(Error::NoBalloon)?;
        Ok(lock(&balloon.device).statistics())
    }

    /// From its return on, memory that the guest gives back is left as it is.
    pub fn keep_memory(&self) -> Kept {
        self.reclaim.keep()
    }
}
