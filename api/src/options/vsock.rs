//! The values of `--vsock`.

use std::path::PathBuf;

use cutover_snapshot::spec::VsockSpec;

use super::key_value::{KeyValues, OptionError};

const CID: &str = "cid";
const UDS: &str = "uds";

/// Reads `cid=N,uds=PATH`.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn vsock(text: &str) -> Result<VsockSpec, OptionError> {
    let values = KeyValues::parse(text, &[CID, UDS], &[])?;
    Ok(VsockSpec {
        cid: values.value(CID)?.ok_or(OptionError::Missing(CID))?,
        uds: values.text(UDS).ok_or(OptionError::Missing(UDS))?.into(),
    })
}

/// Reads `uds=PATH`: another socket for a device that is described elsewhere.
///
/// # Errors
/// It is something else.
pub fn vsock_uds(text: &str) -> Result<PathBuf, OptionError> {
    let values = KeyValues::parse(text, &[UDS], &[])?;
    Ok(values.text(UDS).ok_or(OptionError::Missing(UDS))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_and_a_path_make_a_device() {
        let spec = VsockSpec {
            cid: 3,
            uds: "/run/v.sock".into(),
        };
        assert_eq!(vsock("cid=3,uds=/run/v.sock"), Ok(spec));
        assert_eq!(vsock_uds("uds=/run/v.sock"), Ok("/run/v.sock".into()));
    }

    #[test]
    fn what_is_no_device_is_refused_by_the_name_of_the_key() {
        for (text, message) in [
            ("", "cid=… is missing"),
            ("cid=3", "uds=… is missing"),
            ("uds=a", "cid=… is missing"),
            ("cid=x,uds=a", "cid: 'x': invalid digit found in string"),
            ("cid=3,path=a", "there is no key 'path': it takes cid=…, uds=…"),
        ] {
            assert_eq!(vsock(text).expect_err(text).to_string(), message);
        }
        assert_eq!(vsock_uds("").expect_err("nothing").to_string(), "uds=… is missing");
        assert!(vsock_uds("cid=3,uds=a").is_err());
    }
}
