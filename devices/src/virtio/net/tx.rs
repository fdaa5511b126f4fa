//! Frames of the guest: from its buffers straight through the gate, as far as the rate limiter lets them.

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;

use super::gate::Passage;
use super::{Cable, FRAME_LEN_MAX, FRAMES_PER_TURN, HEADER_LEN};
use crate::mmds::{CLAIM_LEN, Endpoint};
use crate::stats::NetCounters;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::queue::{Chain, QueueError, Turn};
use crate::virtio::rate_limiter::Throttle;
use crate::virtio::{Notifier, ServedQueue};

/// The transmit queue in service.
pub struct Transmitter {
    queue: ServedQueue,
    chain: Chain,
    /// Whether `chain` is a frame that the gate did not take. It is paid for.
    held: bool,
    counters: Arc<NetCounters>,
}

impl Transmitter {
    /// Serves `queue`.
    pub fn new(queue: ServedQueue, counters: Arc<NetCounters>) -> Self {
        Self {
            chain: queue.new_chain(),
            queue,
            held: false,
            counters,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &ServedQueue {
        &self.queue
    }

    /// Moves frames until there are none, or no room, or the limits are used up, or others have to get their turn. What
    /// they tell of the guest's addresses is noted.
    pub fn serve(&mut self, cable: &mut Cable, throttle: &mut Throttle, notifier: &Notifier) -> Result<(), QueueError> {
        let mut turn = self.queue.begin_turn(FRAMES_PER_TURN)?;
        while self.next_frame(&mut turn, throttle)? && self.send(cable)? {}
        self.queue.notify(notifier)
    }

    /// Has the gate send what it holds and may send; if a frame waited for that, frames are moved again.
    pub fn serve_after_flush(
        &mut self,
        cable: &mut Cable,
        throttle: &mut Throttle,
        notifier: &Notifier,
    ) -> Result<(), QueueError> {
        cable.gate.flush();
        if self.held {
            self.serve(cable, throttle, notifier)?;
        }
        Ok(())
    }

    /// The queue, as if a frame still held had never been taken.
    pub fn into_queue(mut self) -> Queue {
        self.queue.unpop(self.held.into());
        self.queue.into_queue()
    }

    /// Has a frame in `chain`, if there is one that may leave. One that may not is still in the queue.
    fn next_frame(&mut self, turn: &mut Turn, throttle: &mut Throttle) -> Result<bool, QueueError> {
        if !self.held && !throttle.is_waiting() && self.queue.pop(turn, &mut self.chain)? {
            self.held = throttle.admit(self.frame_len());
            if !self.held {
                self.counters.tx_throttled.add(1);
                self.queue.unpop(1);
            }
        }
        Ok(self.held)
    }

    /// Bytes of the frame in `chain`, without its header. What is too long for a frame counts as the longest: it costs
    /// something, but not more than the host has to do.
    fn frame_len(&self) -> u64 {
        let len = self.chain.readable.len().min(FRAME_LEN_MAX);
        len.saturating_sub(HEADER_LEN) as u64
    }

    /// Sends the frame in `chain` on its way; false if it has to wait.
    fn send(&mut self, cable: &mut Cable) -> Result<bool, QueueError> {
        let frame = &self.chain.readable;
        let passage = if !(HEADER_LEN..=FRAME_LEN_MAX).contains(&frame.len()) {
            let reason = format!("{} bytes make no frame", frame.len());
            cable.gate.refuse(&io::Error::new(io::ErrorKind::InvalidInput, reason));
            Passage::Refused
        } else if let Some(mmds) = &mut cable.mmds
            && hand_over(frame, mmds)?
        {
            self.done()?;
            return Ok(true);
        } else {
            cable.gate.pass(frame)
        };
        match passage {
            Passage::Taken => {
                cable.seen.sent(frame);
                self.counters.tx_frames.add(1);
                self.counters.tx_bytes.add(self.frame_len());
            }
            Passage::Refused => {}
            Passage::Waits => return Ok(false),
        }
        self.done()?;
        Ok(true)
    }

    /// Gives the buffers of the frame in `chain` back.
    fn done(&mut self) -> Result<(), QueueError> {
        self.held = false;
        self.queue.push_used(self.chain.head, 0)
    }
}

/// Gives `frame` to the metadata service if it is for that; whether it is.
fn hand_over(frame: &GuestBuffers, mmds: &mut Endpoint) -> Result<bool, QueueError> {
    let mut beginning = [0; HEADER_LEN + CLAIM_LEN];
    if frame.copy_to(&mut beginning)? < beginning.len() {
        return Ok(false);
    }
    let (_, first) = beginning.split_last_chunk().expect("it ends with what is claimed by");
    if !mmds.claims(first) {
        return Ok(false);
    }
    // The guest may write to its frame meanwhile: what it was claimed by is not looked at again.
    let mut copy = vec![0; frame.len()];
    let len = frame.copy_to(&mut copy)?;
    copy.truncate(len);
    copy.drain(..HEADER_LEN.min(len));
    mmds.take(copy);
    Ok(true)
}
