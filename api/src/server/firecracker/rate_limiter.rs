//! Rate limiters in the bodies of drives, network interfaces and the entropy device.

use cutover_snapshot::spec::{RateLimiterSpec, TokenBucketSpec};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Limits of bytes and of operations; a limit that is not given does not limit, or is left as it is by a PATCH.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A bucket of `size` tokens that is filled evenly in `refill_time`; if either is 0, there is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Most tokens it holds, and what it holds at first.
    pub size: u64,
    /// Tokens to spend before those of the bucket; they do not come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Time in which an empty bucket gets full, in milliseconds.
    pub refill_time: u64,
}

impl From<RateLimiter> for RateLimiterSpec {
    fn from(limiter: RateLimiter) -> Self {
        Self {
            bandwidth: limiter.bandwidth.map(Into::into),
            ops: limiter.ops.map(Into::into),
        }
    }
}

impl From<TokenBucket> for TokenBucketSpec {
    fn from(bucket: TokenBucket) -> Self {
        Self {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst,
            refill_time_ms: bucket.refill_time,
        }
    }
}

impl From<RateLimiterSpec> for RateLimiter {
    fn from(spec: RateLimiterSpec) -> Self {
        Self {
            bandwidth: spec.bandwidth.map(Into::into),
            ops: spec.ops.map(Into::into),
        }
    }
}

impl From<TokenBucketSpec> for TokenBucket {
    fn from(spec: TokenBucketSpec) -> Self {
        Self {
            size: spec.size,
            one_time_burst: spec.one_time_burst,
            refill_time: spec.refill_time_ms,
        }
    }
}

/// The limits of the spec that an optional limiter of a body means.
pub fn limits(limiter: Option<RateLimiter>) -> RateLimiterSpec {
    limiter.map(Into::into).unwrap_or_default()
}

/// The limiter of a body that says what `spec` says: none if it limits nothing.
pub fn limiter(spec: RateLimiterSpec) -> Option<RateLimiter> {
    (!spec.is_unlimited()).then(|| spec.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limiter_becomes_the_same_limiter_of_the_spec() {
        let json = r#"{"bandwidth":{"size":1048576,"one_time_burst":4096,"refill_time":100},"ops":null}"#;
        let limiter: RateLimiter = serde_json::from_str(json).expect("Firecracker's form");
        let spec = RateLimiterSpec {
            bandwidth: Some(TokenBucketSpec {
                size: 1 << 20,
                one_time_burst: Some(4096),
                refill_time_ms: 100,
            }),
            ops: None,
        };
        assert_eq!(RateLimiterSpec::from(limiter), spec);
        assert_eq!(RateLimiter::from(spec), limiter);
    }

    #[test]
    fn a_bucket_needs_its_size_and_refill_time_and_nothing_else() {
        for (json, reason) in [
            (r#"{"ops":{"size":1}}"#, "missing field `refill_time`"),
            (r#"{"ops":{"refill_time":1}}"#, "missing field `size`"),
            (r#"{"ops":{"size":-1,"refill_time":1}}"#, "invalid value: integer `-1`"),
            (r#"{"ops":{"size":1,"refill_time":1,"rate":1}}"#, "unknown field `rate`"),
            (r#"{"iops":{}}"#, "unknown field `iops`"),
        ] {
            let error = serde_json::from_str::<RateLimiter>(json).expect_err(json).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
