//! A state file: everything a snapshot has but its images, in one file, for snapshots of the kind that Firecracker makes:
//! one file of state, and one that is memory, byte for byte.
//!
//! ```text
//!  "cutover-state-1\n" │ length, u32 LE │ manifest, as in manifest.json │ the sections, as in state.bin
//!        16 bytes      │    4 bytes     │
//! ```
//!
//! The manifest has the checksums of itself and of all sections.

use std::io;
use std::path::Path;

use jiff::Timestamp;

use crate::blob::{LocalFile, read_whole};
use crate::error::Error;
use crate::files::{Files, HostFiles, publish, write_whole};
use crate::manifest::{CpuNeeds, Draft, MANIFEST_BYTES_MAX, Manifest, Sealed};
use crate::section::{Payload, STATE_BYTES_MAX, SectionWriter, Sections, State};

/// What the file begins with.
const MAGIC: &[u8; 16] = b"cutover-state-1\n";
/// Bytes before the manifest.
const HEAD_BYTES: usize = MAGIC.len() + size_of::<u32>();
/// Most bytes of the file.
const FILE_BYTES_MAX: u64 = HEAD_BYTES as u64 + MANIFEST_BYTES_MAX + STATE_BYTES_MAX;

/// A state file to be written.
pub struct StateFile {
    draft: Draft,
    sections: Sections,
}

impl StateFile {
    /// The state of the VM that `draft` describes, without any sections.
    pub fn new(draft: Draft) -> Self {
        Self {
            draft,
            sections: Sections::default(),
        }
    }

    /// Notes what may be known only once the guest has stopped: when that was, and what it has seen of its CPU.
    pub fn stopped(&mut self, at: Timestamp, cpu: CpuNeeds) {
        (self.draft.created, self.draft.cpu) = (at, cpu);
    }

    /// Writes the file, and makes it permanent. A file that is there already is replaced, as a whole or not at all.
    ///
    /// # Errors
    /// It cannot be written, or does not hold together; then all is as it was.
    pub fn write(self, path: &Path) -> Result<(), Error> {
        self.write_through(&HostFiles, path)
    }

    /// The same, through `files`.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_through(self, files: &dyn Files, path: &Path) -> Result<(), Error> {
        let bytes = self.encode().map_err(|reason| Error::unwritable(path, reason))?;
        publish(files, path, |partial| write_whole(files, partial, &bytes))
    }

    fn encode(self) -> Result<Vec<u8>, String> {
        let mut manifest = Manifest::begin(self.draft);
        manifest.state = self.sections.entries;
        let (text, _) = manifest.seal()?;
        let length = u32::try_from(text.len()).map_err(|_| "its manifest is too large".to_owned())?;
        Ok([MAGIC, &length.to_le_bytes()[..], text.as_bytes(), &self.sections.bytes].concat())
    }
}

impl SectionWriter for StateFile {
    fn payload(&mut self, name: &str, payload: &Payload<'_>) {
        self.sections.payload(name, payload);
    }
}

/// Reads a state file; every byte of it is covered by a checksum or compared.
///
/// # Errors
/// It cannot be read, is not a state file, has a newer version, or is damaged.
pub fn read(path: &Path) -> Result<(Manifest, State), Error> {
    let file = LocalFile::open(path.to_owned())?;
    let file = file.ok_or_else(|| Error::io("open it", path)(io::ErrorKind::NotFound.into()))?;
    let content = read_whole(&file, FILE_BYTES_MAX)?;
    let damaged = |offset: usize, what: &str| Error::damaged(path, offset as u64, what);
    let Some((head, rest)) = content.split_first_chunk::<HEAD_BYTES>() else {
        return Err(damaged(content.len(), "the file ends before its manifest"));
    };
    let (magic, length) = head.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(Error::invalid(
            path,
            "does not begin as a file with the state of a VM does",
        ));
    }
    let length = u32::from_le_bytes(length.try_into().expect("4 bytes")) as usize;
    let Some((text, sections)) = rest.split_at_checked(length) else {
        return Err(damaged(HEAD_BYTES, "the manifest is cut short"));
    };
    let Sealed { manifest, .. } = Sealed::parse(path, text, HEAD_BYTES as u64)?;
    if !manifest.images.is_empty() {
        return Err(Error::invalid(
            path,
            "lists images, which a file of state does not have",
        ));
    }
    let start = HEAD_BYTES + length;
    if sections.len() as u64 > manifest.state_bytes() {
        let end = start as u64 + manifest.state_bytes();
        return Err(Error::damaged(path, end, "there is something after the last section"));
    }
    let state = State::split(path, &manifest.state, sections, start as u64)?;
    Ok((manifest, state))
}
