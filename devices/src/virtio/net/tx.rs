//! Frames of the guest: from its buffers straight through the gate.

use std::io;

use virtio_queue::Queue;

use super::gate::Gate;
use super::{FRAME_LEN_MAX, FRAMES_PER_TURN, HEADER_LEN};
use crate::virtio::log_limit::LogLimit;
use crate::virtio::queue::{Chain, QueueError, Turn};
use crate::virtio::{Notifier, ServedQueue};

/// The transmit queue in service.
pub struct Transmitter {
    queue: ServedQueue,
    chain: Chain,
    /// Whether `chain` is a frame that the gate had no room for.
    held: bool,
    drops_logged: LogLimit,
}

impl Transmitter {
    /// Serves `queue`.
    pub fn new(queue: ServedQueue) -> Self {
        Self {
            chain: queue.new_chain(),
            queue,
            held: false,
            drops_logged: LogLimit::default(),
        }
    }

    /// The queue.
    pub fn queue(&self) -> &ServedQueue {
        &self.queue
    }

    /// Whether a frame waits for room at the gate.
    pub fn holds_frame(&self) -> bool {
        self.held
    }

    /// Moves frames until there are none, or no room, or others have to get their turn.
    pub fn serve(&mut self, gate: &mut Gate, notifier: &Notifier) -> Result<(), QueueError> {
        let mut turn = self.queue.begin_turn(FRAMES_PER_TURN)?;
        while self.next_frame(&mut turn)? && self.send(gate, notifier)? {}
        self.queue.notify(notifier)
    }

    /// The queue, as if a frame still held had never been taken.
    pub fn into_queue(mut self) -> Queue {
        self.queue.unpop(self.held.into());
        self.queue.into_queue()
    }

    /// Has a frame in `chain`, if there is one.
    fn next_frame(&mut self, turn: &mut Turn) -> Result<bool, QueueError> {
        if !self.held {
            self.held = self.queue.pop(turn, &mut self.chain)?;
        }
        Ok(self.held)
    }

    /// Sends the frame in `chain` on its way; false if it has to wait.
    fn send(&mut self, gate: &mut Gate, notifier: &Notifier) -> Result<bool, QueueError> {
        let frame = &self.chain.readable;
        let passed = if (HEADER_LEN..=FRAME_LEN_MAX).contains(&frame.len()) {
            gate.pass(frame)
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} bytes make no frame", frame.len()),
            ))
        };
        match passed {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if self.drops_logged.allows() => {
                tracing::warn!(device = notifier.name(), %error, "frame of the guest dropped");
            }
            _ => {}
        }
        self.held = false;
        self.queue.push_used(self.chain.head, 0)?;
        Ok(true)
    }
}
