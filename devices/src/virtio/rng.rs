//! The entropy device (virtio 1.2 §5.4): fills the guest's buffers from the host's random number generator.

use std::sync::Arc;

use cutover_snapshot::spec::RngSpec;
use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;

use super::queue::{Chain, QueueError};
use super::rate_limiter::Throttle;
use super::{ConfigSpace, DeviceError, Notifier, ServedQueue, StartedQueues, VirtioDevice};
use crate::stats::RngCounters;

const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one request; a driver that wants more asks again.
const REQUEST_BYTES_MAX: usize = 64 << 10;

const DOORBELL: u32 = 0;
const RESUME: u32 = 1;

/// A virtio entropy source.
pub struct Rng {
    throttle: Throttle,
    counters: Arc<RngCounters>,
    service: Option<Service>,
}

struct Service {
    queue: ServedQueue,
    notifier: Notifier,
    chain: Chain,
    random: Vec<u8>,
}

/// Why the device stops serving.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("the host gives no random bytes: {0}")]
    Random(#[from] rustix::io::Errno),
}

impl Rng {
    /// An entropy source with the limits of `spec`.
    ///
    /// # Errors
    /// No timer can be had.
    pub fn new(spec: &RngSpec) -> Result<Self, DeviceError> {
        Ok(Self {
            throttle: Throttle::new(&spec.rate_limiter)?,
            counters: Arc::default(),
            service: None,
        })
    }

    /// What it has done.
    pub fn counters(&self) -> &Arc<RngCounters> {
        &self.counters
    }
}

impl Service {
    /// Answers every request there is, up to a queue full, as far as the limits go.
    fn serve(&mut self, throttle: &mut Throttle, counters: &RngCounters) -> Result<(), Failure> {
        if throttle.is_waiting() {
            return Ok(());
        }
        let mut turn = self.queue.begin_turn(self.queue.size())?;
        while self.queue.pop(&mut turn, &mut self.chain)? {
            let wanted = self.chain.writable.len().min(REQUEST_BYTES_MAX);
            if !throttle.admit(wanted as u64) {
                counters.throttled.add(1);
                self.queue.unpop(1);
                break;
            }
            let written = self.fill_chain(wanted)?;
            counters.requests.add(1);
            counters.bytes.add(written as u64);
            self.queue.push_used(self.chain.head, written)?;
        }
        Ok(self.queue.notify(&self.notifier)?)
    }

    fn fill_chain(&mut self, wanted: usize) -> Result<usize, Failure> {
        self.random.resize(wanted, 0);
        let mut filled = 0;
        while filled < wanted {
            filled += getrandom(&mut self.random[filled..], GetRandomFlags::empty())?;
        }
        Ok(self
            .chain
            .writable
            .copy_from(0, &self.random)
            .map_err(QueueError::from)?)
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::default()
    }

    fn start(&mut self, mut started: StartedQueues) -> Result<(), DeviceError> {
        let [queue] = started.take_queues();
        let chain = queue.new_chain();
        self.service = Some(Service {
            queue,
            notifier: started.notifier,
            chain,
            random: Vec::new(),
        });
        Ok(())
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.service
            .take()
            .map(|service| service.queue.into_queue())
            .into_iter()
            .collect()
    }
}

impl MutEventSubscriber for Rng {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == RESUME {
            self.throttle.resume();
        }
        if let Some(service) = &mut self.service
            && let Err(failure) = service.serve(&mut self.throttle, &self.counters)
        {
            service.notifier.fail(failure);
            service.queue.ignore_doorbell(ops);
            self.throttle.ignore(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Some(service) = &self.service
            && let Err(error) = service
                .queue
                .watch_doorbell(ops, DOORBELL)
                .and_then(|()| self.throttle.watch(ops, RESUME))
        {
            service.notifier.fail(error);
        }
    }
}
