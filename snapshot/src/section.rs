//! State in sections, each with a version of its own.
//!
//! A section is one value in [postcard](https://postcard.jamesmunns.com/wire-format) encoding. Its name, version,
//! length and checksum are in the manifest, so that it is known what state there is without decoding any, and the file
//! `state.bin` is nothing but the sections one after the other:
//!
//! ```text
//!  manifest.json   "state": [ vcpu/0 v2 1840 bytes …, device/disk0 v1 96 bytes …, … ]
//!                               │                       │
//!  state.bin                 [ vcpu/0              ][ device/disk0 ] …
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::error::{Error, SectionError};
use crate::manifest;

/// Name of the file that holds the sections.
pub const FILE: &str = "state.bin";
/// Most sections of a snapshot: 32 vCPUs and 16 devices with several each.
pub const SECTIONS_MAX: usize = 1024;
/// Most bytes of all sections together.
pub const STATE_BYTES_MAX: u64 = 64 << 20;

/// A type that is saved as a section.
///
/// The encoding describes neither names nor types of fields: *any* change of the type (also of the order of fields)
/// needs a new [`VERSION`](Self::VERSION), and the type it had before is kept to be read. Attributes that leave fields
/// out (`skip_serializing_if`, `untagged`, `flatten`) cannot be used.
///
/// ```
/// use cutover_snapshot::error::SectionError;
/// use cutover_snapshot::section::{Payload, Section};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Clock { guest_ns: u64, stopped: bool }
///
/// #[derive(Deserialize)]
/// struct ClockV1 { guest_ns: u64 }
///
/// impl Section for Clock {
///     const VERSION: u16 = 2;
///
///     fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
///         match payload.version {
///             1 => payload.decode().map(|ClockV1 { guest_ns }| Self { guest_ns, stopped: false }),
///             2 => payload.decode(),
///             _ => Err(payload.unknown_version::<Self>()),
///         }
///     }
/// }
/// ```
pub trait Section: Serialize + Sized {
    /// Version that is written, from 1.
    const VERSION: u16;

    /// Reads this version or an older one. What comes out is well-formed, not yet trustworthy: ranges are for the
    /// receiver to check.
    ///
    /// # Errors
    /// The version is not known, or the payload is not an encoding of it.
    fn read(payload: &Payload<'_>) -> Result<Self, SectionError>;
}

/// An encoded section.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// Version of the encoded type.
    pub version: u16,
    /// The encoding.
    pub bytes: &'a [u8],
}

impl Payload<'_> {
    /// Decodes the payload, all of it, as a `T`.
    ///
    /// # Errors
    /// It is not the encoding of a `T`.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, SectionError> {
        match postcard::take_from_bytes(self.bytes)? {
            (value, []) => Ok(value),
            (_, rest) => Err(SectionError::Trailing(rest.len())),
        }
    }

    /// The error for a version that `T` does not read.
    pub fn unknown_version<T: Section>(&self) -> SectionError {
        SectionError::Version {
            found: self.version,
            newest: T::VERSION,
        }
    }
}

/// What the manifest says of a section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionEntry {
    /// What it is the state of, such as `vcpu/0`; unique.
    pub name: String,
    /// Version of its type.
    pub version: u16,
    /// Bytes of its encoding.
    pub bytes: u64,
    /// Checksum of its encoding.
    pub checksum: Checksum,
}

/// Something that state can be saved to, section by section.
pub trait SectionWriter {
    /// Adds a section that is encoded already.
    fn payload(&mut self, name: &str, payload: &Payload<'_>);

    /// Adds a section.
    ///
    /// # Errors
    /// It has no encoding.
    fn section<T: Section>(&mut self, name: &str, value: &T) -> Result<(), Error> {
        let bytes = postcard::to_stdvec(value).map_err(|source| Error::Section {
            path: PathBuf::from(FILE),
            name: name.to_owned(),
            source: source.into(),
        })?;
        let payload = Payload {
            version: T::VERSION,
            bytes: &bytes,
        };
        self.payload(name, &payload);
        Ok(())
    }
}

/// Sections that are collected to be written.
#[derive(Clone, Debug, Default)]
pub struct Sections {
    /// What the manifest says of them.
    pub entries: Vec<SectionEntry>,
    /// Their encodings, one after the other.
    pub bytes: Vec<u8>,
}

impl SectionWriter for Sections {
    fn payload(&mut self, name: &str, payload: &Payload<'_>) {
        self.entries.push(SectionEntry {
            name: name.to_owned(),
            version: payload.version,
            bytes: payload.bytes.len() as u64,
            checksum: Checksum::of(payload.bytes),
        });
        self.bytes.extend_from_slice(payload.bytes);
    }
}

/// All sections of a snapshot, their checksums verified.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    sections: BTreeMap<String, (u16, Vec<u8>)>,
}

impl Sections {
    /// The sections of `from`, which an error names; nothing of them is trusted.
    ///
    /// # Errors
    /// There are too many, their names are not names of sections, or not unique, or their bytes are not those that the
    /// entries tell of.
    pub fn into_state(self, from: &str) -> Result<State, Error> {
        let path = Path::new(from);
        let Self { entries, bytes } = self;
        manifest::check_sections(&entries).map_err(|reason| Error::invalid(path, reason))?;
        let expected: u64 = entries.iter().map(|entry| entry.bytes).sum();
        if expected != bytes.len() as u64 {
            let reason = format!("has {} bytes of state, but its sections have {expected}", bytes.len());
            return Err(Error::invalid(path, reason));
        }
        State::split(path, &entries, &bytes, 0)
    }
}

impl State {
    /// Takes apart `content`, which begins at `start` of the file at `path` and has the sections that `entries` lists,
    /// in order.
    pub(crate) fn split(path: &Path, entries: &[SectionEntry], content: &[u8], start: u64) -> Result<Self, Error> {
        let mut sections = BTreeMap::new();
        let mut offset = 0;
        let damaged = |offset: usize, what| Error::damaged(path, start + offset as u64, what);
        for entry in entries {
            let bytes = usize::try_from(entry.bytes).ok();
            let end = bytes.and_then(|bytes| bytes.checked_add(offset));
            let encoded = end
                .and_then(|end| content.get(offset..end))
                .ok_or_else(|| damaged(offset, format!("state '{}' is cut short", entry.name)))?;
            if Checksum::of(encoded) != entry.checksum {
                let what = format!("state '{}' does not have its checksum", entry.name);
                return Err(damaged(offset, what));
            }
            sections.insert(entry.name.clone(), (entry.version, encoded.to_vec()));
            offset += encoded.len();
        }
        Ok(Self {
            path: path.to_owned(),
            sections,
        })
    }

    /// Names of the sections, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sections.keys().map(String::as_str)
    }

    /// Reads a section.
    ///
    /// # Errors
    /// There is none of this name, or it is not a `T` in a version that can be read.
    pub fn read<T: Section>(&self, name: &str) -> Result<T, Error> {
        let payload = self.payload(name)?;
        T::read(&payload).map_err(|source| Error::Section {
            path: self.path.clone(),
            name: name.to_owned(),
            source,
        })
    }

    /// A section as it is encoded.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn payload(&self, name: &str) -> Result<Payload<'_>, Error> {
        let (version, bytes) = self.sections.get(name).ok_or_else(|| Error::SectionMissing {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        Ok(Payload {
            version: *version,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_after_the_value_are_an_error() {
        let payload = Payload {
            version: 1,
            bytes: &[7, 0, 0],
        };
        assert!(matches!(payload.decode::<u8>(), Err(SectionError::Trailing(2))));
    }
}
