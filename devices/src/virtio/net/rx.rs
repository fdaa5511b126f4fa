//! Frames for the guest: from the tap straight into the buffers the driver posted. Those of the metadata service come first.
//!
//! The length of a frame is not known before it is read. With mergeable buffers, as many are kept posted as the longest
//! frame needs, and a frame takes of them what it fills; without, each buffer has to hold a whole frame. When there
//! are too few the tap is left alone until the driver posts more: the host's queue fills and then drops. The same while
//! the rate limiter has the device wait; as lengths are known afterwards, the last frame before may go beyond the limit
//! and is paid for by the next.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_queue::Queue;

use super::{Cable, FRAME_LEN_MAX, FRAMES_PER_TURN, HEADER_LEN};
use crate::mmds::Endpoint;
use crate::stats::NetCounters;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::log_limit::LogLimit;
use crate::virtio::queue::{Chain, QueueError, Turn};
use crate::virtio::rate_limiter::Throttle;
use crate::virtio::{Notifier, ServedQueue};

/// Offset of `num_buffers` in the header; the tap leaves it to us.
const NUM_BUFFERS_OFFSET: usize = 10;

/// The receive queue in service.
pub struct Receiver {
    queue: ServedQueue,
    mergeable: bool,
    /// Chains taken and not yet given back, oldest first.
    posted: VecDeque<Chain>,
    /// The writable parts of `posted`, one after the other.
    space: GuestBuffers,
    /// Chains to take others with, so that none is allocated per frame.
    spare: Vec<Chain>,
    counters: Arc<NetCounters>,
    errors_logged: LogLimit,
}

impl Receiver {
    /// Serves `queue`.
    pub fn new(queue: ServedQueue, mergeable: bool, counters: Arc<NetCounters>) -> Self {
        let space = queue.new_buffers();
        Self {
            queue,
            mergeable,
            posted: VecDeque::new(),
            space,
            spare: Vec::new(),
            counters,
            errors_logged: LogLimit::default(),
        }
    }

    /// The queue.
    pub fn queue(&self) -> &ServedQueue {
        &self.queue
    }

    /// Moves frames until there are none, or no buffers, or the limits are used up, or others have to get their turn.
    /// What they tell of the guest's addresses is noted.
    pub fn serve(&mut self, cable: &mut Cable, throttle: &mut Throttle, notifier: &Notifier) -> Result<(), QueueError> {
        if throttle.is_waiting() {
            return Ok(());
        }
        let mut turn = self.queue.begin_turn(self.queue.size())?;
        for frames in 0..=FRAMES_PER_TURN {
            if frames == FRAMES_PER_TURN {
                self.queue.ring_doorbell();
            } else if !throttle.allows_any() {
                self.counters.rx_throttled.add(1);
                break;
            } else if !self.post_buffers(&mut turn)? || !self.receive(cable, throttle, notifier)? {
                break;
            }
        }
        self.queue.notify(notifier)
    }

    /// The queue, as if the buffers still posted had never been taken.
    pub fn into_queue(mut self) -> Queue {
        let untouched = u16::try_from(self.posted.len()).expect("a queue has at most 32768 chains");
        self.queue.unpop(untouched);
        self.queue.into_queue()
    }

    /// Takes one frame in; false if there is none.
    fn receive(&mut self, cable: &mut Cable, throttle: &mut Throttle, notifier: &Notifier) -> Result<bool, QueueError> {
        if let Some(frame) = cable.mmds.as_mut().and_then(Endpoint::next_frame) {
            // What does not fit is lost, as with frames from the tap.
            let len = self.space.copy_from(0, &frame)?;
            throttle.charge((frame.len() - HEADER_LEN) as u64);
            self.deliver(len)?;
            return Ok(true);
        }
        match cable.tap.receive(&self.space) {
            Ok(len) if len < HEADER_LEN => Ok(false),
            Ok(len) => {
                cable.seen.received(&self.space, len);
                let frame_len = (len - HEADER_LEN) as u64;
                throttle.charge(frame_len);
                self.counters.rx_frames.add(1);
                self.counters.rx_bytes.add(frame_len);
                self.deliver(len)?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => {
                if self.errors_logged.allows() {
                    tracing::warn!(device = notifier.name(), %error, "cannot receive from the tap device");
                }
                Ok(false)
            }
        }
    }

    /// Whether a frame can be read, after taking more buffers if there are too few.
    fn post_buffers(&mut self, turn: &mut Turn) -> Result<bool, QueueError> {
        while !self.has_room() {
            if !self.post_buffer(turn)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A driver with a short queue may never have room for the longest frame: all it has must do.
    fn has_room(&self) -> bool {
        let chains = self.posted.len();
        if self.mergeable {
            self.space.len() >= FRAME_LEN_MAX || chains == usize::from(self.queue.size())
        } else {
            chains == 1
        }
    }

    fn post_buffer(&mut self, turn: &mut Turn) -> Result<bool, QueueError> {
        let mut chain = self.spare.pop().unwrap_or_else(|| self.queue.new_chain());
        if !self.queue.pop(turn, &mut chain)? {
            self.spare.push(chain);
            return Ok(false);
        }
        let head = chain.head;
        if chain.writable.len() < HEADER_LEN {
            return Err(QueueError::NoAnswer { head });
        }
        self.space
            .extend(&chain.writable)
            .map_err(|source| QueueError::Buffers { head, source })?;
        self.posted.push_back(chain);
        Ok(true)
    }

    /// Gives back the buffers that `len` bytes of header and frame filled. The driver sees them all at once.
    fn deliver(&mut self, len: usize) -> Result<(), QueueError> {
        let count = self.chains_for(len);
        self.space.copy_from(NUM_BUFFERS_OFFSET, &count.to_le_bytes())?;
        let mut left = len;
        for chain in self.posted.drain(..usize::from(count)) {
            let size = chain.writable.len();
            self.space.advance(size);
            let filled = left.min(size);
            left -= filled;
            self.queue.push_used(chain.head, filled)?;
            self.spare.push(chain);
        }
        self.queue.publish()
    }

    /// How many of the posted chains the first `len` bytes fill.
    fn chains_for(&self, len: usize) -> u16 {
        let ends = self.posted.iter().scan(0, |end, chain| {
            *end += chain.writable.len();
            Some(*end)
        });
        let full = u16::try_from(ends.take_while(|&end| end < len).count());
        full.expect("a queue has at most 32768 chains") + 1
    }
}
