//! Rate limits of a queue: so many bytes and so many operations in a time, by two token buckets.
//!
//! [`TokenBucket`] is the arithmetic, [`Throttle`] puts two of them and a timer in front of a queue. A device asks
//! before it serves a request; if it may not, it leaves the request in the queue, serves no more of them, and goes on
//! when the timer calls it:
//!
//! ```text
//!            admit: no ─► timer set                    update ─► timer rings at once
//!   Open ───────────────────────────► Waiting ──────────────────────────────────────► Open
//!                                        │                                             ▲
//!                                        └── the timer rings; the device calls resume ─┘
//! ```
//!
//! Nothing is taken from the queue and held here, so a pause or a reset has nothing to lose. The timer rings at most
//! once in [`WAIT_MIN`]; a bucket that fills much faster than the host wakes the event loop loses what it cannot hold.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use cutover_snapshot::spec::RateLimiterSpec;
use event_manager::EventOps;

use self::bucket::TokenBucket;
use super::DeviceError;
use crate::timer::Timer;

mod bucket;
#[cfg(test)]
mod tests;

/// Shortest time for which a queue is left alone, so that small requests are served several at a time.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// Longest time for which the timer is set: it rings, and is set anew.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Holds back a queue that uses up its limits.
pub struct Throttle {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    /// Made before the thread that sets it is confined, whether it will ever be used or not.
    timer: Timer,
    waiting: bool,
}

impl Throttle {
    /// One with the limits of `spec`.
    ///
    /// # Errors
    /// No timer can be had.
    pub fn new(spec: &RateLimiterSpec) -> Result<Self, DeviceError> {
        let mut throttle = Self {
            bandwidth: None,
            ops: None,
            timer: Timer::new("a rate limiter")?,
            waiting: false,
        };
        throttle.replace_buckets(spec);
        Ok(throttle)
    }

    /// Changes the limits: a bucket in `spec` takes the place of the one there is and begins full. A queue that waits
    /// tries again.
    pub fn update(&mut self, spec: &RateLimiterSpec) {
        self.replace_buckets(spec);
        if self.waiting {
            self.set_timer(Duration::from_nanos(1));
        }
    }

    /// Whether an operation of `bytes` bytes may be done now; it is paid for then. If not, the queue waits.
    pub fn admit(&mut self, bytes: u64) -> bool {
        let admitted = self.allows(bytes);
        if admitted {
            self.charge(bytes);
        }
        admitted
    }

    /// Whether anything may be done now. For an operation whose size is known only when it is done: it may be larger
    /// than what is left, and is then paid for afterwards. If not, the queue waits.
    pub fn allows_any(&mut self) -> bool {
        self.allows(1)
    }

    /// Takes what an operation of `bytes` bytes costs.
    pub fn charge(&mut self, bytes: u64) {
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
    }

    /// Whether the queue is to be left alone until the timer rings.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// The timer rang: the queue may be tried again.
    pub fn resume(&mut self) {
        self.waiting = false;
    }

    /// Has the event loop report the timer with `data`; [`resume`](Self::resume) is to be called then.
    pub fn watch(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        self.timer.watch(ops, data)
    }

    /// Has the event loop report the timer no more.
    pub fn ignore(&self, ops: &mut EventOps) {
        self.timer.ignore(ops);
    }

    fn allows(&mut self, bytes: u64) -> bool {
        if self.bandwidth.is_none() && self.ops.is_none() {
            return true;
        }
        let now = Instant::now();
        let wait = |bucket: &mut Option<TokenBucket>, tokens| bucket.as_mut().map(|bucket| bucket.wait(tokens, now));
        let waits = [wait(&mut self.bandwidth, bytes), wait(&mut self.ops, 1)];
        let longest = waits.into_iter().flatten().max().unwrap_or_default();
        if longest.is_zero() {
            return true;
        }
        self.waiting = true;
        self.set_timer(longest.clamp(WAIT_MIN, WAIT_MAX));
        false
    }

    fn replace_buckets(&mut self, spec: &RateLimiterSpec) {
        let now = Instant::now();
        for (bucket, spec) in [(&mut self.bandwidth, spec.bandwidth), (&mut self.ops, spec.ops)] {
            if let Some(spec) = spec {
                *bucket = TokenBucket::new(&spec, now);
            }
        }
    }

    fn set_timer(&mut self, wait: Duration) {
        if let Err(error) = self.timer.set(wait) {
            // Better no limit than a queue that stands still for ever.
            tracing::error!(%error, fd = self.timer.as_raw_fd(), "cannot set a rate limiter's timer; it limits no more");
            (self.bandwidth, self.ops, self.waiting) = (None, None, false);
        }
    }
}
