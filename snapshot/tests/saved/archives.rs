//! Snapshots in single files: the chain they were made of, read without unpacking; damage anywhere is noticed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use cutover_snapshot::Error;
use cutover_snapshot::archive::write_archive;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::files::Files;
use cutover_snapshot::image::Layout;
use cutover_snapshot::merge::merge;
use cutover_snapshot::verify::verify;
use proptest::prelude::*;

use crate::faulty_files::{Fault, FaultyFiles};
use crate::sample::{base_content, child_content, read_chain, read_content, store, write_base, write_child};

const LAYOUTS: [Layout; 3] = [Layout::Flat, Layout::Packed, Layout::Compressed { level: 1 }];

/// A store with `base` and `child`.
fn sample() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let files = Arc::new(FaultyFiles::sound());
    let base = write_base(dir.path(), files.clone()).expect("written");
    write_child(dir.path(), &base, files).expect("written");
    dir
}

fn export(dir: &Path, layout: Layout, files: &dyn Files) -> Result<PathBuf, Error> {
    let chain = Chain::open(&dir.join("child")).expect("a chain");
    let file = dir.join("child.tar");
    write_archive(&chain, files, &file, layout, &mut |_| ()).map(|()| file)
}

fn exported(dir: &Path, layout: Layout) -> PathBuf {
    export(dir, layout, &FaultyFiles::sound()).expect("exported")
}

/// What reading all of the file and verifying it finds wrong, each of which names the file.
fn complaints(file: &Path) -> Vec<String> {
    let found: Vec<Error> = match Chain::open(file) {
        Err(error) => vec![error],
        Ok(chain) => {
            let found = verify(&chain, &mut |_| ()).damage;
            match read_chain(&chain) {
                Ok(content) => assert!(content == child_content(), "wrong content"),
                Err(error) => assert!(!found.is_empty(), "not verified, but refused: {error}"),
            }
            found
        }
    };
    let found: Vec<String> = found.iter().map(Error::to_string).collect();
    for complaint in &found {
        assert!(complaint.contains(&file.display().to_string()), "{complaint}");
    }
    found
}

#[test]
fn a_chain_in_a_single_file_reads_as_the_chain() {
    for layout in LAYOUTS {
        let dir = sample();
        let file = exported(dir.path(), layout);
        assert_eq!(complaints(&file), [""; 0], "{layout:?}");
        let chain = Chain::open(&file).expect("sound");
        assert_eq!(chain.snapshots().len(), 1);
        assert_eq!(read_chain(&chain).expect("readable"), child_content());
        assert!(
            chain.image("memory").expect("there").flat_file().is_none(),
            "only part of a file"
        );
        let refused = export(dir.path(), layout, &FaultyFiles::sound());
        assert!(matches!(refused, Err(Error::Exists(_))));
    }
}

#[test]
fn a_single_file_becomes_a_snapshot_of_a_store_again() {
    let dir = sample();
    let file = exported(dir.path(), Layout::Packed);
    let chain = Chain::open(&file).expect("sound");
    merge(&chain, &store(dir.path()), "again", Layout::Flat, &mut |_| ()).expect("merged");
    assert_eq!(read_content(&dir.path().join("again")).expect("sound"), child_content());
    // A file beside snapshots is none of them, and in nobody's way.
    let names: Vec<_> = store(dir.path())
        .list()
        .expect("a store")
        .into_iter()
        .map(|found| found.name)
        .collect();
    assert_eq!(names, ["again", "base", "child"]);
}

#[test]
fn what_tar_packs_and_unpacks_is_the_same_snapshot() {
    let dir = sample();
    let tar = |args: &[&str], inside: &str| {
        let status = Command::new("tar")
            .args(args)
            .current_dir(dir.path().join(inside))
            .status();
        assert!(status.expect("tar is installed").success(), "{args:?}");
    };
    let file = exported(dir.path(), Layout::Packed);
    fs::create_dir(dir.path().join("unpacked")).expect("created");
    tar(&["-xf", "../child.tar"], "unpacked");
    assert_eq!(
        read_content(&dir.path().join("unpacked")).expect("sound"),
        child_content()
    );

    fs::remove_file(&file).expect("removed");
    tar(
        &[
            "--format=gnu",
            "-cf",
            "../base.tar",
            "manifest.json",
            "state.bin",
            "memory.pages",
            "disk-root.pages",
        ],
        "base",
    );
    assert_eq!(
        read_content(&dir.path().join("base.tar")).expect("sound"),
        base_content()
    );
    tar(
        &[
            "-cf",
            "../child.tar",
            "manifest.json",
            "state.bin",
            "memory.pages",
            "disk-root.pages",
        ],
        "child",
    );
    let error = Chain::open(&file).expect_err("has a parent that is not in the file");
    assert!(matches!(error, Error::ParentMissing { .. }), "{error}");
}

#[test]
fn archives_that_are_no_snapshots_are_refused_with_the_reason() {
    let dir = sample();
    let tar = |args: &[&str]| {
        let status = Command::new("tar")
            .args(args)
            .current_dir(dir.path().join("base"))
            .status();
        assert!(status.expect("tar is installed").success(), "{args:?}");
        let file = dir.path().join("x.tar");
        let error = Chain::open(&file).expect_err("refused").to_string();
        assert!(error.contains("x.tar"), "{error}");
        error
    };
    assert!(tar(&["-cf", "../x.tar", "."]).contains("damaged at byte 0: a member is not a plain file"));
    std::os::unix::fs::symlink("state.bin", dir.path().join("base/link")).expect("created");
    assert!(tar(&["-cf", "../x.tar", "state.bin", "link"]).contains("a member is not a plain file"));
    assert!(tar(&["-cf", "../x.tar", "state.bin", "state.bin", "--hard-dereference"]).contains("is there twice"));
    assert!(tar(&["-cf", "../x.tar", "state.bin"]).contains("manifest.json is missing"));
    assert!(tar(&["-cf", "../x.tar", "manifest.json", "state.bin"]).contains("memory.pages: is missing"));
    fs::write(dir.path().join("x.tar"), b"something else").expect("writable");
    let error = Chain::open(&dir.path().join("x.tar")).expect_err("refused");
    assert!(
        error.to_string().contains("damaged at byte 0: the file ends early"),
        "{error}"
    );
}

#[test]
fn a_file_cut_short_anywhere_is_noticed_and_named() {
    let dir = sample();
    let file = exported(dir.path(), Layout::Compressed { level: 1 });
    let whole = fs::read(&file).expect("readable");
    for length in 0..whole.len() {
        fs::write(&file, &whole[..length]).expect("writable");
        assert!(!complaints(&file).is_empty(), "cut to {length} is not noticed");
    }
}

#[test]
fn a_changed_byte_is_noticed_and_named() {
    let dir = sample();
    let file = exported(dir.path(), Layout::Compressed { level: 1 });
    let mut bytes = fs::read(&file).expect("readable");
    for position in 0..bytes.len() {
        let flip = 1 << (position % 8);
        bytes[position] ^= flip;
        fs::write(&file, &bytes).expect("writable");
        // One blank for another between the parts of JSON makes no difference.
        let harmless = bytes[position].is_ascii_whitespace();
        assert!(
            harmless || !complaints(&file).is_empty(),
            "byte {position} is not noticed"
        );
        bytes[position] ^= flip;
    }
}

#[test]
fn damage_is_told_with_the_member_and_the_offset_in_it() {
    let dir = sample();
    let file = exported(dir.path(), Layout::Flat);
    let mut bytes = fs::read(&file).expect("readable");
    // Memory comes first, after its header; its second page is the first that is stored.
    bytes[512 + 4096 + 7] ^= 1;
    fs::write(&file, &bytes).expect("writable");
    let expected = format!(
        "{}/memory.pages: damaged at byte 4096: a page does not have its checksum",
        file.display()
    );
    assert_eq!(complaints(&file), [expected]);
}

#[test]
fn an_export_that_fails_at_any_step_leaves_no_file_of_that_name() {
    for fault in [Fault::Full, Fault::Crash] {
        let mut failed = 0;
        for step in 0.. {
            let dir = sample();
            let files = FaultyFiles::failing(step, fault);
            let result = export(dir.path(), Layout::Packed, &files);
            if files.held() {
                result.expect("there was no fault");
                break;
            }
            let file = dir.path().join("child.tar");
            if let Err(error) = result {
                failed += 1;
                let renamed = file.exists();
                assert!(!renamed || complaints(&file).is_empty(), "step {step}: {error}");
                assert!(
                    fault == Fault::Crash || matches!(error, Error::Full(_)),
                    "step {step}: {error}"
                );
                assert!(fault == Fault::Crash || fs::read_dir(dir.path()).expect("a directory").count() == 2);
            }
        }
        assert!(failed > 10, "only {failed} steps can fail");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn bytes_changed_at_random_never_give_a_wrong_page(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 1..=255_u8), 1..5),
        cut in prop::option::of(any::<prop::sample::Index>()),
        layout in prop::sample::select(&LAYOUTS[..]),
    ) {
        let dir = sample();
        let file = exported(dir.path(), layout);
        let mut bytes = fs::read(&file).expect("readable");
        for (position, flip) in changes {
            let position = position.index(bytes.len());
            bytes[position] ^= flip;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&file, &bytes).expect("writable");
        // It checks that what can be read is right.
        complaints(&file);
    }
}
