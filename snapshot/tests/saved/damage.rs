//! Files that are not as they were written: every byte counts, and no wrong page is ever read.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::verify::verify;
use proptest::prelude::*;

use crate::faulty_files::FaultyFiles;
use crate::sample::{child_content, page, read_chain, write_base, write_child};

struct Sample {
    dir: tempfile::TempDir,
}

impl Sample {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let files = Arc::new(FaultyFiles::sound());
        let base = write_base(dir.path(), files.clone()).expect("written");
        write_child(dir.path(), &base, files).expect("written");
        Self { dir }
    }

    /// Every file of one of the snapshots.
    fn files_of(&self, snapshot: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join(snapshot)).expect("a directory");
        let files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        assert_eq!(files.len(), 4, "manifest, state, memory, disk");
        files
    }

    /// Every file of both snapshots.
    fn files(&self) -> Vec<PathBuf> {
        [self.files_of("base"), self.files_of("child")].concat()
    }

    /// What is found when the newest snapshot is verified, after checking that restoring it fails too, or gives what
    /// was written.
    fn complaints(&self, context: &str) -> Vec<String> {
        let chain = match Chain::open(&self.dir.path().join("child")) {
            Ok(chain) => chain,
            Err(error) => return vec![error.to_string()],
        };
        let found = verify(&chain, &mut |_| ()).damage;
        match read_chain(&chain) {
            Ok(content) => assert!(content == child_content(), "{context}: wrong content"),
            Err(error) => assert!(!found.is_empty(), "{context}: not verified, but refused: {error}"),
        }
        found.iter().map(Error::to_string).collect()
    }
}

/// Every complaint names the snapshot, and those not about a manifest the file.
fn check_named(complaints: &[String], file: &Path, context: &str) {
    let snapshot = file.parent().expect("in a snapshot");
    let wanted = if file.ends_with("manifest.json") {
        snapshot
    } else {
        file
    };
    for complaint in complaints {
        assert!(
            complaint.contains(&wanted.display().to_string()),
            "{context}: {complaint}"
        );
    }
}

/// Cuts every file of a snapshot to every length.
fn cut_everywhere(snapshot: &str) {
    let sample = Sample::new();
    for file in sample.files_of(snapshot) {
        let whole = fs::read(&file).expect("readable");
        // The manifest ends with a line feed that nothing depends on.
        let meaningful = whole.len() - usize::from(file.ends_with("manifest.json"));
        for length in 0..meaningful {
            fs::write(&file, &whole[..length]).expect("writable");
            let context = format!("{} cut to {length}", file.display());
            let found = sample.complaints(&context);
            assert!(!found.is_empty(), "{context} is not noticed");
            check_named(&found, &file, &context);
        }
        fs::write(&file, &whole).expect("writable");
    }
}

/// Changes every byte of every file of a snapshot, one at a time.
fn change_everywhere(snapshot: &str) {
    let sample = Sample::new();
    for file in sample.files_of(snapshot) {
        let mut bytes = fs::read(&file).expect("readable");
        for position in 0..bytes.len() {
            // One bit, a different one from byte to byte.
            let flip = 1 << (position % 8);
            bytes[position] ^= flip;
            fs::write(&file, &bytes).expect("writable");
            let context = format!("{} byte {position}", file.display());
            let found = sample.complaints(&context);
            check_named(&found, &file, &context);
            // One blank for another between the parts of JSON makes no difference.
            let harmless = file.ends_with("manifest.json") && bytes[position].is_ascii_whitespace();
            assert!(harmless || !found.is_empty(), "{context} is not noticed");
            bytes[position] ^= flip;
        }
        fs::write(&file, &bytes).expect("writable");
    }
}

#[test]
fn what_is_not_damaged_is_not_complained_about() {
    assert_eq!(Sample::new().complaints("whole"), [""; 0]);
}

#[test]
fn a_file_of_the_newest_snapshot_cut_short_anywhere_is_noticed_and_named() {
    cut_everywhere("child");
}

#[test]
fn a_file_of_the_parent_cut_short_anywhere_is_noticed_and_named() {
    cut_everywhere("base");
}

#[test]
fn a_changed_byte_of_the_newest_snapshot_is_noticed_and_named() {
    change_everywhere("child");
}

#[test]
fn a_changed_byte_of_the_parent_is_noticed_and_named() {
    change_everywhere("base");
}

#[test]
fn a_file_that_grew_is_noticed() {
    let sample = Sample::new();
    for file in sample.files() {
        let whole = fs::read(&file).expect("readable");
        fs::write(&file, [&whole[..], b"x"].concat()).expect("writable");
        check_named(&sample.complaints(""), &file, "one byte more");
        assert_eq!(sample.complaints("").len(), 1, "{}", file.display());
        fs::write(&file, &whole).expect("writable");
    }
}

#[test]
fn a_missing_file_is_named() {
    let sample = Sample::new();
    for file in sample.files() {
        let away = file.with_extension("away");
        fs::rename(&file, &away).expect("moved");
        let found = sample.complaints("");
        assert_eq!(found.len(), 1, "{}", file.display());
        if !file.ends_with("base/manifest.json") {
            check_named(&found, &file, "missing");
        }
        fs::rename(&away, &file).expect("moved back");
    }
}

#[test]
fn damage_is_told_with_the_offset_of_the_part() {
    let sample = Sample::new();
    let file = sample.dir.path().join("base/disk-root.pages");
    let mut bytes = fs::read(&file).expect("readable");
    bytes[4096 + 17] ^= 1;
    fs::write(&file, &bytes).expect("writable");
    let found = sample.complaints("");
    let expected = format!(
        "{}: damaged at byte 4096: a page does not have its checksum",
        file.display()
    );
    assert_eq!(found, [expected]);
}

#[test]
fn every_damaged_place_is_told_once() {
    let sample = Sample::new();
    for file in sample.files().iter().filter(|file| !file.ends_with("manifest.json")) {
        let mut bytes = fs::read(file).expect("readable");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(file, &bytes).expect("writable");
    }
    assert_eq!(sample.complaints("").len(), 2 * 3, "state and two images each");
}

#[test]
fn a_damaged_chunk_is_refused_at_every_read_and_others_are_read() {
    let sample = Sample::new();
    let file = sample.dir.path().join("base/disk-root.pages");
    let mut bytes = fs::read(&file).expect("readable");
    bytes[4096] ^= 1;
    fs::write(&file, &bytes).expect("writable");
    let chain = Chain::open(&sample.dir.path().join("child")).expect("a chain");
    let image = chain.image("disk-root").expect("an image");
    let mut reader = image.reader().expect("a reader");
    for _ in 0..2 {
        assert!(matches!(reader.at(1), Err(Error::Damaged { offset: 4096, .. })));
        let found = reader.at(0).expect("another chunk").expect("within the image");
        assert_eq!(found.bytes, Some(&page(5)[..]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn files_changed_at_random_never_give_a_wrong_page(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1..=255_u8), 1..6),
        cut in prop::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
    ) {
        let sample = Sample::new();
        let files = sample.files();
        for (file, position, flip) in changes {
            let file = &files[file.index(files.len())];
            let mut bytes = fs::read(file).expect("readable");
            let position = position.index(bytes.len());
            bytes[position] ^= flip;
            fs::write(file, bytes).expect("writable");
        }
        if let Some((file, length)) = cut {
            let file = &files[file.index(files.len())];
            let bytes = fs::read(file).expect("readable");
            fs::write(file, &bytes[..length.index(bytes.len())]).expect("writable");
        }
        // It checks that what can be read is right.
        let found = sample.complaints("changed at random");
        let store = sample.dir.path().display().to_string();
        for complaint in found {
            prop_assert!(complaint.contains(&store), "{}", complaint);
        }
    }
}
