//! Guest images, built from distribution packages and rebuilt only when what they are made of has changed.
//!
//! ```text
//! guests/micro/{vmlinuz,vmlinux,initrd}                       the kernel, and an initramfs with the test programs
//! guests/debian/{vmlinuz,initrd,root.ext4,id_ed25519}         a whole distribution
//! guests/cache/                                               unpacked kernel packages
//! ```
//! No loop device, no root privilege and no running guest are needed to build them.

pub mod debian;
pub mod kernel;
pub mod micro;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::ui;

/// What an image is made of, in a form that can be compared with what it was made of the last time.
pub struct Ingredients(String);

impl Ingredients {
    /// Nothing yet.
    pub fn new() -> Self {
        Self(String::new())
    }

    /// Adds something that names itself and its version.
    pub fn add(&mut self, name: &str) {
        self.0.push_str(name);
        self.0.push('\n');
    }

    /// Adds contents, by their hash.
    pub fn add_contents(&mut self, name: &str, contents: &[u8]) {
        let digest: String = Sha256::digest(contents)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.add(&format!("{name} {digest}"));
    }

    /// Adds a file, by the hash of its contents.
    pub fn add_file(&mut self, file: &Path) -> Result<()> {
        let contents = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        self.add_contents(&name, &contents);
        Ok(())
    }
}

/// Runs `build`, which fills `directory`, unless the image there was made of the same ingredients.
pub fn build_if_changed(directory: &Path, ingredients: &Ingredients, build: impl FnOnce() -> Result<()>) -> Result<()> {
    let stamp = directory.join("ingredients");
    if fs::read_to_string(&stamp).is_ok_and(|built| built == ingredients.0) {
        return Ok(());
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    if stamp.exists() {
        fs::remove_file(&stamp)?;
    }
    ui::step(format_args!("building {}", directory.display()), build)?;
    fs::write(&stamp, &ingredients.0).with_context(|| format!("cannot write {}", stamp.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_rebuilt_only_when_an_ingredient_changes() {
        let directory = tempfile::tempdir().unwrap();
        let builds = std::cell::Cell::new(0);
        let build = |version: &str| {
            let mut ingredients = Ingredients::new();
            ingredients.add(version);
            build_if_changed(directory.path(), &ingredients, || {
                builds.set(builds.get() + 1);
                Ok(())
            })
            .unwrap();
        };
        build("kernel 1");
        build("kernel 1");
        assert_eq!(builds.get(), 1);
        build("kernel 2");
        assert_eq!(builds.get(), 2);
    }

    #[test]
    fn a_failed_build_is_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let ingredients = Ingredients::new();
        assert!(build_if_changed(directory.path(), &ingredients, || anyhow::bail!("no")).is_err());
        let mut built = false;
        build_if_changed(directory.path(), &ingredients, || {
            built = true;
            Ok(())
        })
        .unwrap();
        assert!(built);
    }
}
