//! A network interface with rate limiters, and what it counts.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::*;
use crate::stats::NetStats;
use crate::virtio::testing::{NO_LIMITS, TWO_OPERATIONS, bucket};

/// A guest with a limited interface, a way to the interface, and the other end of its cable.
fn limited(rx_rate_limiter: RateLimiterSpec, tx_rate_limiter: RateLimiterSpec) -> (Guest, Arc<Mutex<Net>>, OwnedFd) {
    let (net, cable) = device_of(&NetSpec {
        rx_rate_limiter,
        tx_rate_limiter,
        ..spec()
    });
    let net = Arc::new(Mutex::new(net));
    let mut guest = Guest::sharing(net.clone());
    guest.start(MERGEABLE);
    (guest, net, cable)
}

fn stats(net: &Mutex<Net>) -> NetStats {
    net.lock().unwrap().counters().read(String::new())
}

fn lift_limits(guest: &Guest, net: &Arc<Mutex<Net>>) {
    let net = net.clone();
    guest.on_loop(move || net.lock().unwrap().limit(&NO_LIMITS, &NO_LIMITS));
}

/// Posts buffers of 32 KiB; three are needed before the longest frame might fit.
fn post_buffers(guest: &mut Guest, count: u64) {
    for index in 0..count {
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * index, 0x8000)]);
    }
    guest.kick(RX);
}

#[test]
fn frames_sent_beyond_the_limits_wait_and_leave_in_order_when_these_are_lifted() {
    let (mut guest, net, cable) = limited(RateLimiterSpec::default(), TWO_OPERATIONS);
    for number in 0..5 {
        offer_frame(&mut guest, TX_DATA + 0x1000 * u64::from(number), &frame(number, 100));
    }
    guest.kick(TX);
    guest.until(|| stats(&net).tx_throttled == 1);
    for number in 0..2 {
        assert_eq!(receive(&cable), frame(number, 100));
    }
    guest.transport.pause();
    guest.transport.resume();
    guest.kick(TX);
    guest.on_loop(|| ());
    assert_eq!(read(&cable, &mut [0; 16]), Err(rustix::io::Errno::AGAIN));
    lift_limits(&guest, &net);
    for number in 2..5 {
        assert_eq!(receive(&cable), frame(number, 100));
    }
    for head in 0..5 {
        assert_eq!(guest.take_used(TX), (head, 0));
    }
}

#[test]
fn frames_received_beyond_the_limits_stay_on_the_host_and_arrive_in_order_when_these_are_lifted() {
    let (mut guest, net, cable) = limited(TWO_OPERATIONS, RateLimiterSpec::default());
    post_buffers(&mut guest, 10);
    for number in 0..5 {
        write(&cable, &frame(number, 100)).unwrap();
    }
    guest.until(|| stats(&net).rx_throttled == 1);
    guest.transport.pause();
    guest.transport.resume();
    assert_eq!((guest.take_used(RX), guest.take_used(RX)), ((0, 112), (1, 112)));
    assert_eq!(guest.try_take_used(RX), None);
    lift_limits(&guest, &net);
    for number in 2..5 {
        assert_eq!(guest.take_used(RX), (number, 112));
    }
    for number in 0..5_u8 {
        let at = RX_DATA + 0x1_0000 * u64::from(number);
        assert_eq!(guest.read(at, 112), in_buffers(&frame(number, 100), 1));
    }
}

#[test]
fn a_limit_in_one_direction_leaves_the_other_alone() {
    let (mut guest, _net, cable) = limited(TWO_OPERATIONS, RateLimiterSpec::default());
    for number in 0..10 {
        offer_frame(&mut guest, TX_DATA + 0x1000 * u64::from(number), &frame(number, 100));
        guest.kick(TX);
        assert_eq!(receive(&cable), frame(number, 100));
    }
}

#[test]
fn a_driver_that_resets_its_interface_while_frames_wait_starts_afresh() {
    let (mut guest, net, cable) = limited(TWO_OPERATIONS, TWO_OPERATIONS);
    for number in 0..4 {
        offer_frame(&mut guest, TX_DATA + 0x1000 * u64::from(number), &frame(number, 100));
    }
    guest.kick(TX);
    guest.until(|| stats(&net).tx_throttled == 1);
    assert_eq!((receive(&cable), receive(&cable)), (frame(0, 100), frame(1, 100)));
    guest.start(MERGEABLE);
    offer_frame(&mut guest, TX_DATA, &frame(9, 100));
    guest.kick(TX);
    lift_limits(&guest, &net);
    assert_eq!(receive(&cable), frame(9, 100));
    post_buffers(&mut guest, 3);
    write(&cable, &frame(8, 50)).unwrap();
    assert_eq!(guest.take_used(RX), (0, 62));
}

#[test]
fn no_more_bytes_pass_than_the_bucket_and_the_time_allow() {
    const SIZE: u64 = 8000;
    const REFILL_MS: u64 = 10;
    const FRAME: usize = 1000;
    let limits = RateLimiterSpec {
        bandwidth: bucket(SIZE, REFILL_MS),
        ops: None,
    };
    let start = Instant::now();
    let (mut guest, net, cable) = limited(limits, limits);
    post_buffers(&mut guest, u64::from(QUEUE_SIZE));
    for number in 0..=u8::MAX {
        offer_frame(
            &mut guest,
            TX_DATA + 0x1000 * u64::from(number % 8),
            &frame(number, FRAME),
        );
        guest.kick(TX);
        assert_eq!(receive(&cable), frame(number, FRAME));
        guest.take_used(TX);
    }
    for number in 0..=u8::MAX {
        write(&cable, &frame(number, FRAME)).unwrap();
        let (head, _) = guest.take_used(RX);
        let at = RX_DATA + 0x1_0000 * u64::from(head);
        assert_eq!(guest.read(at, FRAME + 12), in_buffers(&frame(number, FRAME), 1));
        guest.offer(RX, &[Piece::In(at, 0x8000)]);
        guest.kick(RX);
    }
    let refilled = start.elapsed().as_nanos() * u128::from(SIZE) / u128::from(REFILL_MS * 1_000_000);
    let stats = stats(&net);
    let (sent, received) = (u128::from(stats.tx_bytes), u128::from(stats.rx_bytes));
    assert_eq!((sent, received), (256 * FRAME as u128, 256 * FRAME as u128));
    assert!(sent <= u128::from(SIZE) + refilled);
    // The length of a frame is known when it has been received.
    assert!(received <= u128::from(SIZE) + refilled + FRAME as u128);
    assert!(stats.tx_throttled > 0 && stats.rx_throttled > 0);
}

#[test]
fn frames_are_counted_without_their_header_and_drops_apart() {
    let (mut guest, net, cable) = limited(RateLimiterSpec::default(), RateLimiterSpec::default());
    offer_frame(&mut guest, TX_DATA, &frame(1, 60));
    guest.kick(TX);
    assert_eq!(receive(&cable), frame(1, 60));
    guest.take_used(TX);
    assert_eq!(guest.request(TX, &[Piece::Out(TX_DATA, 11)]), 0);
    assert_eq!(guest.request(TX, &[Piece::Out(TX_DATA, 0x2_0000)]), 0);
    post_buffers(&mut guest, 3);
    write(&cable, &frame(2, 70)).unwrap();
    guest.take_used(RX);
    let expected = NetStats {
        rx_frames: 1,
        rx_bytes: 70,
        tx_frames: 1,
        tx_bytes: 60,
        tx_dropped: 2,
        ..NetStats::default()
    };
    assert_eq!(stats(&net), expected);
}
