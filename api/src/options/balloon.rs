//! The value of `--balloon`.

use cutover_snapshot::spec::BalloonSpec;

use super::key_value::{KeyValues, OptionError};

const AMOUNT: &str = "amount";
const STATS: &str = "stats";
const DEFLATE_ON_OOM: &str = "deflate-on-oom";
const REPORTING: &str = "reporting";

/// Reads `amount=SIZE[,deflate-on-oom][,stats=SECONDS][,reporting]`; the amount is none if not given.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn balloon(text: &str) -> Result<BalloonSpec, OptionError> {
    let values = KeyValues::parse(text, &[AMOUNT, STATS], &[DEFLATE_ON_OOM, REPORTING])?;
    Ok(BalloonSpec {
        amount: values.value(AMOUNT)?.unwrap_or_default(),
        deflate_on_oom: values.has(DEFLATE_ON_OOM),
        stats_interval_s: values.value(STATS)?.unwrap_or_default(),
        free_page_reporting: values.has(REPORTING),
    })
}

#[cfg(test)]
mod tests {
    use cutover_snapshot::size::ByteSize;

    use super::*;

    #[test]
    fn a_balloon_is_read_with_any_of_its_keys() {
        let all = BalloonSpec {
            amount: ByteSize::from_mib(64),
            deflate_on_oom: true,
            stats_interval_s: 5,
            free_page_reporting: true,
        };
        assert_eq!(balloon("amount=64M,deflate-on-oom,stats=5,reporting"), Ok(all));
        let reporting = BalloonSpec {
            free_page_reporting: true,
            ..BalloonSpec::default()
        };
        assert_eq!(balloon("reporting"), Ok(reporting));
    }

    #[test]
    fn what_is_no_balloon_is_refused_by_the_name_of_the_key() {
        for (text, start) in [
            ("amount=x", "amount: 'x'"),
            ("stats=-1", "stats: '-1'"),
            ("size=3", "there is no key 'size'"),
        ] {
            let error = balloon(text).expect_err(text).to_string();
            assert!(error.starts_with(start), "{error}");
        }
    }
}
