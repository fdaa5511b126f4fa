//! Flattening: a chain becomes one complete snapshot. The chain stays as it is.

use crate::chain::Chain;
use crate::error::Error;
use crate::image::{Layout, PageSource, Progress, Scan, Shape};
use crate::manifest::Base;
use crate::section::SectionWriter;
use crate::store::{Snapshot, Store};
use crate::writer::Draft;

/// Writes what `chain` amounts to as a snapshot called `name` of `store`, its images laid out as `layout` says.
///
/// # Errors
/// Part of the chain is damaged, the name is taken, or the snapshot cannot be written.
pub fn flatten(
    chain: &Chain,
    store: &Store,
    name: &str,
    layout: Layout,
    progress: &mut dyn FnMut(Progress),
) -> Result<Snapshot, Error> {
    let manifest = &chain.newest().sealed.manifest;
    let draft = Draft {
        created: manifest.created,
        parent: None,
        spec: manifest.spec.clone(),
        memory: manifest.memory.clone(),
        cpu: manifest.cpu.clone(),
    };
    let images = manifest.images.iter().map(|entry| chain.image(&entry.name));
    let images = images.collect::<Result<Vec<_>, _>>()?;
    let mut sources = Vec::with_capacity(images.len());
    for image in &images {
        sources.push(Scan::new(image.reader()?));
    }
    let total = sources.iter().map(PageSource::bytes_total).sum();

    let mut writer = store.create(name, draft)?;
    let state = chain.state()?;
    for section in &manifest.state {
        writer.payload(&section.name, &state.payload(&section.name)?);
    }
    let mut before = 0;
    for (entry, source) in manifest.images.iter().zip(&mut sources) {
        let shape = Shape {
            page_bytes: entry.page_bytes,
            pages: entry.pages,
            base: Base::Zero,
            layout,
        };
        let mut image = writer.image(&entry.name, shape)?;
        let bytes = source.bytes_total();
        image.copy_from(source, &mut |Progress { done, .. }| {
            progress(Progress {
                done: before + done,
                total,
            });
        })?;
        before += bytes;
        writer.complete(image)?;
    }
    writer.commit()
}
