//! The value of `--mmds`.

use cutover_snapshot::spec::{MmdsSpec, MmdsVersion, mmds_address};

use super::key_value::{KeyValues, OptionError};

const VERSION: &str = "version";
const ADDRESS: &str = "address";
const NET: &str = "net";
const IMDS_COMPAT: &str = "imds-compat";

/// Reads `[version=V1|V2][,address=ADDRESS][,net=ID][,imds-compat]`.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn mmds(text: &str) -> Result<MmdsSpec, OptionError> {
    let values = KeyValues::parse(text, &[VERSION, ADDRESS, NET], &[IMDS_COMPAT])?;
    let version = match values.text(VERSION) {
        None => MmdsVersion::default(),
        Some("V1") => MmdsVersion::V1,
        Some("V2") => MmdsVersion::V2,
        Some(other) => {
            return Err(OptionError::Value {
                key: VERSION,
                reason: format!("'{other}' is neither V1 nor V2"),
            });
        }
    };
    Ok(MmdsSpec {
        version,
        nets: values.text(NET).map(str::to_owned).into_iter().collect(),
        address: values.value(ADDRESS)?.unwrap_or_else(mmds_address),
        imds_compat: values.has(IMDS_COMPAT),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_the_second_version_at_every_interface() {
        let spec = MmdsSpec {
            version: MmdsVersion::V2,
            nets: Vec::new(),
            address: [169, 254, 169, 254].into(),
            imds_compat: false,
        };
        assert_eq!(mmds(""), Ok(spec));
        let spec = MmdsSpec {
            version: MmdsVersion::V1,
            nets: vec!["eth0".to_owned()],
            address: [169, 254, 170, 2].into(),
            imds_compat: true,
        };
        assert_eq!(mmds("version=V1,net=eth0,address=169.254.170.2,imds-compat"), Ok(spec));
    }

    #[test]
    fn what_is_no_service_is_refused_by_the_name_of_the_key() {
        for (text, message) in [
            ("version=v2", "version: 'v2' is neither V1 nor V2"),
            ("address=here", "address: 'here': invalid IPv4 address syntax"),
            ("imds-compat=yes", "imds-compat takes no value"),
        ] {
            assert_eq!(mmds(text).expect_err(text).to_string(), message);
        }
    }
}
