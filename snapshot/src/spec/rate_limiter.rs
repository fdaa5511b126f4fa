//! How much a device may do in a given time: two token buckets, one of bytes and one of operations.
//!
//! The numbers mean what they mean in Firecracker's API. A bucket holds at most `size` tokens, begins full, and gains
//! `size` tokens in each `refill_time_ms`, evenly; `one_time_burst` tokens more are there once, at the beginning.
//! What has no token waits.

use serde::{Deserialize, Serialize};

/// The limits of one device, or of one direction of a network interface.
///
/// As an update of a device in service, a bucket that is not given leaves the one there is; see [`updated`](Self::updated).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterSpec {
    /// Tokens are bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketSpec>,
    /// Tokens are operations: requests of a disk, frames of a network interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketSpec>,
}

/// One bucket. A size or a refill time of 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketSpec {
    /// Most tokens in the bucket, and what it gains in a refill time.
    pub size: u64,
    /// Tokens beyond the size that can be spent once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket becomes full.
    pub refill_time_ms: u64,
}

impl RateLimiterSpec {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        let limits = |bucket: &Option<TokenBucketSpec>| bucket.is_some_and(|bucket| bucket.limits());
        !limits(&self.bandwidth) && !limits(&self.ops)
    }

    /// These limits after an update with `newer`: each bucket it gives replaces the one here.
    #[must_use]
    pub fn updated(self, newer: Self) -> Self {
        Self {
            bandwidth: newer.bandwidth.or(self.bandwidth),
            ops: newer.ops.or(self.ops),
        }
    }
}

impl TokenBucketSpec {
    /// A bucket through which `rate` tokens pass in a second, and which lets no more than a tenth of them through at
    /// once; all of them if they are so few that a tenth would not be a whole number.
    pub fn per_second(rate: u64) -> Self {
        /// From here on, rounding to ten changes the rate by less than one percent.
        const MANY: u64 = 1000;
        let (size, refill_time_ms) = if rate >= MANY || rate.is_multiple_of(10) {
            (rate / 10, 100)
        } else {
            (rate, 1000)
        };
        Self {
            size,
            one_time_burst: None,
            refill_time_ms,
        }
    }

    /// Whether it limits anything.
    pub fn limits(&self) -> bool {
        self.size > 0 && self.refill_time_ms > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(size: u64, refill_time_ms: u64) -> TokenBucketSpec {
        TokenBucketSpec {
            size,
            one_time_burst: None,
            refill_time_ms,
        }
    }

    #[test]
    fn a_limiter_reads_back_from_json_as_itself() {
        let json = r#"{"bandwidth":{"size":1048576,"one_time_burst":4096,"refill_time_ms":100},"ops":{"size":5,"refill_time_ms":1000}}"#;
        let spec: RateLimiterSpec = serde_json::from_str(json).expect("a limiter");
        assert_eq!(spec.bandwidth.and_then(|bucket| bucket.one_time_burst), Some(4096));
        assert_eq!(spec.ops, Some(bucket(5, 1000)));
        assert_eq!(serde_json::to_string(&spec).expect("written"), json);
        assert_eq!(
            serde_json::from_str::<RateLimiterSpec>("{}").expect("no limits"),
            RateLimiterSpec::default()
        );
    }

    #[test]
    fn a_bucket_without_its_numbers_and_unknown_fields_are_refused() {
        for json in [
            r#"{"bandwidth":{"size":1}}"#,
            r#"{"ops":{"refill_time_ms":1}}"#,
            r#"{"ops":{"size":-1,"refill_time_ms":1}}"#,
            r#"{"iops":{"size":1,"refill_time_ms":1}}"#,
        ] {
            serde_json::from_str::<RateLimiterSpec>(json).expect_err(json);
        }
    }

    #[test]
    fn a_size_or_refill_time_of_zero_is_no_limit() {
        let ops = |bucket| RateLimiterSpec {
            bandwidth: None,
            ops: Some(bucket),
        };
        assert!(RateLimiterSpec::default().is_unlimited());
        assert!(ops(bucket(0, 100)).is_unlimited());
        assert!(ops(bucket(100, 0)).is_unlimited());
        assert!(!ops(bucket(1, 1)).is_unlimited());
    }

    #[test]
    fn an_update_replaces_the_buckets_it_gives_and_leaves_the_others() {
        let limits = RateLimiterSpec {
            bandwidth: Some(bucket(1000, 100)),
            ops: Some(bucket(10, 100)),
        };
        let off = RateLimiterSpec {
            bandwidth: Some(bucket(0, 0)),
            ops: None,
        };
        assert_eq!(limits.updated(RateLimiterSpec::default()), limits);
        assert_eq!(
            limits.updated(off),
            RateLimiterSpec {
                bandwidth: Some(bucket(0, 0)),
                ..limits
            }
        );
    }

    #[test]
    fn a_rate_per_second_is_cut_into_tenths_where_that_keeps_the_rate() {
        assert_eq!(TokenBucketSpec::per_second(100 << 20), bucket(10 << 20, 100));
        assert_eq!(TokenBucketSpec::per_second(500), bucket(50, 100));
        assert_eq!(TokenBucketSpec::per_second(15), bucket(15, 1000));
        assert_eq!(TokenBucketSpec::per_second(1), bucket(1, 1000));
    }
}
