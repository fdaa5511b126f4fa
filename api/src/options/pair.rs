//! `ID=VALUE`: something other for one device of a VM that is described elsewhere.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Reads `ID=TAP`.
///
/// # Errors
/// One of the two is missing.
pub fn tap_of(text: &str) -> Result<(String, String), String> {
    pair(text).map(|(id, tap)| (id, tap.to_owned()))
}

/// Reads `ID=FILE`.
///
/// # Errors
/// One of the two is missing.
pub fn file_of(text: &str) -> Result<(String, PathBuf), String> {
    pair(text).map(|(id, path)| (id, path.into()))
}

/// Reads `ID=VALUE`.
///
/// # Errors
/// One of the two is missing.
pub fn pair(text: &str) -> Result<(String, &str), String> {
    match text.split_once('=') {
        Some((id, value)) if !id.is_empty() && !value.is_empty() => Ok((id.to_owned(), value)),
        _ => Err("write the id of the device, '=', and what it is to have".to_owned()),
    }
}

/// Two values for one device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {id} is given twice")]
pub struct Twice {
    /// The option.
    pub option: &'static str,
    /// The device.
    pub id: String,
}

/// The values that `option` was given, by the ids of devices.
///
/// # Errors
/// A device has two.
pub fn unique<T: Clone>(option: &'static str, pairs: &[(String, T)]) -> Result<BTreeMap<String, T>, Twice> {
    let mut map = BTreeMap::new();
    for (id, value) in pairs {
        if map.insert(id.clone(), value.clone()).is_some() {
            let id = id.clone();
            return Err(Twice { option, id });
        }
    }
    Ok(map)
}
