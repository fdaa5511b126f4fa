//! Merging: a chain becomes one complete snapshot, under a new name or in place of its newest.
//!
//! Under a new name nothing else changes: what is built on snapshots of the chain goes on being built on them.
//!
//! In place the newest snapshot of the chain is exchanged for its merged form by one rename. A child names its parent by
//! the checksum of its manifest, and the merged form has another manifest: so that no chain ever breaks, this is refused
//! while others are built on the snapshot. (Rewriting all descendants would change their checksums too, and with them
//! what a VM believes that is running and goes on saving increments.)

use std::path::PathBuf;

use crate::chain::Chain;
use crate::compose::Composer;
use crate::error::Error;
use crate::files::NewFiles;
use crate::image::{Layout, PageSource, Progress, Scan, Shape};
use crate::manifest::{Base, Manifest, Sealed};
use crate::section::SectionWriter;
use crate::store::{Snapshot, Store};
use crate::writer::{Draft, SnapshotWriter};

/// Writes what `chain` amounts to as a snapshot called `name` of `store`, its images laid out as `layout` says.
///
/// # Errors
/// Part of the chain is damaged, the name is taken, or the snapshot cannot be written.
pub fn merge(
    chain: &Chain,
    store: &Store,
    name: &str,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<Snapshot, Error> {
    let mut writer = store.create(name, draft(chain))?;
    writer.fill(|composer, files| fill(chain, composer, files, layout, progress))?;
    writer.commit()
}

/// Replaces the newest snapshot of `chain` by what the chain amounts to: then it needs no other. Its name stays, its id
/// does not.
///
/// # Errors
/// Part of the chain is damaged, another snapshot is built on this one, it is not a directory of this host, it cannot
/// be written, or somebody else writes in its store. Then the snapshot is as it was.
pub fn merge_in_place(
    chain: &Chain,
    store: &Store,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<Snapshot, Error> {
    let mut writer = SnapshotWriter::replace(store, chain.newest(), draft(chain))?;
    writer.fill(|composer, files| fill(chain, composer, files, layout, progress))?;
    writer.commit()
}

/// Writes what `chain` amounts to as files in `dir` that `files` creates.
pub(crate) fn write_merged(
    chain: &Chain,
    dir: PathBuf,
    files: &dyn NewFiles,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<Sealed, Error> {
    let mut composer = Composer::new(dir, Manifest::begin(draft(chain)), None);
    fill(chain, &mut composer, files, layout, progress)?;
    composer.finish(files)
}

fn draft(chain: &Chain) -> Draft {
    let manifest = &chain.newest().sealed.manifest;
    Draft {
        created: manifest.created,
        parent: None,
        spec: manifest.spec.clone(),
        memory: manifest.memory.clone(),
        cpu: manifest.cpu.clone(),
    }
}

/// Gives the snapshot that is being composed all state and images of `chain`.
fn fill(
    chain: &Chain,
    composer: &mut Composer,
    files: &dyn NewFiles,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    let manifest = &chain.newest().sealed.manifest;
    let mut sources = Vec::with_capacity(manifest.images.len());
    for entry in &manifest.images {
        sources.push(Scan::new(chain.image(&entry.name)?.reader()?));
    }
    let total = sources.iter().map(PageSource::bytes_total).sum();
    let state = chain.state()?;
    for section in &manifest.state {
        composer.payload(&section.name, &state.payload(&section.name)?);
    }
    let mut before = 0;
    for (entry, source) in manifest.images.iter().zip(&mut sources) {
        let shape = Shape {
            page_bytes: entry.page_bytes,
            pages: entry.pages,
            base: Base::Zero,
            layout,
        };
        let mut image = composer.image(files, &entry.name, shape)?;
        let bytes = source.bytes_total();
        image.copy_from(source, &mut |Progress { done, .. }| {
            progress(Progress {
                done: before + done,
                total,
            });
        })?;
        before += bytes;
        composer.complete(image)?;
    }
    Ok(())
}
