//! The value of `jail --file`, and that of `jail --resource-limit`.

use std::path::{Path, absolute};

use cutover_jail::{Access, Limits, SharedFile};
use cutover_snapshot::size::ByteSize;

use super::key_value::{KeyValues, OptionError, bad_value};

/// Reads `path=FILE[,readonly][,at=PATH]`. Without another place, the file has the one it has outside.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn shared_file(text: &str) -> Result<SharedFile, OptionError> {
    let values = KeyValues::parse(text, &["path", "at"], &["readonly"])?;
    let text = values.text("path").ok_or(OptionError::Missing("path"))?;
    let path = absolute(Path::new(text)).map_err(|error| bad_value("path", text, &error.to_string()))?;
    Ok(SharedFile {
        at: values.text("at").map_or_else(|| path.clone(), Into::into),
        path,
        access: if values.has("readonly") {
            Access::Read
        } else {
            Access::Write
        },
    })
}

/// Reads `[no-file=N][,fsize=SIZE]`, with the defaults of what is left out.
///
/// # Errors
/// The first part that cannot be understood, by its key.
pub fn resource_limits(text: &str) -> Result<Limits, OptionError> {
    let values = KeyValues::parse(text, &["no-file", "fsize"], &[])?;
    let default = Limits::default();
    Ok(Limits {
        descriptors: values.value("no-file")?.unwrap_or(default.descriptors),
        file_size: values.value::<ByteSize>("fsize")?.map(ByteSize::bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_where_it_is_outside_or_where_it_is_wanted() {
        let file = |path: &str, at: &str, access| SharedFile {
            path: path.into(),
            at: at.into(),
            access,
        };
        assert_eq!(
            shared_file("path=/srv/disk"),
            Ok(file("/srv/disk", "/srv/disk", Access::Write))
        );
        assert_eq!(
            shared_file("path=/srv/vmlinuz,at=/kernel,readonly"),
            Ok(file("/srv/vmlinuz", "/kernel", Access::Read))
        );
        let here = std::env::current_dir().unwrap().join("disk");
        assert_eq!(shared_file("path=disk").map(|file| file.at), Ok(here));
        for (text, message) in [
            ("readonly", "path=… is missing"),
            ("path=", "path needs a value: write path=…"),
            (
                "/srv/disk",
                "there is no key '/srv/disk': it takes path=…, at=…, readonly",
            ),
        ] {
            assert_eq!(shared_file(text).expect_err(text).to_string(), message);
        }
    }

    #[test]
    fn limits_have_defaults_and_sizes_units() {
        let limits = |descriptors, file_size| Limits { descriptors, file_size };
        let default = Limits::default().descriptors;
        assert_eq!(resource_limits("no-file=64,fsize=1G"), Ok(limits(64, Some(1 << 30))));
        assert_eq!(resource_limits("fsize=4096"), Ok(limits(default, Some(4096))));
        assert!(resource_limits("nproc=1").is_err());
    }
}
