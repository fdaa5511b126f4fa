//! What a manifest may say: every number that is later allocated, multiplied or looked up is bounded here.

use std::collections::HashSet;

use super::{
    Base, CPU_WORDS_MAX, IMAGES_MAX, ImageEntry, MEMORY_IMAGE, MEMORY_PAGE_BYTES, Manifest, MemoryRegion, REGIONS_MAX,
};
use crate::image;
use crate::section::{SECTIONS_MAX, STATE_BYTES_MAX, SectionEntry};
use crate::store;

impl Manifest {
    /// Checks what can be checked without the other files; the error is the reason.
    pub(crate) fn check(&self) -> Result<(), String> {
        if let Some(parent) = &self.parent {
            store::check_name(&parent.name).map_err(|error| format!("parent: {error}"))?;
        }
        if self.cpu.features.len() > CPU_WORDS_MAX {
            return Err(format!("cpu: more than {CPU_WORDS_MAX} words of features"));
        }
        check_sections(&self.state)?;
        let memory_bytes = check_regions(&self.memory)?;
        if memory_bytes != self.spec.memory.size.bytes() {
            return Err(format!(
                "memory: the regions have {memory_bytes} bytes, but the VM has {}",
                self.spec.memory.size.bytes()
            ));
        }
        self.check_images(memory_bytes)
    }

    fn check_images(&self, memory_bytes: u64) -> Result<(), String> {
        at_most("images", self.images.len(), IMAGES_MAX)?;
        unique("images", self.images.iter().map(|image| image.name.as_str()))?;
        for image in &self.images {
            let wrong = |reason: String| format!("image {:?}: {reason}", image.name);
            image.check().map_err(wrong)?;
            if image.base == Base::Parent && self.parent.is_none() {
                return Err(wrong("is based on a parent, but the snapshot has none".to_owned()));
            }
            let bytes = image.pages * u64::from(image.page_bytes);
            if image.name == MEMORY_IMAGE && (image.page_bytes != MEMORY_PAGE_BYTES || bytes != memory_bytes) {
                return Err(wrong(format!(
                    "{} pages of {} bytes are not the memory of the VM",
                    image.pages, image.page_bytes
                )));
            }
        }
        Ok(())
    }
}

impl ImageEntry {
    fn check(&self) -> Result<(), String> {
        check_part_name(&self.name, false)?;
        image::check_shape(self.page_bytes, self.pages)?;
        if self.stored_pages > self.pages || self.zero_pages > self.pages - self.stored_pages {
            return Err("stores more pages than it has".to_owned());
        }
        if self.data_bytes > image::DATA_BYTES_MAX {
            return Err(format!("{} bytes of pages are too many", self.data_bytes));
        }
        if self.index.bytes > image::INDEX_BYTES_MAX {
            return Err(format!("an index of {} bytes is too large", self.index.bytes));
        }
        Ok(())
    }
}

/// Checks the entries of sections; the error is the reason.
pub(crate) fn check_sections(sections: &[SectionEntry]) -> Result<(), String> {
    at_most("state", sections.len(), SECTIONS_MAX)?;
    unique("state", sections.iter().map(|section| section.name.as_str()))?;
    let mut left = STATE_BYTES_MAX;
    for section in sections {
        check_part_name(&section.name, true)?;
        left = left
            .checked_sub(section.bytes)
            .ok_or_else(|| format!("state: more than {STATE_BYTES_MAX} bytes"))?;
    }
    Ok(())
}

/// Bytes of all regions.
fn check_regions(regions: &[MemoryRegion]) -> Result<u64, String> {
    at_most("memory", regions.len(), REGIONS_MAX)?;
    let mut free_from = 0;
    let mut bytes = 0;
    let page = u64::from(MEMORY_PAGE_BYTES);
    for region in regions {
        let end = region.start.checked_add(region.bytes);
        let whole_pages = region.start.is_multiple_of(page) && region.bytes.is_multiple_of(page);
        match end {
            Some(end) if whole_pages && region.start >= free_from && region.bytes > 0 => free_from = end,
            _ => {
                let MemoryRegion { start, bytes } = region;
                return Err(format!(
                    "memory: {bytes} bytes at {start:#x} are not a region of whole pages of its own"
                ));
            }
        }
        // Regions are apart, so their sum is below their last end.
        bytes += region.bytes;
    }
    Ok(bytes)
}

/// Most bytes of the name of a section or an image: an id of a device, and what it is.
const PART_NAME_MAX: usize = 128;

/// Names of images, and of sections (which may have slashes): they are shown to people and become file names.
pub(crate) fn check_part_name(name: &str, slashes: bool) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c) || (slashes && c == '/');
    if name.is_empty() || name.len() > PART_NAME_MAX || !name.chars().all(allowed) {
        return Err(format!("{name:?} cannot be the name of a part"));
    }
    Ok(())
}

fn at_most(what: &str, count: usize, max: usize) -> Result<(), String> {
    if count > max {
        return Err(format!("{what}: {count} entries are too many, there can be {max}"));
    }
    Ok(())
}

fn unique<'a>(what: &str, mut names: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut seen = HashSet::new();
    match names.find(|name| !seen.insert(*name)) {
        Some(name) => Err(format!("{what}: {name:?} is there twice")),
        None => Ok(()),
    }
}
