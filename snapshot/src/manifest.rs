//! The manifest: what a snapshot is, readable without decoding any state, and the root of all its checksums.
//!
//! ```text
//!  child's manifest ── parent.checksum ──► manifest ─┬─ state[].checksum ────────► sections of state.bin
//!                                                    └─ images[].index.checksum ─► index ─► checksum per chunk
//! ```
//!
//! The file is JSON: an envelope with the format's version and the checksum of the text of the `manifest` in it.

use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::checksum::Checksum;
use crate::error::Error;
use crate::section::{self, SectionEntry};
use crate::spec::VmSpec;

mod check;

pub(crate) use check::{check_part_name, check_sections};

/// Name of the file.
pub const FILE: &str = "manifest.json";
/// What the envelope calls the format.
pub const FORMAT: &str = "cutover-snapshot";
/// Version of the format that is written. Older ones are read, newer ones refused.
pub const FORMAT_VERSION: u32 = 1;
/// Most bytes of the file.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// Most pieces of memory.
pub const REGIONS_MAX: usize = 64;
/// Most words of CPU features.
pub const CPU_WORDS_MAX: usize = 1024;
/// Most images: memory and one for each device there can be.
pub const IMAGES_MAX: usize = 1 + crate::spec::DEVICES_MAX;
/// Name of the image of guest memory.
pub const MEMORY_IMAGE: &str = "memory";
/// Bytes of a page of guest memory, the unit of its image.
pub const MEMORY_PAGE_BYTES: u32 = 4 << 10;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Made up when the snapshot is written, never used again.
    pub id: Uuid,
    /// What an incremental snapshot is built on.
    pub parent: Option<Parent>,
    /// When the guest was stopped for it.
    pub created: Timestamp,
    /// Which program wrote it.
    pub monitor: String,
    /// The VM: devices, sizes, what it was booted from.
    pub spec: VmSpec,
    /// Where guest memory lies, in order of addresses.
    pub memory: Vec<MemoryRegion>,
    /// What the guest has seen of its CPU.
    pub cpu: CpuNeeds,
    /// The sections of the state, in the order they have in their file.
    pub state: Vec<SectionEntry>,
    /// Memory and disks.
    pub images: Vec<ImageEntry>,
}

/// What is known of a snapshot before it is written.
#[derive(Clone, Debug)]
pub struct Draft {
    /// When the guest was stopped for it.
    pub created: Timestamp,
    /// What it is built on, a snapshot of the same store.
    pub parent: Option<Parent>,
    /// The VM.
    pub spec: VmSpec,
    /// Where guest memory lies.
    pub memory: Vec<MemoryRegion>,
    /// What the guest has seen of its CPU.
    pub cpu: CpuNeeds,
}

/// Which snapshot an incremental one is built on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its id.
    pub id: Uuid,
    /// The name it had, which is where it is looked for first.
    pub name: String,
    /// Checksum of its manifest.
    pub checksum: Checksum,
}

/// One piece of guest memory. The pages of all pieces are numbered through, without those between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRegion {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// What a host's CPU must have for the guest to go on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuNeeds {
    /// CPUID's vendor string.
    pub vendor: String,
    /// Feature bits that the guest was shown.
    pub features: Vec<CpuWord>,
}

/// Feature bits in one register of one CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuWord {
    /// EAX of the query.
    pub leaf: u32,
    /// ECX of the query.
    pub subleaf: u32,
    /// Register of the answer.
    pub register: CpuRegister,
    /// The bits that are needed.
    pub bits: u32,
}

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// An image: an array of pages, such as guest memory or a disk, of which this snapshot stores some.
///
/// Its file is the image's name with `.pages`: `data_bytes` of chunks, then the [index](crate::image).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageEntry {
    /// [`MEMORY_IMAGE`], or what the writer calls a disk; unique.
    pub name: String,
    /// Bytes of a page, a power of two.
    pub page_bytes: u32,
    /// Pages of the whole image.
    pub pages: u64,
    /// What the pages hold that are not stored here.
    pub base: Base,
    /// Pages whose content is stored here.
    pub stored_pages: u64,
    /// Pages stored here as being zero.
    pub zero_pages: u64,
    /// Bytes of chunks, and so where the index begins.
    pub data_bytes: u64,
    /// The index.
    pub index: IndexEntry,
}

/// What the pages of an image hold that are not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// Zeros: the image is complete.
    Zero,
    /// What the parent has in the image of the same name.
    Parent,
}

/// Where an image's pages are to be found: one postcard value after the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexEntry {
    /// Version of its type.
    pub version: u16,
    /// Length in bytes.
    pub bytes: u64,
    /// Checksum of its encoding.
    pub checksum: Checksum,
}

/// A manifest with the checksum of its text, by which children know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The manifest.
    pub manifest: Manifest,
    /// Checksum of its text.
    pub checksum: Checksum,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    format: String,
    version: u32,
    checksum: Checksum,
    #[serde(borrow)]
    manifest: &'a RawValue,
}

/// The part of an envelope that every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

impl Manifest {
    /// A manifest without state and images, with an id of its own.
    pub(crate) fn begin(draft: Draft) -> Self {
        Self {
            id: Uuid::new_v4(),
            parent: draft.parent,
            created: draft.created,
            monitor: concat!("cutover ", env!("CARGO_PKG_VERSION")).to_owned(),
            spec: draft.spec,
            memory: draft.memory,
            cpu: draft.cpu,
            state: Vec::new(),
            images: Vec::new(),
        }
    }

    /// The text of the manifest's file, and the checksum by which children know it; the error is the reason why there
    /// cannot be such a manifest.
    pub(crate) fn seal(&self) -> Result<(String, Checksum), String> {
        self.check()?;
        let (text, checksum) = self.encode().map_err(|error| format!("its manifest: {error}"))?;
        if text.len() as u64 > MANIFEST_BYTES_MAX {
            return Err("its manifest is too large".to_owned());
        }
        Ok((text, checksum))
    }

    fn encode(&self) -> serde_json::Result<(String, Checksum)> {
        // Within the envelope; strings in JSON have no line feeds.
        let indented = serde_json::to_string_pretty(self)?.replace('\n', "\n  ");
        let manifest = RawValue::from_string(indented)?;
        let checksum = Checksum::of(manifest.get().as_bytes());
        let text = serde_json::to_string_pretty(&Envelope {
            format: FORMAT.to_owned(),
            version: FORMAT_VERSION,
            checksum,
            manifest: &manifest,
        })?;
        Ok((text + "\n", checksum))
    }

    /// Bytes of state.
    pub fn state_bytes(&self) -> u64 {
        self.state.iter().map(|section| section.bytes).sum()
    }

    /// Bytes that the snapshot's files take on disk: those of flat images have holes where nothing is stored.
    pub fn stored_bytes(&self) -> u64 {
        let image = |image: &ImageEntry| {
            let pages = image.stored_pages * u64::from(image.page_bytes);
            image.data_bytes.min(pages) + image.index.bytes
        };
        self.state_bytes() + self.images.iter().map(image).sum::<u64>()
    }

    /// The entry of an image.
    pub fn image(&self, name: &str) -> Option<&ImageEntry> {
        self.images.iter().find(|image| image.name == name)
    }

    /// The files beside the manifest, with their lengths in bytes.
    pub fn files(&self) -> impl Iterator<Item = (String, u64)> {
        let images = self.images.iter().map(|image| (image.file(), image.file_bytes()));
        images.chain([(section::FILE.to_owned(), self.state_bytes())])
    }
}

impl ImageEntry {
    /// Name of the image's file.
    pub fn file(&self) -> String {
        image_file(&self.name)
    }

    /// Length of the image's file.
    pub fn file_bytes(&self) -> u64 {
        self.data_bytes + self.index.bytes
    }
}

/// Name of the file of the image called `name`.
pub(crate) fn image_file(name: &str) -> String {
    format!("{name}.pages")
}

impl Sealed {
    /// Understands `text`, which begins at `start` of the file at `path`, and checks all that can be checked without
    /// other files: it has its checksum, an older or this version of the format, and says what can be.
    pub(crate) fn parse(path: &Path, text: &[u8], start: u64) -> Result<Self, Error> {
        let not_a_manifest = |source| Error::NotAManifest {
            path: path.to_owned(),
            source,
        };
        let head: Head = serde_json::from_slice(text).map_err(not_a_manifest)?;
        if head.format != FORMAT {
            let reason = format!("its format is called {:?}, not {FORMAT:?}", head.format);
            return Err(Error::invalid(path, reason));
        }
        if !(1..=FORMAT_VERSION).contains(&head.version) {
            return Err(Error::FormatVersion {
                path: path.to_owned(),
                found: head.version,
                newest: FORMAT_VERSION,
            });
        }
        let envelope: Envelope<'_> = serde_json::from_slice(text).map_err(not_a_manifest)?;
        let raw = envelope.manifest.get();
        let checksum = Checksum::of(raw.as_bytes());
        if checksum != envelope.checksum {
            // Both slices are of the same text.
            let offset = raw.as_ptr().addr() - text.as_ptr().addr();
            let what = "the manifest does not have its checksum";
            return Err(Error::damaged(path, start + offset as u64, what));
        }
        let manifest: Manifest = serde_json::from_str(raw).map_err(not_a_manifest)?;
        manifest.check().map_err(|reason| Error::invalid(path, reason))?;
        Ok(Self { manifest, checksum })
    }
}
