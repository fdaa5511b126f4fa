//! One token bucket: arithmetic alone, the time is told.
//!
//! Kept is what is *missing* from a full bucket, in fractions of a token so small that no rounding ever loses any: a
//! nanosecond brings a whole number of them.
//!
//! ```text
//!   tokens  size ┬ ─ ─ ─ full ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─     + what is left of the one-time burst
//!                │   ▲ missing
//!                │   ▼
//!              0 ┼ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
//!                │   debt, after a request larger than the bucket
//! ```

use std::time::{Duration, Instant};

use cutover_snapshot::spec::TokenBucketSpec;

const NANOSECONDS_PER_MILLISECOND: u64 = 1_000_000;

/// A bucket that limits.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Tokens of a full bucket; not 0.
    size: u64,
    /// Time in which an empty bucket becomes full, which is also the number of fractions of a token; not 0.
    refill_ns: u64,
    /// What is left of the one-time burst, in tokens.
    burst: u64,
    /// In fractions of a token; more than a full bucket's are a debt.
    missing: u128,
    /// When `missing` was true.
    updated: Instant,
}

impl TokenBucket {
    /// The full bucket of `spec`; none if it does not limit.
    pub fn new(spec: &TokenBucketSpec, now: Instant) -> Option<Self> {
        spec.limits().then(|| Self {
            size: spec.size,
            // Beyond what 64 bits hold, 584 years, nobody waits for the difference.
            refill_ns: spec.refill_time_ms.saturating_mul(NANOSECONDS_PER_MILLISECOND),
            burst: spec.one_time_burst.unwrap_or(0),
            missing: 0,
            updated: now,
        })
    }

    /// How long until `tokens` may be taken; nothing if they may be now.
    ///
    /// More than a full bucket holds may be taken from a full one; what is missing then is a debt that later requests
    /// wait for.
    pub fn wait(&mut self, tokens: u64, now: Instant) -> Duration {
        self.refill(now);
        let from_bucket = tokens.saturating_sub(self.burst).min(self.size);
        let may_be_missing = self.fractions(self.size - from_bucket);
        let too_many = self.missing.saturating_sub(may_be_missing);
        let nanoseconds = too_many.div_ceil(self.size.into());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Takes `tokens`, whether they are there or not: of the burst first.
    pub fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.missing = self.missing.saturating_add(self.fractions(tokens - from_burst));
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.updated).as_nanos();
        self.missing = self.missing.saturating_sub(elapsed.saturating_mul(self.size.into()));
        self.updated = now.max(self.updated);
    }

    fn fractions(&self, tokens: u64) -> u128 {
        u128::from(tokens) * u128::from(self.refill_ns)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(size: u64, refill_time_ms: u64, burst: u64, now: Instant) -> TokenBucket {
        let spec = TokenBucketSpec {
            size,
            one_time_burst: Some(burst),
            refill_time_ms,
        };
        TokenBucket::new(&spec, now).expect("it limits")
    }

    #[test]
    fn a_bucket_without_size_or_refill_time_does_not_limit() {
        for (size, refill_time_ms) in [(0, 100), (100, 0), (0, 0)] {
            let spec = TokenBucketSpec {
                size,
                one_time_burst: Some(1),
                refill_time_ms,
            };
            assert!(TokenBucket::new(&spec, Instant::now()).is_none());
        }
    }

    #[test]
    fn a_bucket_begins_full_and_fills_evenly() {
        let now = Instant::now();
        let mut bucket = bucket(1000, 100, 0, now);
        assert_eq!(bucket.wait(1000, now), Duration::ZERO);
        bucket.take(1000);
        assert_eq!(bucket.wait(1, now), Duration::from_micros(100));
        assert_eq!(
            bucket.wait(1000, now + Duration::from_millis(40)),
            Duration::from_millis(60)
        );
        let full = now + Duration::from_secs(3600);
        assert_eq!(bucket.wait(1000, full), Duration::ZERO);
        bucket.take(1000);
        assert_eq!(bucket.wait(1, full), Duration::from_micros(100));
    }

    #[test]
    fn the_burst_is_spent_once_and_first() {
        let now = Instant::now();
        let mut bucket = bucket(100, 100, 1000, now);
        assert_eq!(bucket.wait(1100, now), Duration::ZERO);
        bucket.take(1050);
        assert_eq!(bucket.wait(50, now), Duration::ZERO);
        assert_eq!(bucket.wait(51, now), Duration::from_millis(1));
        let later = now + Duration::from_secs(60);
        assert_eq!(bucket.wait(100, later), Duration::ZERO);
        bucket.take(100);
        assert_eq!(bucket.wait(100, later), Duration::from_millis(100));
    }

    #[test]
    fn a_request_larger_than_the_bucket_waits_until_it_is_full_and_is_paid_for_afterwards() {
        let now = Instant::now();
        let mut bucket = bucket(100, 100, 0, now);
        bucket.take(1);
        assert_eq!(bucket.wait(250, now), Duration::from_millis(1));
        let full = now + Duration::from_millis(1);
        assert_eq!(bucket.wait(250, full), Duration::ZERO);
        bucket.take(250);
        assert_eq!(bucket.wait(1, full), Duration::from_millis(151));
        assert_eq!(bucket.wait(250, full), Duration::from_millis(250));
    }

    #[test]
    fn numbers_at_the_end_of_their_range_do_no_harm() {
        let now = Instant::now();
        let mut bucket = bucket(u64::MAX, u64::MAX, u64::MAX, now);
        for _ in 0..3 {
            bucket.wait(u64::MAX, now);
            bucket.take(u64::MAX);
        }
        assert!(bucket.wait(1, now) > Duration::ZERO);
        bucket.wait(1, now + Duration::from_secs(1 << 40));
    }

    proptest! {
        /// Requests of any size at any times, each waiting as long as it is told.
        #[test]
        fn never_more_passes_than_the_bucket_the_burst_and_the_time_allow(
            size in 1..100_000_u64,
            refill_time_ms in 1..5000_u64,
            burst in 0..200_000_u64,
            requests in prop::collection::vec((0..150_000_u64, 0..10_000_000_u64), 1..200),
        ) {
            let start = Instant::now();
            let mut bucket = bucket(size, refill_time_ms, burst, start);
            let (mut now, mut passed, mut largest) = (start, 0_u128, size);
            for (tokens, idle_ns) in requests {
                now += Duration::from_nanos(idle_ns);
                let wait = bucket.wait(tokens, now);
                if wait > Duration::ZERO {
                    // Not a nanosecond earlier.
                    prop_assert!(bucket.clone().wait(tokens, now + wait - Duration::from_nanos(1)) > Duration::ZERO);
                    now += wait;
                    prop_assert_eq!(bucket.wait(tokens, now), Duration::ZERO);
                }
                bucket.take(tokens);
                passed += u128::from(tokens);
                largest = largest.max(tokens);
                let refilled = (now - start).as_nanos() * u128::from(size) / (u128::from(refill_time_ms) * 1_000_000);
                prop_assert!(passed <= u128::from(largest) + u128::from(burst) + refilled);
            }
        }

        /// Who always has something to send waits no longer than the rate demands, but for a nanosecond each time.
        #[test]
        fn nothing_of_the_rate_is_lost_under_load(
            size in 1..100_000_u64,
            refill_time_ms in 1..5000_u64,
            requests in prop::collection::vec(0..150_000_u64, 1..200),
        ) {
            let start = Instant::now();
            let mut bucket = bucket(size, refill_time_ms, 0, start);
            let (mut now, mut passed) = (start, 0_u128);
            for &tokens in &requests {
                now += bucket.wait(tokens, now);
                bucket.take(tokens);
                passed += u128::from(tokens);
            }
            let refill_ns = u128::from(refill_time_ms) * 1_000_000;
            let demanded = passed * refill_ns / u128::from(size);
            prop_assert!((now - start).as_nanos() <= demanded + requests.len() as u128);
        }
    }
}
