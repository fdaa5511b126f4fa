//! Reproducible pseudo-random bytes, and their transfer over TCP with a checksum at each end.
//!
//! Both ends of a transfer know the seed, so each can say what should have arrived; the checksums are compared by the
//! harness, which sees both.

use std::io::{self, Read, Write};

use sha2::{Digest as _, Sha256};

/// Bytes handled at a time.
const CHUNK_LEN: usize = 64 << 10;

/// An endless stream of bytes fixed by its seed (the SplitMix64 generator).
#[derive(Clone, Debug)]
pub struct Bytes {
    state: u64,
}

impl Bytes {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Fills `buffer`, whose length must be a multiple of eight, with the next bytes.
    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_exact_mut(8) {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
    }
}

/// How much went through one end of a transfer, and its checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of bytes.
    pub bytes: u64,
    /// SHA-256 of the bytes, in hexadecimal.
    pub sha256: String,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.bytes, self.sha256)
    }
}

/// Writes the first `bytes` bytes of the stream of `seed`.
///
/// # Errors
/// Writing fails.
pub fn send(to: &mut impl Write, seed: u64, bytes: u64) -> io::Result<Summary> {
    let mut stream = Bytes::new(seed);
    let mut chunk = vec![0; CHUNK_LEN];
    let mut hash = Sha256::new();
    let mut left = bytes;
    while left > 0 {
        stream.fill(&mut chunk);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_LEN);
        to.write_all(&chunk[..length])?;
        hash.update(&chunk[..length]);
        left -= u64::try_from(length).expect("a chunk's length fits 64 bits");
    }
    to.flush()?;
    Ok(summary(bytes, hash))
}

/// Reads to the end.
///
/// # Errors
/// Reading fails.
pub fn receive(from: &mut impl Read) -> io::Result<Summary> {
    let mut chunk = vec![0; CHUNK_LEN];
    let mut hash = Sha256::new();
    let mut bytes = 0;
    loop {
        let length = from.read(&mut chunk)?;
        if length == 0 {
            return Ok(summary(bytes, hash));
        }
        hash.update(&chunk[..length]);
        bytes += u64::try_from(length).expect("a chunk's length fits 64 bits");
    }
}

fn summary(bytes: u64, hash: Sha256) -> Summary {
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Summary { bytes, sha256 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_is_received() {
        let mut wire = Vec::new();
        let sent = send(&mut wire, 42, 100_003).expect("a vector takes every byte");
        assert_eq!(wire.len(), 100_003);
        assert_eq!(receive(&mut wire.as_slice()).expect("a slice reads"), sent);
    }

    #[test]
    fn the_seed_fixes_the_bytes() {
        let stream = |seed| {
            let mut wire = Vec::new();
            send(&mut wire, seed, 4096).expect("a vector takes every byte");
            wire
        };
        assert_eq!(stream(1), stream(1));
        assert_ne!(stream(1), stream(2));
    }
}
