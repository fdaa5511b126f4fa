//! The block device (virtio 1.2 §5.2): a raw file or a host block device as a disk.
//!
//! Owns the device's life: it takes requests off its queue, hands them to an `engine` that does the I/O beside the
//! event loop, and answers when the engine reports them done. `request` says what the guest asks for, `disk` what
//! the host has.
//!
//! The image can be replaced while requests are under way: each request holds on to the image it began on, so nothing
//! has to be waited for. A request that the rate limiter, the `gate` or a protected disk's `epochs` hold back is still in
//! the queue.

use std::io;
use std::sync::Arc;

use cutover_snapshot::spec::{DiskSpec, RateLimiterSpec};
use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_blk::*;
use virtio_queue::Queue;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use self::chunks::ChunkSet;
pub use self::disk::Disk;
use self::engine::{Completion, Engine};
pub use self::epochs::DiskCut;
use self::gate::{Copier, Holds};
use self::in_flight::{InFlight, Step};
pub use self::lock::in_use;
use self::request::Request;
use self::waits::Waits;
use self::written::WriteTracker;
use super::log_limit::LogLimit;
use super::queue::{Chain, QueueError, Turn};
use super::{ConfigSpace, DeviceError, Notifier, ServedQueue, StartedQueues, VirtioDevice, has_feature};
use crate::stats::DiskCounters;
use crate::{CheckpointSoon, OnThread};

pub mod chunks;
mod config;
mod disk;
mod engine;
pub mod epochs;
pub mod gate;
mod in_flight;
mod lock;
mod request;
#[cfg(test)]
mod tests;
mod waits;
pub mod written;

/// Descriptors of the queue; also the most requests in flight, as each begins with another descriptor.
const QUEUE_SIZE: u16 = 256;
/// Requests taken before the event loop's other work gets its turn. What the host has cached is copied during the turn.
const REQUESTS_PER_TURN: u16 = 32;

const DOORBELL: u32 = 0;
const COMPLETION: u32 = 1;
/// The rate limiter's timer.
const RESUME: u32 = 2;
/// What the first request waits for is there.
const READY: u32 = 3;

/// A virtio disk.
pub struct Block {
    disk: Disk,
    engine: Engine,
    features: u64,
    config: ConfigSpace,
    waits: Waits,
    counters: Arc<DiskCounters>,
    writes: WriteTracker,
    service: Option<Service>,
}

/// What there is between start and stop.
struct Service {
    queue: ServedQueue,
    notifier: Notifier,
    counters: Arc<DiskCounters>,
    writes: WriteTracker,
    /// Requests the engine works on, by the index of their first descriptor.
    in_flight: Vec<Option<InFlight>>,
    in_flight_count: usize,
    /// Chains to take requests with, so that none is allocated per request.
    spare: Vec<Chain>,
    completions: Vec<Completion>,
    /// The driver does not flush: each write has to be durable by itself (virtio 1.2 §5.2.6.2).
    writes_are_durable: bool,
    errors_logged: LogLimit,
}

/// Why the device stops serving.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("the host's I/O engine failed: {0}")]
    Engine(#[from] io::Error),
}

impl Block {
    /// Opens the disk that `spec` describes, and locks it against other users of the same image. Threads it needs call
    /// `on_thread` first.
    ///
    /// # Errors
    /// It cannot be opened or is in use, is not whole sectors, or has too long a serial number.
    pub fn open(spec: &DiskSpec, on_thread: &OnThread) -> Result<Self, DeviceError> {
        let block = Self::open_unlocked(spec, on_thread)?;
        block.disk.lock()?;
        Ok(block)
    }

    /// The same without the lock, for a disk that somebody else still uses. Before it is started, it is to be
    /// [locked](Disk::lock).
    ///
    /// # Errors
    /// As [`open`](Self::open), but for its being in use.
    pub fn open_unlocked(spec: &DiskSpec, on_thread: &OnThread) -> Result<Self, DeviceError> {
        let disk = Disk::open(spec)?;
        let engine = Engine::new(spec, QUEUE_SIZE, on_thread)?;
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        features |= if disk.readonly() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        Ok(Self {
            config: ConfigSpace::new(config::bytes(disk.sectors(), QUEUE_SIZE)),
            waits: Waits::new(&spec.rate_limiter)?,
            counters: Arc::default(),
            writes: WriteTracker::new(disk.size()),
            disk,
            engine,
            features,
            service: None,
        })
    }

    /// The image in use, from which [its successor](Disk::successor) can be had.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Puts `disk`, a [successor](Disk::successor) of the image in use, in its place, and returns the old one. Requests
    /// under way are finished on that. If the number of sectors differs, the driver has to be told that its
    /// configuration space has changed.
    ///
    /// # Errors
    /// Somebody [copies](Self::hold) the image in use, or it is [protected](Self::begin_epochs). Nothing has changed.
    pub fn replace(&mut self, disk: Disk) -> Result<Disk, DeviceError> {
        if self.waits.gate.is_held() {
            return Err(DeviceError::DiskBeingCopied);
        }
        if self.waits.epochs.are_active() {
            return Err(DeviceError::DiskProtected);
        }
        if disk.sectors() != self.disk.sectors() {
            self.config.replace(config::bytes(disk.sectors(), QUEUE_SIZE));
        }
        self.writes.replace(disk.size());
        Ok(std::mem::replace(&mut self.disk, disk))
    }

    /// Has requests for `chunks` of the stopped disk wait, once it is started, until the [`Copier`] has seen to them. It
    /// keeps its image until then.
    ///
    /// # Errors
    /// Somebody else copies chunks of it.
    ///
    /// # Panics
    /// If the disk is not stopped, or `chunks` are those of a disk of another size.
    pub fn hold(&mut self, holds: Holds, chunks: ChunkSet) -> Result<Copier, DeviceError> {
        self.assert_stopped();
        assert_eq!(chunks.disk_size(), self.disk.size(), "chunks of another disk");
        let copier = self.waits.gate.hold(holds, chunks);
        copier.ok_or(DeviceError::DiskBeingCopied)
    }

    /// Protects the stopped disk: from `cut`, which is now, its writes are known by epoch, and it can go back to any cut
    /// since the last permanent one. Returns what it is at `cut`; `written` is all that whoever has a copy of the disk
    /// does not have yet. `soon` is called when half of what can be kept is; a thread that keeps it calls `on_thread`
    /// first.
    ///
    /// # Errors
    /// A restore still fills the image, or the thread cannot be created.
    ///
    /// # Panics
    /// If the disk is not stopped, or `written` is of a disk of another size.
    pub fn begin_epochs(
        &mut self,
        cut: u64,
        written: ChunkSet,
        soon: CheckpointSoon,
        on_thread: &OnThread,
    ) -> Result<DiskCut, DeviceError> {
        self.assert_stopped();
        assert_eq!(written.disk_size(), self.disk.size(), "chunks of another disk");
        if self.waits.gate.holds_everything() {
            return Err(DeviceError::DiskBeingCopied);
        }
        self.waits.epochs.begin(&self.disk, cut, written, soon, on_thread)
    }

    /// Ends the epoch of the stopped disk with `cut`, a higher number than the last one's.
    ///
    /// # Errors
    /// The disk is not protected.
    ///
    /// # Panics
    /// If the disk is not stopped.
    pub fn cut(&mut self, cut: u64) -> Result<DiskCut, DeviceError> {
        self.assert_stopped();
        self.waits.epochs.cut(cut).ok_or(DeviceError::DiskCutGone { cut })
    }

    /// Has `cut` be as if it had never been: its epoch goes on into the next one. The one that epochs
    /// [began](Self::begin_epochs) with cannot be: end them instead, and begin again.
    pub fn invalidate(&self, cut: u64) {
        self.waits.epochs.invalidate(cut);
    }

    /// What was kept of the time before `cut` is not needed any more.
    pub fn make_permanent(&self, cut: u64) {
        self.waits.epochs.make_permanent(cut);
    }

    /// Has the stopped disk be as it was at `cut`. Cuts since then are none any more.
    ///
    /// # Errors
    /// It is not known any more what the disk was like, a snapshot copies its image, or the host cannot write it. In the
    /// last case the disk is partly as it was, and this can be tried again.
    ///
    /// # Panics
    /// If the disk is not stopped.
    pub fn roll_back(&mut self, cut: u64) -> Result<(), DeviceError> {
        self.assert_stopped();
        if self.waits.gate.is_held() {
            return Err(DeviceError::DiskBeingCopied);
        }
        self.waits.epochs.roll_back(cut, &self.writes)
    }

    /// Protects the disk no more, and forgets its cuts.
    pub fn end_epochs(&mut self) {
        self.waits.epochs.end();
    }

    /// Changes the limits; see [`RateLimiterSpec`] for what is left as it is.
    pub fn limit(&mut self, limits: &RateLimiterSpec) {
        self.waits.throttle.update(limits);
    }

    /// What it has done.
    pub fn counters(&self) -> &Arc<DiskCounters> {
        &self.counters
    }

    /// Where its writes are recorded, for those who want to know.
    pub fn writes(&self) -> &WriteTracker {
        &self.writes
    }

    fn assert_stopped(&self) {
        assert!(self.service.is_none(), "requests are under way that are not held");
    }

    /// Serves whatever event `data` names.
    fn serve(&mut self, data: u32) -> Result<(), Failure> {
        if data == RESUME {
            self.waits.throttle.resume();
        }
        let Some(service) = &mut self.service else {
            return Ok(());
        };
        if data != COMPLETION && !self.waits.throttle.is_waiting() {
            service.take_requests(&self.disk, &mut self.engine, &mut self.waits)?;
        }
        // Also after taking requests: what the page cache answered is complete by now.
        service.reap(&mut self.engine)?;
        service.queue.notify(&service.notifier)?;
        Ok(())
    }
}

impl Service {
    /// Takes the requests there are, as far as none has to wait, and submits them to the engine together.
    fn take_requests(&mut self, disk: &Disk, engine: &mut Engine, waits: &mut Waits) -> Result<(), Failure> {
        let mut turn = self.queue.begin_turn(REQUESTS_PER_TURN)?;
        while let Some(mut chain) = self.next_chain(&mut turn)? {
            let status = self.status_address(&mut chain)?;
            let request = Request::parse(&mut chain, disk).and_then(|request| waits.epochs.check(request));
            if !waits.admit(request, &self.counters) {
                self.queue.unpop(1);
                self.spare.push(chain);
                break;
            }
            let step = InFlight::begin(chain, status, request, disk, self.writes_are_durable)?;
            self.proceed(step, engine)?;
        }
        Ok(engine.submit()?)
    }

    fn next_chain(&mut self, turn: &mut Turn) -> Result<Option<Chain>, QueueError> {
        let mut chain = self.spare.pop().unwrap_or_else(|| self.queue.new_chain());
        if self.queue.pop(turn, &mut chain)? {
            Ok(Some(chain))
        } else {
            self.spare.push(chain);
            Ok(None)
        }
    }

    /// Takes the place for the status byte off `chain`, which must not be under way already.
    fn status_address(&self, chain: &mut Chain) -> Result<GuestAddress, QueueError> {
        let head = chain.head;
        let slot = self
            .in_flight
            .get(usize::from(head))
            .ok_or(QueueError::Endless { head })?;
        if slot.is_some() {
            return Err(QueueError::InUse { head });
        }
        chain.writable.pop_byte().ok_or(QueueError::NoAnswer { head })
    }

    /// Collects what the engine has done and takes each request one step further.
    fn reap(&mut self, engine: &mut Engine) -> Result<(), Failure> {
        let mut completions = std::mem::take(&mut self.completions);
        engine.reap(&mut completions);
        let (mut resubmitted, mut outcome) = (false, Ok(()));
        for Completion { token, result } in completions.drain(..) {
            // The engine gives back the tokens it was given.
            let Some(request) = self.in_flight.get_mut(usize::from(token)).and_then(Option::take) else {
                continue;
            };
            self.in_flight_count -= 1;
            if let Some(bytes) = request.bytes_changed() {
                self.writes.record(bytes);
            }
            let step = request.finish_operation(result);
            resubmitted |= matches!(step, Step::Do(..));
            // Each completion is seen to, also after a failure: what is in flight has to be known.
            outcome = outcome.and(self.proceed(step, engine));
        }
        self.completions = completions;
        if resubmitted {
            engine.submit()?;
        }
        outcome
    }

    fn proceed(&mut self, step: Step, engine: &mut Engine) -> Result<(), Failure> {
        match step {
            Step::Do(operation, request) => {
                let token = request.head();
                // SAFETY: the request, and with it its image, its I/O vector and the guest memory, is kept in `in_flight`
                // until the engine reports the token; `stop` and `drop` wait for that.
                unsafe { engine.prepare(token, operation, request.image(), request.iovecs()) }?;
                self.in_flight[usize::from(token)] = Some(request);
                self.in_flight_count += 1;
            }
            Step::Answer {
                request,
                status,
                written,
                error,
            } => {
                if let Some(error) = error
                    && self.errors_logged.allows()
                {
                    tracing::warn!(device = self.notifier.name(), %error, "disk request failed");
                }
                request.count(status, &self.counters);
                request.write_status(self.queue.memory(), status)?;
                self.queue.push_used(request.head(), written)?;
                self.spare.push(request.into_chain());
            }
        }
        Ok(())
    }

    /// Waits until the engine holds no request.
    fn drain(&mut self, engine: &mut Engine) {
        while self.in_flight_count > 0 {
            engine.wait(self.notifier.name(), self.in_flight_count);
            if let Err(error) = self.reap(engine) {
                self.notifier.fail(error);
            }
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn start(&mut self, mut started: StartedQueues) -> Result<(), DeviceError> {
        let [queue] = started.take_queues();
        self.service = Some(Service {
            in_flight: (0..queue.size()).map(|_| None).collect(),
            queue,
            notifier: started.notifier,
            counters: self.counters.clone(),
            writes: self.writes.clone(),
            in_flight_count: 0,
            spare: Vec::new(),
            completions: Vec::new(),
            writes_are_durable: !has_feature(started.features, VIRTIO_BLK_F_FLUSH),
            errors_logged: LogLimit::default(),
        });
        Ok(())
    }

    fn stop(&mut self) -> Vec<Queue> {
        let Some(mut service) = self.service.take() else {
            return Vec::new();
        };
        service.drain(&mut self.engine);
        if let Err(error) = service.queue.notify(&service.notifier) {
            service.notifier.fail(error);
        }
        vec![service.queue.into_queue()]
    }
}

impl MutEventSubscriber for Block {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(failure) = self.serve(events.data())
            && let Some(service) = &self.service
        {
            service.notifier.fail(failure);
            service.queue.ignore_doorbell(ops);
            self.waits.ignore(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let Some(service) = &self.service else {
            return;
        };
        let completions = Events::with_data(&self.engine, COMPLETION, EventSet::IN | EventSet::EDGE_TRIGGERED);
        let watched = service
            .queue
            .watch_doorbell(ops, DOORBELL)
            .and_then(|()| self.waits.watch(ops))
            .and_then(|()| ops.add(completions));
        if let Err(error) = watched {
            service.notifier.fail(error);
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // Requests under way point into guest memory.
        self.stop();
    }
}
