//! What it costs to hold a frame: copying it in and sending it later instead of sending it at once.
//!
//! Prints nanoseconds per frame; docs/benchmarks.md has those of an optimised build.

use std::time::{Duration, Instant};

use super::*;

const FRAMES: u32 = 2000;
/// What an epoch may have.
const BATCH: u32 = 100;

/// Time taken to pass frames of `len` bytes to `to`, and afterwards to release them, by a gate that took `step`.
fn pass(step: Step, to: [u8; 6], len: usize) -> [Duration; 2] {
    let mut fixture = Fixture::new();
    fixture.gate.limit = HELD_BYTES_MAX;
    set_socket_send_buffer_size(&fixture.gate.tap, 1 << 20).unwrap();
    fixture.memory.write_slice(&frame(0, to, len), GuestAddress(0)).unwrap();
    let mut buffers = GuestBuffers::new(fixture.memory.clone());
    buffers.push(GuestAddress(0), len).unwrap();
    fixture.take(step);
    let (mut passing, mut releasing, mut received) = (Duration::ZERO, Duration::ZERO, 0);
    for epoch in 2..2 + u64::from(FRAMES / BATCH) {
        for _ in 0..BATCH {
            let start = Instant::now();
            let passage = fixture.gate.pass(&buffers);
            passing += start.elapsed();
            assert_eq!(passage, Passage::Taken);
            received += fixture.receive_all().len();
        }
        fixture.gate.take(Step::Cut(epoch));
        fixture.gate.take(Step::Release(epoch - 1));
        while fixture.gate.held().frames > 0 {
            let start = Instant::now();
            fixture.gate.flush();
            releasing += start.elapsed();
            received += fixture.receive_all().len();
        }
    }
    assert_eq!(received, FRAMES as usize);
    [passing / FRAMES, releasing / FRAMES]
}

#[test]
fn every_frame_that_was_held_is_released_at_some_cost() {
    for len in [HEADER_LEN + 60, HEADER_LEN + 1514, HEADER_LEN + (64 << 10)] {
        let [open, _] = pass(Step::Open, STRANGER, len);
        let [inside, _] = pass(hold(1), MEMBER, len);
        let [held, released] = pass(hold(1), STRANGER, len);
        println!("{len:6} bytes: open {open:?}, to a member {inside:?}, held {held:?} and released {released:?}");
    }
}
