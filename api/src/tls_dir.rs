//! Where a host's certificate is, by which migrations over TLS know each other's ends.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use cutover_migration::transport::Endpoint;
use rustix::process::geteuid;

/// Names the directory, for systems that keep theirs elsewhere.
const DIRECTORY_VARIABLE: &str = "CUTOVER_TLS_DIR";
/// The directory of root, and of users without a home.
const SYSTEM_DIRECTORY: &str = "/etc/cutover/tls";

/// Where the certificate is that `endpoint` takes: in `given`, or else the user's directory; none if it does without.
pub fn for_endpoint(endpoint: &Endpoint, given: Option<&Path>) -> Option<PathBuf> {
    matches!(endpoint, Endpoint::Tls(_)).then(|| given.map_or_else(of_user, Path::to_owned))
}

/// The directory this process's environment says.
pub fn of_user() -> PathBuf {
    locate(|name| env::var_os(name), geteuid().is_root())
}

fn locate(variable: impl Fn(&str) -> Option<OsString>, is_root: bool) -> PathBuf {
    let given = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = given(DIRECTORY_VARIABLE) {
        return path;
    }
    let of_user = given("XDG_CONFIG_HOME").or_else(|| given("HOME").map(|home| home.join(".config")));
    match of_user {
        Some(config) if !is_root => config.join("cutover/tls"),
        _ => SYSTEM_DIRECTORY.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_their_own_certificates_and_root_has_those_of_the_system() {
        let set = |values: &'static [(&str, &str)]| {
            move |name: &str| {
                let (_, value) = values.iter().find(|(variable, _)| *variable == name)?;
                Some(OsString::from(value))
            }
        };
        let home = set(&[("HOME", "/home/u")]);
        assert_eq!(locate(home, false), Path::new("/home/u/.config/cutover/tls"));
        assert_eq!(locate(home, true), Path::new("/etc/cutover/tls"));
        let config = set(&[("HOME", "/home/u"), ("XDG_CONFIG_HOME", "/c")]);
        assert_eq!(locate(config, false), Path::new("/c/cutover/tls"));
        assert_eq!(locate(set(&[]), false), Path::new("/etc/cutover/tls"));
        let chosen = set(&[("HOME", "/home/u"), ("CUTOVER_TLS_DIR", "/srv/tls")]);
        assert_eq!(locate(chosen, false), Path::new("/srv/tls"));
    }
}
