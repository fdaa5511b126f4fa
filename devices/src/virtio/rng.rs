//! The entropy device (virtio 1.2 §5.4): fills the guest's buffers from the host's random number generator.

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;

use super::queue::{Chain, QueueError};
use super::{DeviceError, Notifier, ServedQueue, StartedQueues, VirtioDevice};

const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one request; a driver that wants more asks again.
const REQUEST_BYTES_MAX: usize = 64 << 10;

const DOORBELL: u32 = 0;

/// A virtio entropy source.
#[derive(Default)]
pub struct Rng {
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
    /// An entropy source.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Service {
    /// Answers every request there is, up to a queue full.
    fn serve(&mut self) -> Result<(), Failure> {
        let mut turn = self.queue.begin_turn(self.queue.size())?;
        while self.queue.pop(&mut turn, &mut self.chain)? {
            let written = self.fill_chain()?;
            self.queue.push_used(self.chain.head, written)?;
        }
        Ok(self.queue.notify(&self.notifier)?)
    }

    fn fill_chain(&mut self) -> Result<usize, Failure> {
        let wanted = self.chain.writable.len().min(REQUEST_BYTES_MAX);
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

    fn config(&self) -> &[u8] {
        &[]
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
    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        if let Some(service) = &mut self.service
            && let Err(failure) = service.serve()
        {
            service.notifier.fail(failure);
            service.queue.ignore_doorbell(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Some(service) = &self.service
            && let Err(error) = service.queue.watch_doorbell(ops, DOORBELL)
        {
            service.notifier.fail(error);
        }
    }
}
