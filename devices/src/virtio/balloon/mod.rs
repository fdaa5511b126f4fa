//! The memory balloon (virtio 1.2 §5.5): memory that the guest gives back to the host, and takes again when it may.
//!
//! ```text
//!  host asks: amount ──► config space ──► driver puts pages into the balloon, or takes some out
//!   inflate    ──► page numbers ──────────────┐
//!   reporting  ──► free pages, as buffers ────┴─► pages: ranges of guest memory ──► Reclaim, who may discard them
//!   deflate    ──► page numbers: answered; who touches such a page again gets a new one
//!   statistics ◄─► one buffer, which the device keeps until the driver is to fill it again, by a timer
//! ```
//! Who has the queues need not know what becomes of the pages: that is up to [`Reclaim`], and each time a hint that may be
//! ignored.
//!
//! There is nothing to save of it but its configuration space, where the driver writes how large the balloon is: the
//! buffer with statistics goes back to its queue when the device stops, and is read again when it goes on.
//!
//! `VIRTIO_BALLOON_F_PAGE_POISON` is not offered. So a driver may not rely on what a page contains that it reported or had
//! in the balloon (§5.5.6.5, §5.5.6.7); Linux does not report pages at all then if it fills free ones with zeros or a
//! pattern (`init_on_free`, `page_poison`). Nor is `VIRTIO_BALLOON_F_FREE_PAGE_HINT`: what a migration need not send is what
//! was given back before.

use std::sync::Arc;
use std::time::Duration;

use cutover_snapshot::spec::BalloonSpec;
use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Queue;

pub use self::pages::PAGE_SIZE;
pub use self::statistics::{Statistics, StatisticsBuffer, Tag};
use super::queue::{Chain, QueueError};
use super::{ConfigSpace, DeviceError, Notifier, ServedQueue, StartedQueues, VirtioDevice, has_feature};
use crate::stats::BalloonCounters;
use crate::timer::Timer;

mod pages;
mod statistics;
#[cfg(test)]
mod tests;

/// `VIRTIO_BALLOON_F_…` (virtio 1.2 §5.5.3).
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 128;
/// Most chains that are served before the event loop's other work gets its turn: discarding memory takes time.
const CHAINS_PER_TURN: u16 = 16;

/// Fields of `struct virtio_balloon_config`, of 4 bytes each: pages that the device wants, and pages that it has.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const CONFIG_LEN: usize = 8;

/// Data of the timer's events; those of queues have the position of the queue.
const TIMER: u32 = 4;

/// Where memory goes that a guest does not need now.
pub trait Reclaim: Send + Sync {
    /// May take `bytes` bytes of guest memory from address `start` on, which are whole pages of it, and mark them dirty;
    /// their content is anything from then on. Returns how many bytes it took. Waits for nobody.
    fn reclaim(&self, start: u64, bytes: u64) -> u64;
}

/// A virtio balloon.
pub struct Balloon {
    reclaim: Arc<dyn Reclaim>,
    queue_sizes: Vec<u16>,
    features: u64,
    config: ConfigSpace,
    /// How often the driver is asked for statistics; never if zero.
    interval: Duration,
    /// Made before the thread that sets it is confined.
    timer: Timer,
    /// Whether the timer is set, or has rung and nobody has heard it yet.
    is_timed: bool,
    statistics: StatisticsBuffer,
    counters: Arc<BalloonCounters>,
    service: Option<Service>,
}

/// What there is between start and stop.
struct Service {
    notifier: Notifier,
    /// Those that the driver has set up, in their order.
    queues: Vec<(Role, ServedQueue)>,
    chain: Chain,
    /// The first descriptor of the buffer with statistics, while the device has it: the last chain taken from its queue.
    kept: Option<u16>,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The queues of a device with these features, in their order: there is none for what is not negotiated.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    [
        (Role::Inflate, true),
        (Role::Deflate, true),
        (Role::Statistics, has_feature(features, F_STATS_VQ)),
        (Role::Reporting, has_feature(features, F_REPORTING)),
    ]
    .into_iter()
    .filter_map(|(role, is_there)| is_there.then_some(role))
}

impl Balloon {
    /// The device that `spec` describes; what its guest gives back goes to `reclaim`.
    ///
    /// # Errors
    /// No timer can be had.
    pub fn new(spec: &BalloonSpec, reclaim: Arc<dyn Reclaim>) -> Result<Self, DeviceError> {
        let features = [
            (F_STATS_VQ, spec.stats_interval_s > 0),
            (F_DEFLATE_ON_OOM, spec.deflate_on_oom),
            (F_REPORTING, spec.free_page_reporting),
        ];
        let features = features
            .into_iter()
            .filter(|(_, is_wanted)| *is_wanted)
            .fold(0, |features, (bit, _)| features | 1 << bit);
        let balloon = Self {
            reclaim,
            queue_sizes: roles(features).map(|_| QUEUE_SIZE).collect(),
            features,
            config: ConfigSpace::with_field_of_driver(vec![0; CONFIG_LEN], ACTUAL..CONFIG_LEN),
            interval: Duration::from_secs(spec.stats_interval_s.into()),
            timer: Timer::new("balloon statistics")?,
            is_timed: false,
            statistics: StatisticsBuffer::default(),
            counters: Arc::default(),
            service: None,
        };
        balloon.ask_for(spec.pages());
        Ok(balloon)
    }

    /// Asks for so many pages of 4 KiB in all. A driver that is there has to be
    /// [told](super::mmio::MmioTransport::config_changed).
    pub fn ask_for(&self, pages: u32) {
        self.config.change(NUM_PAGES, &pages.to_le_bytes());
    }

    /// Asks for statistics every `interval`, from now on, if that is what the device was made for.
    pub fn ask_every(&mut self, interval: Duration) {
        self.interval = interval;
        self.set_timer(Duration::from_nanos(1));
    }

    /// What the host wants, what it has, and what the guest last told of itself.
    pub fn statistics(&self) -> Statistics {
        let field = |start| {
            let mut bytes = [0; 4];
            self.config.read(start, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        Statistics {
            target_pages: field(NUM_PAGES),
            actual_pages: field(ACTUAL),
            guest: self.statistics,
        }
    }

    /// What it has done.
    pub fn counters(&self) -> &Arc<BalloonCounters> {
        &self.counters
    }

    fn set_timer(&mut self, wait: Duration) {
        self.is_timed = match self.timer.set(wait) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "cannot set the timer of balloon statistics; they are not asked for any more");
                false
            }
        }
    }

    /// Serves what the event with this `data` is about.
    fn serve(&mut self, data: u32) -> Result<(), QueueError> {
        let Some(service) = &mut self.service else {
            return Ok(());
        };
        if data == TIMER {
            service.ask_for_statistics()?;
            self.set_timer(self.interval);
            return Ok(());
        }
        let position = usize::try_from(data).expect("u32 fits usize on x86-64");
        let Some((role, _)) = service.queues.get(position) else {
            return Ok(());
        };
        match role {
            Role::Statistics => service.take_statistics(position, &mut self.statistics, &self.counters),
            role => service.take_pages(position, *role, &*self.reclaim, &self.counters),
        }
    }
}

impl Service {
    /// Takes what the driver says of pages in the queue at `position`, which is for `role`.
    fn take_pages(
        &mut self,
        position: usize,
        role: Role,
        reclaim: &dyn Reclaim,
        counters: &BalloonCounters,
    ) -> Result<(), QueueError> {
        let (_, queue) = &mut self.queues[position];
        let mut turn = queue.begin_turn(CHAINS_PER_TURN)?;
        while queue.pop(&mut turn, &mut self.chain)? {
            let ranges = match role {
                Role::Inflate => {
                    counters.inflated.add(1);
                    pages::listed(&self.chain.readable, queue.memory())?
                }
                Role::Reporting => {
                    counters.reported.add(1);
                    let ranges = pages::reported(&self.chain.writable);
                    counters
                        .reported_bytes
                        .add(ranges.iter().map(|range| range.bytes).sum());
                    ranges
                }
                Role::Deflate | Role::Statistics => {
                    counters.deflated.add(1);
                    Vec::new()
                }
            };
            for range in ranges {
                counters.reclaimed_bytes.add(reclaim.reclaim(range.start, range.bytes));
            }
            queue.push_used(self.chain.head, 0)?;
        }
        queue.notify(&self.notifier)
    }

    /// Takes what the driver tells of itself, and keeps the buffer.
    fn take_statistics(
        &mut self,
        position: usize,
        statistics: &mut StatisticsBuffer,
        counters: &BalloonCounters,
    ) -> Result<(), QueueError> {
        let (_, queue) = &mut self.queues[position];
        let mut turn = queue.begin_turn(CHAINS_PER_TURN)?;
        while queue.pop(&mut turn, &mut self.chain)? {
            *statistics = StatisticsBuffer::read(&self.chain.readable)?;
            counters.statistics.add(1);
            // There is one; a driver that has another gets the one before back, and fills it anew.
            if let Some(before) = self.kept.replace(self.chain.head) {
                queue.push_used(before, 0)?;
            }
        }
        queue.notify(&self.notifier)
    }

    /// Gives the driver its buffer back, for it to be filled, if the device has it.
    fn ask_for_statistics(&mut self) -> Result<(), QueueError> {
        if let Some(queue) = of_statistics(&mut self.queues)
            && let Some(kept) = self.kept.take()
        {
            queue.push_used(kept, 0)?;
            queue.notify(&self.notifier)?;
        }
        Ok(())
    }

    fn watch(&self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        for (position, (_, queue)) in (0..).zip(&self.queues) {
            queue.watch_doorbell(ops, position)?;
        }
        Ok(())
    }
}

fn of_statistics(queues: &mut [(Role, ServedQueue)]) -> Option<&mut ServedQueue> {
    let mut queues = queues.iter_mut();
    queues.find_map(|(role, queue)| (*role == Role::Statistics).then_some(queue))
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queues_with(&self, features: u64) -> usize {
        roles(features).count()
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn start(&mut self, started: StartedQueues) -> Result<(), DeviceError> {
        let queues: Vec<_> = roles(started.features).zip(started.queues).collect();
        self.service = Some(Service {
            // There is always a first.
            chain: queues[0].1.new_chain(),
            notifier: started.notifier,
            queues,
            kept: None,
        });
        // A device that is stopped for a moment, over and over, asks as often as another.
        let goes_on = started.go_on && self.is_timed;
        if !goes_on && !self.interval.is_zero() {
            self.set_timer(self.interval);
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<Queue> {
        let Some(mut service) = self.service.take() else {
            return Vec::new();
        };
        if let Some(queue) = of_statistics(&mut service.queues)
            && service.kept.is_some()
        {
            queue.unpop(1);
        }
        let queues = service.queues.into_iter();
        queues.map(|(_, queue)| queue.into_queue()).collect()
    }
}

impl MutEventSubscriber for Balloon {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(failure) = self.serve(events.data())
            && let Some(service) = &self.service
        {
            service.notifier.fail(failure);
            for (_, queue) in &service.queues {
                queue.ignore_doorbell(ops);
            }
            self.timer.ignore(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let Some(service) = &self.service else {
            return;
        };
        if let Err(error) = service.watch(ops).and_then(|()| self.timer.watch(ops, TIMER)) {
            service.notifier.fail(error);
        }
    }
}
