//! Snapshots to test with, and what they must read as.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::error::SectionError;
use cutover_snapshot::files::Files;
use cutover_snapshot::image::{Image, Layout, Shape};
use cutover_snapshot::manifest::{Base, CpuNeeds, CpuRegister, CpuWord, MemoryRegion, Parent};
use cutover_snapshot::section::{Payload, Section, SectionWriter};
use cutover_snapshot::spec::VmSpec;
use cutover_snapshot::state_file::{self, StateFile};
use cutover_snapshot::store::{Snapshot, Store};
use cutover_snapshot::writer::{Draft, SnapshotWriter};
use serde::{Deserialize, Serialize};

use crate::faulty_files::FaultyFiles;

/// Bytes of a page in these tests.
pub const PAGE: u32 = 4096;

/// What an image must read as: its size, and its pages that are not zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reference {
    pub pages: u64,
    pub content: BTreeMap<u64, Vec<u8>>,
}

/// A section of state, in its second version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    pub guest_ns: u64,
    pub stopped: bool,
}

/// The same section in its first version.
#[derive(Serialize, Deserialize)]
pub struct ClockV1 {
    pub guest_ns: u64,
}

impl Section for Clock {
    const VERSION: u16 = 2;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode().map(|ClockV1 { guest_ns }| Self {
                guest_ns,
                stopped: false,
            }),
            2 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl Section for ClockV1 {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        payload.decode()
    }
}

impl Reference {
    /// Takes over pages as they were written.
    pub fn put(&mut self, page: u64, bytes: &[u8]) {
        if bytes.iter().all(|byte| *byte == 0) {
            self.content.remove(&page);
        } else {
            self.content.insert(page, bytes.to_vec());
        }
    }

    /// Makes the image another size.
    pub fn resize(&mut self, pages: u64) {
        self.pages = pages;
        self.content.retain(|page, _| *page < pages);
    }
}

/// All pages of an image.
pub fn read_all(image: &Image) -> Result<Reference, Error> {
    let page_bytes = image.page_bytes() as usize;
    let mut reader = image.reader()?;
    let mut read = Reference {
        pages: image.pages(),
        content: BTreeMap::new(),
    };
    let mut next = 0;
    while let Some(found) = reader.at(next)? {
        if let Some(bytes) = found.bytes {
            assert_eq!(bytes.len() as u64, found.count * u64::from(image.page_bytes()));
            for (page, bytes) in (next..).zip(bytes.chunks(page_bytes)) {
                assert!(bytes.iter().any(|byte| *byte != 0), "zero pages are not stored");
                read.put(page, bytes);
            }
        }
        next += found.count;
    }
    assert_eq!(next, image.pages());
    Ok(read)
}

/// A VM with `pages` pages of memory.
pub fn draft(pages: u64, parent: Option<&Snapshot>) -> Draft {
    let bytes = pages * u64::from(PAGE);
    let spec: VmSpec = serde_json::from_value(serde_json::json!({
        "name": "sample",
        "cpus": 1,
        "memory": { "size": bytes },
        "boot": { "kernel": "vmlinux" },
    }))
    .expect("a specification");
    Draft {
        created: "2026-11-21T12:00:00Z".parse().expect("a time"),
        parent: parent.map(Parent::from),
        spec,
        memory: vec![MemoryRegion { start: 0, bytes }],
        cpu: CpuNeeds {
            vendor: "AuthenticAMD".to_owned(),
            features: vec![CpuWord {
                leaf: 1,
                subleaf: 0,
                register: CpuRegister::Ecx,
                bits: 1 << 31,
            }],
        },
    }
}

/// The shape of an image with pages of [`PAGE`] bytes.
pub fn shape(pages: u64, base: Base, layout: Layout) -> Shape {
    Shape {
        page_bytes: PAGE,
        pages,
        base,
        layout,
    }
}

/// Writes one image.
pub fn put_image<'a>(
    writer: &mut SnapshotWriter,
    name: &str,
    shape: Shape,
    pages: impl IntoIterator<Item = (u64, &'a [u8])>,
) -> Result<(), Error> {
    let mut image = writer.image(name, shape)?;
    for (page, bytes) in pages {
        image.put(page, bytes)?;
    }
    writer.complete(image)
}

/// A store whose writes are not synced to any disk, so that tests are fast.
pub fn store(dir: &Path) -> Store {
    Store::with_files(dir, Arc::new(FaultyFiles::sound())).expect("a directory")
}

/// A page full of `byte`.
pub fn page(byte: u8) -> Vec<u8> {
    vec![byte; PAGE as usize]
}

/// A page that does not compress.
pub fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(PAGE as usize).collect()
}

/// Number of pages of the memory in [`write_base`] and [`write_child`].
pub const SAMPLE_PAGES: u64 = 8;

/// A small complete snapshot: compressed memory, a flat disk, one section.
pub fn write_base(dir: &Path, files: Arc<dyn Files>) -> Result<Snapshot, Error> {
    let mut writer = Store::with_files(dir, files)?.create("base", draft(SAMPLE_PAGES, None))?;
    writer.section("clock", &ClockV1 { guest_ns: 1 })?;
    let memory = shape(SAMPLE_PAGES, Base::Zero, Layout::Compressed { level: 1 });
    let (one, two, three) = (page(1), page(2), page(3));
    put_image(&mut writer, "memory", memory, [(1, &one[..]), (2, &two), (5, &three)])?;
    let disk = shape(2, Base::Zero, Layout::Flat);
    put_image(&mut writer, "disk-root", disk, [(1, &noise(1)[..])])?;
    writer.commit()
}

/// A small snapshot based on `base`: a page changed, a page new, a page zeroed.
pub fn write_child(dir: &Path, base: &Snapshot, files: Arc<dyn Files>) -> Result<Snapshot, Error> {
    let mut writer = Store::with_files(dir, files)?.create("child", draft(SAMPLE_PAGES, Some(base)))?;
    let clock = Clock {
        guest_ns: 2,
        stopped: true,
    };
    writer.section("clock", &clock)?;
    let memory = shape(SAMPLE_PAGES, Base::Parent, Layout::Packed);
    let (four, zero) = (noise(4), page(0));
    put_image(&mut writer, "memory", memory, [(1, &four[..]), (2, &zero)])?;
    let disk = shape(2, Base::Parent, Layout::Compressed { level: 1 });
    put_image(&mut writer, "disk-root", disk, [(0, &page(5)[..])])?;
    writer.commit()
}

/// A small file of state: two sections.
pub fn write_state_file(path: &Path, guest_ns: u64, files: &dyn Files) -> Result<(), Error> {
    let mut file = StateFile::new(draft(SAMPLE_PAGES, None));
    file.section("clock", &ClockV1 { guest_ns })?;
    file.section("clock/new", &clock_of(guest_ns))?;
    file.write_through(files, path)
}

/// What a file of state that [`write_state_file`] has written reads as: the time in it.
pub fn read_state_file(path: &Path) -> Result<u64, Error> {
    let (manifest, state) = state_file::read(path)?;
    assert_eq!(manifest.spec, draft(SAMPLE_PAGES, None).spec);
    let Clock { guest_ns, .. } = state.read("clock")?;
    assert_eq!(state.read::<Clock>("clock/new")?, clock_of(guest_ns));
    Ok(guest_ns)
}

fn clock_of(guest_ns: u64) -> Clock {
    Clock {
        guest_ns,
        stopped: true,
    }
}

/// What a chain reads as, all of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Content {
    pub clock: Clock,
    pub memory: Reference,
    pub disk: Reference,
}

/// What [`write_base`] has written.
pub fn base_content() -> Content {
    Content {
        clock: Clock {
            guest_ns: 1,
            stopped: false,
        },
        memory: Reference {
            pages: SAMPLE_PAGES,
            content: [(1, page(1)), (2, page(2)), (5, page(3))].into(),
        },
        disk: Reference {
            pages: 2,
            content: [(1, noise(1))].into(),
        },
    }
}

/// What [`write_child`] on top of [`write_base`] amounts to.
pub fn child_content() -> Content {
    Content {
        clock: Clock {
            guest_ns: 2,
            stopped: true,
        },
        memory: Reference {
            pages: SAMPLE_PAGES,
            content: [(1, noise(4)), (5, page(3))].into(),
        },
        disk: Reference {
            pages: 2,
            content: [(0, page(5)), (1, noise(1))].into(),
        },
    }
}

/// Reads all that the chain of the snapshot in `dir` holds.
pub fn read_content(dir: &Path) -> Result<Content, Error> {
    read_chain(&Chain::open(dir)?)
}

/// Reads all that a chain holds.
pub fn read_chain(chain: &Chain) -> Result<Content, Error> {
    Ok(Content {
        clock: chain.state()?.read("clock")?,
        memory: read_all(&chain.image("memory")?)?,
        disk: read_all(&chain.image("disk-root")?)?,
    })
}
