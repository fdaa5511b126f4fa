//! The cable between the guest's interface and the service: one frame towards it, and a bounded queue of frames back.

use std::collections::VecDeque;

use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// Most frames that wait until the guest has buffers for them.
const FRAMES_MAX: usize = 64;

/// See the module.
pub struct Wire {
    /// From the guest, not taken yet.
    arrived: Option<Vec<u8>>,
    /// For the guest.
    waiting: VecDeque<Vec<u8>>,
    /// Whether there was more for the guest than can wait.
    was_full: bool,
    /// Zeroes in front of each frame for the guest.
    headroom: usize,
    /// Most bytes of a frame for the guest.
    frame_max: usize,
}

/// A frame from the guest.
pub struct Arrived(Vec<u8>);

/// Room for a frame to the guest.
pub struct Room<'a> {
    waiting: &'a mut VecDeque<Vec<u8>>,
    headroom: usize,
}

impl Wire {
    /// Of frames of at most `frame_max` bytes, with `headroom` zeroes in front of each for the guest.
    pub fn new(frame_max: usize, headroom: usize) -> Self {
        Self {
            arrived: None,
            waiting: VecDeque::new(),
            was_full: false,
            headroom,
            frame_max,
        }
    }

    /// A frame of the guest; false if the one before has not been taken yet, and it is dropped.
    pub fn bring(&mut self, frame: Vec<u8>) -> bool {
        let has_room = self.arrived.is_none();
        if has_room {
            self.arrived = Some(frame);
        }
        has_room
    }

    /// The next frame for the guest.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        self.waiting.pop_front()
    }

    /// Whether a frame waits for the guest.
    pub fn has_next(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether there was more for the guest than could wait since this was last asked.
    pub fn take_was_full(&mut self) -> bool {
        std::mem::take(&mut self.was_full)
    }

    fn has_room(&mut self) -> bool {
        let has_room = self.waiting.len() < FRAMES_MAX;
        self.was_full |= !has_room;
        has_room
    }
}

impl Device for Wire {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Arrived, Room<'_>)> {
        // What is asked may have to be answered at once.
        if !self.has_room() {
            return None;
        }
        let frame = self.arrived.take()?;
        self.transmit(now).map(|room| (Arrived(frame), room))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Room<'_>> {
        self.has_room().then_some(Room {
            waiting: &mut self.waiting,
            headroom: self.headroom,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::default();
        // Nothing is lost on the way here, and a guest may leave the sums of its segments to its device.
        (checksum.ipv4, checksum.tcp) = (Checksum::Tx, Checksum::Tx);
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.frame_max;
        capabilities.checksum = checksum;
        capabilities
    }
}

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; self.headroom + len];
        let filled = fill(&mut frame[self.headroom..]);
        self.waiting.push_back(frame);
        filled
    }
}
