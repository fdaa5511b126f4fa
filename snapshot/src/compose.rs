//! The files of one snapshot, wherever they are created: images, then the state, and last the manifest, which makes a
//! snapshot of them.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::files::{NewFiles, write_whole};
use crate::image::{ImageWriter, Shape};
use crate::manifest::{self, Base, Manifest, Sealed};
use crate::section::{self, Payload, SectionWriter, Sections};

/// A snapshot whose files are being written.
pub(crate) struct Composer {
    /// Where the files are created.
    dir: PathBuf,
    /// What there is of the manifest.
    pub manifest: Manifest,
    /// What the snapshot is built on.
    parent: Option<Manifest>,
    sections: Sections,
    /// Images that are begun and not completed.
    open_images: Vec<String>,
}

impl Composer {
    /// A snapshot in `dir` that is going to be what `manifest` says, built on `parent`.
    pub fn new(dir: PathBuf, manifest: Manifest, parent: Option<Manifest>) -> Self {
        Self {
            dir,
            manifest,
            parent,
            sections: Sections::default(),
            open_images: Vec::new(),
        }
    }

    /// Where the files are created.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Begins an image.
    pub fn image(&mut self, files: &dyn NewFiles, name: &str, shape: Shape) -> Result<ImageWriter, Error> {
        let unwritable = |reason| Error::unwritable(&self.dir, reason);
        manifest::check_part_name(name, false).map_err(unwritable)?;
        if shape.base == Base::Parent && !self.parent_has(name, shape.page_bytes) {
            let reason = format!("image '{name}' is based on a parent that has none with such pages");
            return Err(Error::unwritable(&self.dir, reason));
        }
        let image = ImageWriter::create(files, &self.dir, name, shape)?;
        self.open_images.push(name.to_owned());
        Ok(image)
    }

    /// Whether the parent has such an image.
    pub fn parent_has(&self, name: &str, page_bytes: u32) -> bool {
        let image = self.parent.as_ref().and_then(|manifest| manifest.image(name));
        image.is_some_and(|image| image.page_bytes == page_bytes)
    }

    /// Takes back an image that has all its pages, and makes it permanent.
    pub fn complete(&mut self, image: ImageWriter) -> Result<(), Error> {
        let name = image.name().to_owned();
        self.manifest.images.push(image.finish()?);
        self.open_images.retain(|open| *open != name);
        Ok(())
    }

    /// Writes the state and the manifest.
    pub fn finish(&mut self, files: &dyn NewFiles) -> Result<Sealed, Error> {
        if let Some(name) = self.open_images.first() {
            let reason = format!("image '{name}' was begun and not completed");
            return Err(Error::unwritable(&self.dir, reason));
        }
        let Sections { entries, bytes } = std::mem::take(&mut self.sections);
        self.manifest.state = entries;
        let sealed = self.manifest.seal();
        let (text, checksum) = sealed.map_err(|reason| Error::unwritable(&self.dir, reason))?;
        write_whole(files, &self.dir.join(section::FILE), &bytes)?;
        write_whole(files, &self.dir.join(manifest::FILE), text.as_bytes())?;
        Ok(Sealed {
            manifest: self.manifest.clone(),
            checksum,
        })
    }
}

impl SectionWriter for Composer {
    fn payload(&mut self, name: &str, payload: &Payload<'_>) {
        self.sections.payload(name, payload);
    }
}
