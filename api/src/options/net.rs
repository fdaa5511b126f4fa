//! The value of `--net`.

use cutover_snapshot::spec::{NetSpec, RateLimiterSpec, TapSpec};

use super::key_value::{KeyValues, OptionError};
use super::rate;

const KEYS: [&str; 10] = [
    "tap",
    "fd",
    "id",
    "mac",
    "mtu",
    "host-ip",
    "rx-bandwidth",
    "tx-bandwidth",
    "rx-pps",
    "tx-pps",
];

/// Reads `[tap=NAME|fd=N][,id=ID][,mac=MAC][,mtu=N][,host-ip=ADDRESS/PREFIX][,rx-bandwidth=SIZE][,tx-bandwidth=SIZE]
/// [,rx-pps=N][,tx-pps=N]`; nothing at all is a new tap.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn net(text: &str) -> Result<NetSpec, OptionError> {
    let values = KeyValues::parse(text, &KEYS, &[])?;
    let tap = match (values.text("tap"), values.value("fd")?) {
        (Some(_), Some(_)) => return Err(OptionError::Conflict("tap", "fd")),
        (Some(name), None) => TapSpec::Name(name.to_owned()),
        (None, Some(fd)) => TapSpec::Fd(fd),
        (None, None) => TapSpec::Create,
    };
    Ok(NetSpec {
        id: values.text("id").map(str::to_owned),
        tap,
        mac: values.value("mac")?,
        mtu: values.value("mtu")?,
        host_ip: values.value("host-ip")?,
        rx_rate_limiter: RateLimiterSpec {
            bandwidth: rate::bandwidth(&values, "rx-bandwidth")?,
            ops: rate::operations(&values, "rx-pps")?,
        },
        tx_rate_limiter: RateLimiterSpec {
            bandwidth: rate::bandwidth(&values, "tx-bandwidth")?,
            ops: rate::operations(&values, "tx-pps")?,
        },
    })
}

#[cfg(test)]
mod tests {
    use cutover_snapshot::spec::{MacAddr, TokenBucketSpec};

    use super::*;

    fn plain(tap: TapSpec) -> NetSpec {
        NetSpec {
            tap,
            ..NetSpec::default()
        }
    }

    #[test]
    fn interfaces_are_read_with_any_of_their_keys() {
        let named = plain(TapSpec::Name("tap0".to_owned()));
        let all = NetSpec {
            id: Some("uplink".to_owned()),
            mac: Some(MacAddr([2, 0, 0, 0, 0, 0x1f])),
            mtu: Some(9000),
            host_ip: Some("172.16.0.1/24".parse().expect("an address")),
            rx_rate_limiter: RateLimiterSpec {
                bandwidth: Some(TokenBucketSpec::per_second(10 << 20)),
                ops: Some(TokenBucketSpec::per_second(2000)),
            },
            tx_rate_limiter: RateLimiterSpec {
                bandwidth: Some(TokenBucketSpec::per_second(1 << 20)),
                ops: Some(TokenBucketSpec::per_second(100)),
            },
            ..named.clone()
        };
        assert_eq!(net(""), Ok(plain(TapSpec::Create)));
        assert_eq!(net("tap=tap0"), Ok(named));
        assert_eq!(net("fd=5"), Ok(plain(TapSpec::Fd(5))));
        assert_eq!(
            net(
                "tap=tap0,id=uplink,mac=02:00:00:00:00:1f,mtu=9000,host-ip=172.16.0.1/24,rx-bandwidth=10M,\
                 tx-bandwidth=1M,rx-pps=2000,tx-pps=100"
            ),
            Ok(all)
        );
    }

    #[test]
    fn what_is_no_interface_is_refused_by_the_name_of_the_key() {
        for (text, message) in [
            ("tap", "tap needs a value: write tap=…"),
            ("tap=a,fd=3", "tap and fd exclude each other"),
            ("fd=x", "fd: 'x': invalid digit found in string"),
            ("mtu=70000", "mtu: '70000': number too large to fit in target type"),
            ("tap=a,mtu=1500,mtu=9000", "mtu is given more than once"),
            (
                "mac=01:00:00:00:00:00",
                "mac: '01:00:00:00:00:00' is not a unicast MAC address: write six hexadecimal bytes such as \
                 02:00:00:00:00:01",
            ),
            (
                "host-ip=172.16.0.1",
                "host-ip: '172.16.0.1' is not an IPv4 address with a prefix length, such as 172.16.0.1/24",
            ),
            (
                "tap0",
                "there is no key 'tap0': it takes tap=…, fd=…, id=…, mac=…, mtu=…, host-ip=…, rx-bandwidth=…, \
                 tx-bandwidth=…, rx-pps=…, tx-pps=…",
            ),
        ] {
            assert_eq!(net(text).expect_err(text).to_string(), message);
        }
    }
}
