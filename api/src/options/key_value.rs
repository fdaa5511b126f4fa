//! Comma-separated lists of `key=value` pairs and bare keys.

use std::fmt::Display;
use std::str::FromStr;

/// Why an option's value cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// No such key.
    #[error("there is no key '{key}': it takes {known}")]
    UnknownKey {
        /// The key given.
        key: String,
        /// The keys there are, for people.
        known: String,
    },
    /// A key that must be there.
    #[error("{0}=… is missing")]
    Missing(&'static str),
    /// The same key more than once.
    #[error("{0} is given more than once")]
    Twice(String),
    /// Two keys that exclude each other.
    #[error("{0} and {1} exclude each other")]
    Conflict(&'static str, &'static str),
    /// A key without its value.
    #[error("{0} needs a value: write {0}=…")]
    NeedsValue(String),
    /// A value for a bare key.
    #[error("{0} takes no value")]
    TakesNoValue(String),
    /// A value that the key cannot have.
    #[error("{key}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong with the value, which it names.
        reason: String,
    },
}

/// A list taken apart; each key is taken out by whoever understands it.
pub struct KeyValues<'a> {
    pairs: Vec<(&'a str, Option<&'a str>)>,
}

impl<'a> KeyValues<'a> {
    /// Takes `text` apart. `keys` are those that need a value, `flags` those that have none.
    ///
    /// # Errors
    /// An unknown or repeated key, or a value missing or too many.
    pub fn parse(text: &'a str, keys: &[&str], flags: &[&str]) -> Result<Self, OptionError> {
        let mut pairs: Vec<(&str, Option<&str>)> = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (part, None),
            };
            match value {
                None | Some("") if keys.contains(&key) => return Err(OptionError::NeedsValue(key.to_owned())),
                Some(_) if flags.contains(&key) => return Err(OptionError::TakesNoValue(key.to_owned())),
                _ if keys.contains(&key) || flags.contains(&key) => {}
                _ => return Err(unknown(key, keys, flags)),
            }
            if pairs.iter().any(|(earlier, _)| *earlier == key) {
                return Err(OptionError::Twice(key.to_owned()));
            }
            pairs.push((key, value));
        }
        Ok(Self { pairs })
    }

    /// Whether the bare key is there.
    pub fn has(&self, flag: &str) -> bool {
        self.pairs.iter().any(|(key, _)| *key == flag)
    }

    /// The text given for `key`.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.pairs
            .iter()
            .find(|(name, _)| *name == key)
            .and_then(|(_, value)| *value)
    }

    /// What the text given for `key` means.
    ///
    /// # Errors
    /// It means nothing as a `T`.
    pub fn value<T>(&self, key: &'static str) -> Result<Option<T>, OptionError>
    where
        T: FromStr<Err: Display>,
    {
        let parse = |text: &str| {
            text.parse()
                .map_err(|error: T::Err| bad_value(key, text, &error.to_string()))
        };
        self.text(key).map(parse).transpose()
    }
}

/// The error for a value of `key`; names the value if `reason` does not.
pub fn bad_value(key: &'static str, text: &str, reason: &str) -> OptionError {
    let named = reason.contains(&format!("'{text}'"));
    let reason = if named {
        reason.to_owned()
    } else {
        format!("'{text}': {reason}")
    };
    OptionError::Value { key, reason }
}

fn unknown(key: &str, keys: &[&str], flags: &[&str]) -> OptionError {
    let known = keys
        .iter()
        .map(|key| format!("{key}=…"))
        .chain(flags.iter().map(|flag| (*flag).to_owned()));
    OptionError::UnknownKey {
        key: key.to_owned(),
        known: known.collect::<Vec<_>>().join(", "),
    }
}
