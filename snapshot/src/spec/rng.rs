//! The entropy device in a spec: a switch, or an object where it has limits.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::RateLimiterSpec;

/// A virtio entropy device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngSpec {
    /// Limits: bytes given to the guest, and its requests.
    #[serde(default, skip_serializing_if = "RateLimiterSpec::is_unlimited")]
    pub rate_limiter: RateLimiterSpec,
}

/// What is written in a spec: `false`, `true` or `{"rate_limiter": …}`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Switch(bool),
    Device(RngSpec),
}

pub(super) fn serialize<S: Serializer>(rng: &Option<RngSpec>, serializer: S) -> Result<S::Ok, S::Error> {
    match rng {
        None => Written::Switch(false),
        Some(device) if device.rate_limiter.is_unlimited() => Written::Switch(true),
        Some(device) => Written::Device(*device),
    }
    .serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<RngSpec>, D::Error> {
    Ok(match Written::deserialize(deserializer)? {
        Written::Switch(false) => None,
        Written::Switch(true) => Some(RngSpec::default()),
        Written::Device(device) => Some(device),
    })
}

#[cfg(test)]
mod tests {
    use super::super::TokenBucketSpec;
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Holder {
        #[serde(default, with = "super")]
        rng: Option<RngSpec>,
    }

    fn read(json: &str) -> Option<RngSpec> {
        serde_json::from_str::<Holder>(json).expect(json).rng
    }

    #[test]
    fn an_entropy_device_is_a_switch_or_an_object() {
        let limited = RngSpec {
            rate_limiter: RateLimiterSpec {
                bandwidth: Some(TokenBucketSpec::per_second(4096)),
                ops: None,
            },
        };
        assert_eq!(read("{}"), None);
        assert_eq!(read(r#"{"rng":false}"#), None);
        assert_eq!(read(r#"{"rng":true}"#), Some(RngSpec::default()));
        assert_eq!(read(r#"{"rng":{}}"#), Some(RngSpec::default()));
        assert_eq!(
            read(r#"{"rng":{"rate_limiter":{"bandwidth":{"size":409,"refill_time_ms":100}}}}"#),
            Some(limited)
        );
        for rng in [None, Some(RngSpec::default()), Some(limited)] {
            let json = serde_json::to_string(&Holder { rng }).expect("written");
            assert_eq!(read(&json), rng, "{json}");
        }
        assert_eq!(
            serde_json::to_string(&Holder {
                rng: Some(RngSpec::default())
            })
            .expect("written"),
            r#"{"rng":true}"#
        );
    }

    #[test]
    fn what_is_no_entropy_device_is_refused() {
        for json in [r#"{"rng":1}"#, r#"{"rng":{"limit":{}}}"#] {
            serde_json::from_str::<Holder>(json).expect_err(json);
        }
    }
}
