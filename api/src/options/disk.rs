//! The value of `--disk`.

use cutover_snapshot::spec::{DiskIo, DiskSpec, RateLimiterSpec};

use super::key_value::{KeyValues, OptionError, bad_value};
use super::rate;

const KEYS: [&str; 6] = ["path", "id", "serial", "io", "bandwidth", "iops"];

/// Reads `path=FILE[,readonly][,id=ID][,serial=TEXT][,io=auto|io-uring|threads][,bandwidth=SIZE][,iops=N]`.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn disk(text: &str) -> Result<DiskSpec, OptionError> {
    let values = KeyValues::parse(text, &KEYS, &["readonly"])?;
    Ok(DiskSpec {
        id: values.text("id").map(str::to_owned),
        path: values.text("path").ok_or(OptionError::Missing("path"))?.into(),
        readonly: values.has("readonly"),
        serial: values.text("serial").map(str::to_owned),
        io: values.text("io").map_or(Ok(DiskIo::default()), io)?,
        rate_limiter: RateLimiterSpec {
            bandwidth: rate::bandwidth(&values, "bandwidth")?,
            ops: rate::operations(&values, "iops")?,
        },
    })
}

fn io(text: &str) -> Result<DiskIo, OptionError> {
    match text {
        "auto" => Ok(DiskIo::Auto),
        "io-uring" => Ok(DiskIo::IoUring),
        "threads" => Ok(DiskIo::Threads),
        _ => Err(bad_value("io", text, "it is one of auto, io-uring, threads")),
    }
}

#[cfg(test)]
mod tests {
    use cutover_snapshot::spec::TokenBucketSpec;

    use super::*;

    fn plain(path: &str) -> DiskSpec {
        DiskSpec {
            id: None,
            path: path.into(),
            readonly: false,
            serial: None,
            io: DiskIo::Auto,
            rate_limiter: RateLimiterSpec::default(),
        }
    }

    #[test]
    fn disks_are_read_with_any_of_their_keys_in_any_order() {
        let all = DiskSpec {
            id: Some("root".to_owned()),
            readonly: true,
            serial: Some("root disk".to_owned()),
            io: DiskIo::IoUring,
            rate_limiter: RateLimiterSpec {
                bandwidth: Some(TokenBucketSpec::per_second(100 << 20)),
                ops: Some(TokenBucketSpec::per_second(500)),
            },
            ..plain("/srv/a=b.img")
        };
        assert_eq!(disk("path=root.ext4"), Ok(plain("root.ext4")));
        assert_eq!(
            disk("readonly,io=io-uring,serial=root disk,id=root,iops=500,bandwidth=100M,path=/srv/a=b.img"),
            Ok(all)
        );
        assert_eq!(
            disk("path=a,io=threads"),
            Ok(DiskSpec {
                io: DiskIo::Threads,
                ..plain("a")
            })
        );
        assert_eq!(disk("path=a,io=auto"), Ok(plain("a")));
    }

    #[test]
    fn what_is_no_disk_is_refused_by_the_name_of_the_key() {
        for (text, message) in [
            ("", "path=… is missing"),
            ("readonly", "path=… is missing"),
            ("path=", "path needs a value: write path=…"),
            ("path=a,serial", "serial needs a value: write serial=…"),
            ("path=a,readonly=on", "readonly takes no value"),
            ("path=a,path=b", "path is given more than once"),
            ("path=a,io=aio", "io: 'aio': it is one of auto, io-uring, threads"),
            (
                "path=a,bandwidth=fast",
                "bandwidth: 'fast' is not a size: write a number with an optional unit, such as 512M or 4GiB",
            ),
            (
                "path=a,bandwidth=0",
                "bandwidth: '0': nothing could pass: leave it out for no limit",
            ),
            ("path=a,iops=0", "iops: '0': number would be zero for non-zero type"),
            (
                "disk.img",
                "there is no key 'disk.img': it takes path=…, id=…, serial=…, io=…, bandwidth=…, iops=…, readonly",
            ),
            (
                "path=a,ro",
                "there is no key 'ro': it takes path=…, id=…, serial=…, io=…, bandwidth=…, iops=…, readonly",
            ),
        ] {
            assert_eq!(disk(text).expect_err(text).to_string(), message);
        }
    }
}
