//! The value of `--net`.

use cutover_snapshot::spec::{NetSpec, TapSpec};

use super::key_value::{KeyValues, OptionError};

/// Reads `[tap=NAME|fd=N][,mac=MAC][,mtu=N][,host-ip=ADDRESS/PREFIX]`; nothing at all is a new tap.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn net(text: &str) -> Result<NetSpec, OptionError> {
    let values = KeyValues::parse(text, &["tap", "fd", "mac", "mtu", "host-ip"], &[])?;
    let tap = match (values.text("tap"), values.value("fd")?) {
        (Some(_), Some(_)) => return Err(OptionError::Conflict("tap", "fd")),
        (Some(name), None) => TapSpec::Name(name.to_owned()),
        (None, Some(fd)) => TapSpec::Fd(fd),
        (None, None) => TapSpec::Create,
    };
    Ok(NetSpec {
        tap,
        mac: values.value("mac")?,
        mtu: values.value("mtu")?,
        host_ip: values.value("host-ip")?,
    })
}

#[cfg(test)]
mod tests {
    use cutover_snapshot::spec::MacAddr;

    use super::*;

    fn plain(tap: TapSpec) -> NetSpec {
        NetSpec {
            tap,
            mac: None,
            mtu: None,
            host_ip: None,
        }
    }

    #[test]
    fn interfaces_are_read_with_any_of_their_keys() {
        let named = plain(TapSpec::Name("tap0".to_owned()));
        let all = NetSpec {
            mac: Some(MacAddr([2, 0, 0, 0, 0, 0x1f])),
            mtu: Some(9000),
            host_ip: Some("172.16.0.1/24".parse().expect("an address")),
            ..named.clone()
        };
        assert_eq!(net(""), Ok(plain(TapSpec::Create)));
        assert_eq!(net("tap=tap0"), Ok(named));
        assert_eq!(net("fd=5"), Ok(plain(TapSpec::Fd(5))));
        assert_eq!(
            net("tap=tap0,mac=02:00:00:00:00:1f,mtu=9000,host-ip=172.16.0.1/24"),
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
                "there is no key 'tap0': it takes tap=…, fd=…, mac=…, mtu=…, host-ip=…",
            ),
        ] {
            assert_eq!(net(text).expect_err(text).to_string(), message);
        }
    }
}
