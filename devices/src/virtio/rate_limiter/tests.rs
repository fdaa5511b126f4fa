//! A throttle by itself, and in front of the simplest device.

use std::os::fd::BorrowedFd;

use cutover_snapshot::spec::RngSpec;

use super::*;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{DATA, Guest, NO_LIMITS, Piece, TWO_OPERATIONS, bucket, wait_readable};

fn throttle(bandwidth: Option<u64>, ops: Option<u64>) -> Throttle {
    let spec = RateLimiterSpec {
        bandwidth: bandwidth.and_then(|size| bucket(size, 3_600_000)),
        ops: ops.and_then(|size| bucket(size, 3_600_000)),
    };
    Throttle::new(&spec).unwrap()
}

fn wait_for_timer(throttle: &Throttle) {
    // SAFETY: the throttle owns the descriptor and outlives the borrow.
    wait_readable(unsafe { BorrowedFd::borrow_raw(throttle.timer.as_raw_fd()) });
}

#[test]
fn without_limits_everything_is_admitted() {
    for mut throttle in [throttle(None, None), throttle(Some(0), Some(0))] {
        assert!((0..1000).all(|_| throttle.admit(u64::MAX)));
        assert!(!throttle.is_waiting());
    }
}

#[test]
fn each_of_the_two_buckets_limits() {
    let mut bytes = throttle(Some(1000), None);
    assert!(bytes.admit(600) && !bytes.admit(600) && bytes.is_waiting());
    let mut operations = throttle(None, Some(2));
    assert!(operations.admit(600) && operations.admit(600) && !operations.admit(0));
}

#[test]
fn what_is_not_admitted_costs_nothing() {
    let mut throttle = throttle(Some(1000), Some(2));
    assert!(throttle.admit(900));
    assert!((0..100).all(|_| !throttle.admit(200)));
    assert!(throttle.admit(50), "an operation was left");
    assert!(!throttle.admit(0));
}

#[test]
fn what_is_paid_for_afterwards_may_go_beyond_what_is_left() {
    let mut throttle = throttle(Some(1000), None);
    throttle.charge(999);
    assert!(throttle.allows_any());
    throttle.charge(500);
    assert!(!throttle.allows_any());
}

#[test]
fn the_timer_rings_when_something_is_there_again() {
    let spec = RateLimiterSpec {
        bandwidth: None,
        ops: bucket(1, 1),
    };
    let mut throttle = Throttle::new(&spec).unwrap();
    for _ in 0..10 {
        while throttle.admit(0) {}
        wait_for_timer(&throttle);
        assert!(throttle.is_waiting());
        throttle.resume();
        assert!(throttle.admit(0));
    }
}

#[test]
fn an_update_has_a_waiting_queue_try_again_and_leaves_the_bucket_it_does_not_give() {
    let mut throttle = throttle(Some(100), Some(1));
    assert!(throttle.admit(100) && !throttle.admit(1));
    throttle.update(&RateLimiterSpec {
        bandwidth: None,
        ops: bucket(5, 3_600_000),
    });
    wait_for_timer(&throttle);
    throttle.resume();
    assert!(!throttle.admit(1), "bytes are as they were");
    throttle.update(&NO_LIMITS);
    wait_for_timer(&throttle);
    throttle.resume();
    assert!(throttle.admit(1 << 40));
}

#[test]
fn the_entropy_device_gives_no_more_than_its_limits() {
    let rng = Rng::new(&RngSpec {
        rate_limiter: TWO_OPERATIONS,
    })
    .unwrap();
    let counters = rng.counters().clone();
    let mut guest = Guest::started(rng, 0);
    let heads = [0, 1, 2].map(|index| guest.offer(0, &[Piece::In(DATA + 0x100 * index, 32)]));
    guest.kick(0);
    guest.until(|| counters.read().throttled == 1);
    assert_eq!(guest.take_used(0), (heads[0], 32));
    assert_eq!(guest.take_used(0), (heads[1], 32));
    assert_eq!(guest.try_take_used(0), None);
    let stats = counters.read();
    assert_eq!((stats.requests, stats.bytes), (2, 64));
}
