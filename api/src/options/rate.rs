//! Limits among the keys of `--disk` and `--net`: so many bytes, or operations, a second.

use std::num::NonZeroU64;

use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::TokenBucketSpec;

use super::key_value::{KeyValues, OptionError, bad_value};

/// What `key` says about bytes a second, written as a size.
///
/// # Errors
/// It is no size, or nothing.
pub fn bandwidth(values: &KeyValues, key: &'static str) -> Result<Option<TokenBucketSpec>, OptionError> {
    match values.value::<ByteSize>(key)?.map(ByteSize::bytes) {
        Some(0) => Err(bad_value(key, "0", "nothing could pass: leave it out for no limit")),
        rate => Ok(rate.map(TokenBucketSpec::per_second)),
    }
}

/// What `key` says about operations a second.
///
/// # Errors
/// It is no number, or 0.
pub fn operations(values: &KeyValues, key: &'static str) -> Result<Option<TokenBucketSpec>, OptionError> {
    let rate = values.value::<NonZeroU64>(key)?;
    Ok(rate.map(|rate| TokenBucketSpec::per_second(rate.get())))
}
