//! Checksums of everything that is saved: XXH3 with 128 bits, fast enough to be checked at every read.
//!
//! They detect damage, not malice: who can write to a snapshot can also write matching checksums.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use twox_hash::XxHash3_128;

/// XXH3-128 of some bytes; in JSON 32 hexadecimal digits, in binary the same 16 bytes (its canonical, big-endian form).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(u128);

/// Not a checksum.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a checksum of 32 lower-case hexadecimal digits")]
pub struct NotAChecksum(String);

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(XxHash3_128::oneshot(bytes))
    }

    /// The binary form.
    pub(crate) fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for Checksum {
    type Err = NotAChecksum;

    fn from_str(text: &str) -> Result<Self, NotAChecksum> {
        u128::from_str_radix(text, 16)
            .map(Self)
            .ok()
            .filter(|checksum| checksum.to_string() == text)
            .ok_or_else(|| NotAChecksum(text.to_owned()))
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.to_bytes().serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?
                .parse()
                .map_err(serde::de::Error::custom)
        } else {
            <[u8; 16]>::deserialize(deserializer).map(|bytes| Self(u128::from_be_bytes(bytes)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_xxh3_with_128_bits() {
        // Published test vector of XXH3-128 for empty input.
        assert_eq!(Checksum::of(b"").to_string(), "99aa06d3014798d86001c324468d497f");
    }

    #[test]
    fn only_32_lower_case_digits_are_read() {
        let text = "99aa06d3014798d86001c324468d497f";
        assert_eq!(text.parse::<Checksum>().expect("valid").to_string(), text);
        for wrong in [
            "",
            "99",
            &text.to_uppercase(),
            &format!("+{}", &text[1..]),
            &format!("0{text}"),
        ] {
            assert_eq!(wrong.parse::<Checksum>(), Err(NotAChecksum(wrong.to_owned())));
        }
    }

    #[test]
    fn the_binary_form_has_the_bytes_of_the_text() {
        let bytes = postcard::to_stdvec(&Checksum::of(b"")).expect("encodable");
        assert_eq!(bytes[..4], [0x99, 0xaa, 0x06, 0xd3]);
        assert_eq!(postcard::from_bytes::<Checksum>(&bytes), Ok(Checksum::of(b"")));
    }
}
