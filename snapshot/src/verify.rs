//! Verifying a chain: every checksum of every snapshot, also of pages that newer ones hide.

use std::collections::HashSet;

use crate::chain::Chain;
use crate::error::Error;
use crate::image::{ChunkReader, Layer, Progress};
use crate::manifest::ImageEntry;
use crate::store::Snapshot;

/// Most damaged places that are listed.
pub const DAMAGE_MAX: usize = 100;

/// What verifying has found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Chunks of pages that were read.
    pub chunks: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// What is damaged, at most [`DAMAGE_MAX`] places.
    pub damage: Vec<Error>,
}

/// Reads and verifies everything that the chain consists of.
///
/// `progress` is told after each part how far it has come.
pub fn verify(chain: &Chain, progress: &mut dyn FnMut(Progress)) -> Verified {
    let total = |snapshot: &Snapshot| -> u64 { snapshot.sealed.manifest.files().map(|(_, bytes)| bytes).sum() };
    let mut run = Run {
        chain,
        found: Verified::default(),
        total: chain.snapshots().iter().map(total).sum(),
        progress,
    };
    for snapshot in chain.snapshots() {
        let manifest = &snapshot.sealed.manifest;
        let state = chain.state_of(snapshot).map(|_| ());
        run.note(state, manifest.state_bytes());
        for entry in &manifest.images {
            let result = run.layer(snapshot, entry);
            run.note(result, entry.index.bytes);
        }
    }
    // Images that each are sound may still not fit together.
    for entry in &chain.newest().sealed.manifest.images {
        let result = chain.image(&entry.name).map(|_| ());
        run.note(result, 0);
    }
    run.found.drop_repeated();
    run.found
}

struct Run<'a> {
    chain: &'a Chain,
    found: Verified,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl Run<'_> {
    /// Notes that a part of `bytes` was dealt with.
    fn note(&mut self, result: Result<(), Error>, bytes: u64) {
        self.found.bytes += bytes;
        if let Err(error) = result
            && self.found.damage.len() < DAMAGE_MAX
        {
            self.found.damage.push(error);
        }
        (self.progress)(Progress {
            done: self.found.bytes,
            total: self.total,
        });
    }

    /// Verifies what one snapshot stores of an image.
    fn layer(&mut self, snapshot: &Snapshot, entry: &ImageEntry) -> Result<(), Error> {
        let (layer, extents) = Layer::open(self.chain.source(), snapshot, entry, 0)?;
        let mut reader = ChunkReader::new(layer.path())?;
        let mut pages = Vec::new();
        for chunk in layer.chunks() {
            let result = reader.read(&layer, chunk, &mut pages);
            self.found.chunks += 1;
            self.note(result, u64::from(chunk.stored_bytes) + chunk.table_bytes());
        }
        if layer.is_flat() {
            // Who maps a flat file sees also what no checksum covers.
            let page_bytes = u64::from(entry.page_bytes);
            let pages = extents
                .iter()
                .map(|extent| extent.first * page_bytes..extent.end() * page_bytes);
            let mut covered: Vec<_> = pages.chain(layer.tables()).collect();
            covered.sort_unstable_by_key(|covered| covered.start);
            let mut free_from = 0;
            for covered in covered {
                check_zero(&layer, free_from, covered.start)?;
                free_from = free_from.max(covered.end);
            }
            check_zero(&layer, free_from, entry.data_bytes)?;
        }
        Ok(())
    }
}

/// Checks that the bytes from `offset` to before `end` of a flat file are zero.
fn check_zero(layer: &Layer, mut offset: u64, end: u64) -> Result<(), Error> {
    const BLOCK: u64 = 256 << 10;
    let mut block = Vec::new();
    while offset < end {
        block.resize(usize::try_from(BLOCK.min(end - offset)).expect("a small block"), 0);
        layer.read_at(&mut block, offset)?;
        if let Some(position) = block.iter().position(|byte| *byte != 0) {
            let what = "there is data where the index has none";
            return Err(Error::damaged(layer.path(), offset + position as u64, what));
        }
        offset += block.len() as u64;
    }
    Ok(())
}

impl Verified {
    /// An index that is damaged was found once for itself and once as part of the whole.
    fn drop_repeated(&mut self) {
        let mut seen = HashSet::new();
        self.damage.retain(|error| seen.insert(error.to_string()));
    }
}
