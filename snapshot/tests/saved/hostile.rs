//! Files whose checksums are right and whose content is not: every number is bounded before it is used.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::checksum::Checksum;
use cutover_snapshot::manifest::Sealed;
use cutover_snapshot::verify::verify;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::faulty_files::FaultyFiles;
use crate::sample::{child_content, draft, read_all, read_content, store, write_base, write_child};

/// Writes base and child.
fn sample() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let files = Arc::new(FaultyFiles::sound());
    let base = write_base(dir.path(), files.clone()).expect("written");
    write_child(dir.path(), &base, files).expect("written");
    dir
}

/// Changes the manifest of a snapshot and gives it a matching checksum.
pub fn reseal(snapshot: &Path, change: impl FnOnce(&mut Value)) -> Checksum {
    let path = snapshot.join("manifest.json");
    let text = fs::read_to_string(&path).expect("readable");
    let mut envelope: Value = serde_json::from_str(&text).expect("JSON");
    change(&mut envelope["manifest"]);
    let manifest = envelope["manifest"].to_string();
    let checksum = Checksum::of(manifest.as_bytes());
    let text =
        format!(r#"{{"format": "cutover-snapshot", "version": 1, "checksum": "{checksum}", "manifest": {manifest}}}"#);
    fs::write(&path, text).expect("writable");
    checksum
}

/// The manifest of the snapshot at `path`.
fn sealed(path: &Path) -> Sealed {
    let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
    let store = store(path.parent().expect("in a store"));
    store.snapshot(name).expect("sound").sealed
}

/// Sets the value at `pointer`.
pub fn set(manifest: &mut Value, pointer: &str, value: Value) {
    *manifest.pointer_mut(pointer).expect(pointer) = value;
}

#[test]
fn a_manifest_that_says_what_cannot_be_is_refused_with_the_reason() {
    let dir = sample();
    let base = dir.path().join("base");
    let path = base.join("manifest.json");
    let original = fs::read(&path).expect("readable");
    let page = |number: u64| json!({ "start": number * 4096, "bytes": 4096 });
    for (pointer, value, reason) in [
        ("/images/0/name", json!("../memory"), "cannot be the name of a part"),
        ("/images/0/name", json!(""), "cannot be the name of a part"),
        ("/images/1/name", json!("memory"), "\"memory\" is there twice"),
        ("/images/1/page_bytes", json!(0), "pages of 0 bytes"),
        ("/images/1/page_bytes", json!(5000), "pages of 5000 bytes"),
        ("/images/1/page_bytes", json!(1 << 30), "pages of 1073741824 bytes"),
        (
            "/images/1/pages",
            json!(u64::MAX),
            "18446744073709551615 pages are too many",
        ),
        (
            "/images/1/stored_pages",
            json!(u64::MAX),
            "stores more pages than it has",
        ),
        ("/images/1/zero_pages", json!(u64::MAX), "stores more pages than it has"),
        ("/images/1/data_bytes", json!(u64::MAX), "bytes of pages are too many"),
        ("/images/1/index/bytes", json!(u64::MAX), "is too large"),
        (
            "/images/1/base",
            json!("parent"),
            "is based on a parent, but the snapshot has none",
        ),
        ("/images/0/pages", json!(7), "are not the memory of the VM"),
        ("/images", json!(vec![json!(0); 100_000]), "invalid type"),
        ("/state/0/name", json!("a b"), "cannot be the name of a part"),
        ("/state/0/bytes", json!(u64::MAX), "state: more than 67108864 bytes"),
        (
            "/memory",
            json!([page(0)]),
            "the regions have 4096 bytes, but the VM has 32768",
        ),
        (
            "/memory",
            json!([page(4), page(4)]),
            "4096 bytes at 0x4000 are not a region",
        ),
        (
            "/memory",
            json!([{ "start": 1, "bytes": 4096 }]),
            "4096 bytes at 0x1 are not a region",
        ),
        (
            "/memory",
            json!([{ "start": 0, "bytes": 0 }]),
            "0 bytes at 0x0 are not a region",
        ),
        (
            "/memory",
            json!([{ "start": u64::MAX - 4095, "bytes": 8192 }]),
            "are not a region",
        ),
        (
            "/memory",
            json!((0..1000).map(page).collect::<Vec<_>>()),
            "1000 entries are too many",
        ),
        (
            "/parent",
            json!({ "id": uuid(9), "name": "../x", "checksum": "0".repeat(32) }),
            "cannot be a snapshot's name",
        ),
        ("/id", json!("me"), "UUID"),
        ("/created", json!("yesterday"), "line 1 column"),
        (
            "/cpu",
            json!({ "vendor": "x", "features": [], "more": 1 }),
            "unknown field `more`",
        ),
    ] {
        reseal(&base, |manifest| set(manifest, pointer, value.clone()));
        let error = Chain::open(&base).expect_err(pointer);
        let message = format!(
            "{error}: {:?}",
            std::error::Error::source(&error).map(ToString::to_string)
        );
        assert!(message.contains(reason), "{pointer}: {message}");
        assert!(message.contains(&path.display().to_string()), "{message}");
        fs::write(&path, &original).expect("writable");
    }
}

fn uuid(number: u128) -> String {
    format!("{number:08x}-0000-4000-8000-000000000000")
}

#[test]
fn other_files_and_newer_formats_are_told_apart() {
    let dir = sample();
    let base = dir.path().join("base");
    let path = base.join("manifest.json");
    let message = |text: &[u8]| {
        fs::write(&path, text).expect("writable");
        Chain::open(&base).expect_err("refused").to_string()
    };
    assert!(
        message(br#"{"format": "cutover-snapshot", "version": 2, "new": []}"#)
            .contains("has format version 2, but this release reads versions up to 1")
    );
    assert!(message(br#"{"format": "cutover-snapshot", "version": 0}"#).contains("has format version 0"));
    assert!(message(br#"{"format": "other", "version": 1}"#).contains("its format is called \"other\""));
    assert!(message(b"{}").contains("is not the manifest of a snapshot"));
    assert!(message(&[0xff; 100]).contains("is not the manifest of a snapshot"));
    assert!(message(&"[".repeat(100_000).into_bytes()).contains("is not the manifest of a snapshot"));
    let large = vec![b' '; 2 << 20];
    fs::write(&path, large).expect("writable");
    let error = Chain::open(&base).expect_err("too large");
    assert!(
        matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::FileTooLarge),
        "{error:?}"
    );
    assert!(matches!(Chain::open(&dir.path().join("none")), Err(Error::Absent(_))));
    fs::remove_file(&path).expect("removed");
    assert!(matches!(Chain::open(&base), Err(Error::Absent(_))));
    fs::create_dir(&path).expect("created");
    let error = Chain::open(&base).expect_err("a directory");
    assert!(
        matches!(&error, Error::Io { source, .. } if source.to_string() == "it is not a regular file"),
        "{error:?}"
    );
    assert!(Chain::open(Path::new("/")).is_err());
}

#[test]
fn parents_in_a_circle_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    for name in ["a", "b", "c"] {
        store
            .create(name, draft(1, None))
            .expect("begun")
            .commit()
            .expect("committed");
    }
    let snapshot = |name: &str| dir.path().join(name);
    let id = |name: &str| sealed(&snapshot(name)).manifest.id.to_string();
    // Nobody can know a checksum that depends on itself: the circle must be found before it is compared.
    let link = |child: &str, parent: &str, checksum: String| {
        let value = json!({ "id": id(parent), "name": parent, "checksum": checksum });
        reseal(&snapshot(child), |manifest| set(manifest, "/parent", value)).to_string()
    };
    link("a", "a", "0".repeat(32));
    assert!(matches!(Chain::open(&snapshot("a")), Err(Error::Cycle(_))));

    let b = link("b", "c", "0".repeat(32));
    let c = link("c", "b", b);
    link("b", "c", c);
    let error = Chain::open(&snapshot("b")).expect_err("endless");
    assert!(
        matches!(error, Error::Cycle(_) | Error::ParentDiffers { .. }),
        "{error}"
    );
}

#[test]
fn a_parent_is_found_under_another_name_and_missed_when_it_is_gone() {
    let dir = sample();
    let child = dir.path().join("child");
    fs::rename(dir.path().join("base"), dir.path().join("renamed")).expect("renamed");
    fs::create_dir(dir.path().join("unrelated")).expect("created");
    assert_eq!(read_content(&child).expect("found by its id"), child_content());

    fs::remove_dir_all(dir.path().join("renamed")).expect("removed");
    let error = Chain::open(&child).expect_err("gone");
    assert!(
        matches!(&error, Error::ParentMissing { name, .. } if name == "base"),
        "{error}"
    );
    assert!(error.to_string().contains("once called 'base'"), "{error}");
}

#[test]
fn another_snapshot_in_the_parents_place_is_not_taken_for_it() {
    let dir = sample();
    let child = dir.path().join("child");
    let base = dir.path().join("base");
    // The same id, another content.
    reseal(&base, |manifest| set(manifest, "/monitor", json!("someone else")));
    let error = Chain::open(&child).expect_err("not the parent");
    assert!(matches!(error, Error::ParentDiffers { .. }), "{error}");

    // Another id under the same name.
    fs::remove_dir_all(&base).expect("removed");
    write_base(dir.path(), Arc::new(FaultyFiles::sound())).expect("written");
    assert!(matches!(Chain::open(&child), Err(Error::ParentMissing { .. })));
}

#[test]
fn images_that_do_not_fit_together_are_refused() {
    let dir = sample();
    let (base, child) = (dir.path().join("base"), dir.path().join("child"));
    let relink = || {
        let checksum = sealed(&base).checksum.to_string();
        reseal(&child, |manifest| set(manifest, "/parent/checksum", json!(checksum)));
    };
    reseal(&child, |manifest| set(manifest, "/images/1/page_bytes", json!(8192)));
    let chain = Chain::open(&child).expect("a chain");
    let error = chain.image("disk-root").expect_err("pages differ");
    assert!(error.to_string().contains("has pages of 4096 bytes, but"), "{error}");

    reseal(&child, |manifest| set(manifest, "/images/1/page_bytes", json!(4096)));
    reseal(&base, |manifest| {
        manifest["images"].as_array_mut().expect("a list").pop();
    });
    relink();
    let chain = Chain::open(&child).expect("a chain");
    let error = chain.image("disk-root").expect_err("not in the parent");
    assert!(
        matches!(&error, Error::ImageMissing { path, .. } if *path == base.canonicalize().expect("there")),
        "{error}"
    );
    assert!(matches!(chain.image("none"), Err(Error::ImageMissing { .. })));
    read_all(&chain.image("memory").expect("an image")).expect("not concerned");
}

/// Replaces the index of the child's memory, with matching checksums.
fn replace_index(child: &Path, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let path = child.join("memory.pages");
    let manifest = sealed(child).manifest;
    let entry = manifest.image("memory").expect("there").clone();
    let content = fs::read(&path).expect("readable");
    let (data, index) = content.split_at(usize::try_from(entry.data_bytes).expect("small"));
    let index = change(index.to_vec());
    fs::write(&path, [data, &index].concat()).expect("writable");
    reseal(child, |manifest| {
        set(manifest, "/images/0/index/bytes", json!(index.len()));
        set(
            manifest,
            "/images/0/index/checksum",
            json!(Checksum::of(&index).to_string()),
        );
    });
}

/// Opens and reads whatever can be; only a panic or endless loop would be wrong.
fn use_all(child: &Path) {
    if let Ok(chain) = Chain::open(child) {
        verify(&chain, &mut |_| ());
        if let Ok(image) = chain.image("memory") {
            // The content is what the forged index says: there is nothing to compare it with.
            let mut reader = image.reader().expect("a reader");
            let mut next = 0;
            while let Ok(Some(found)) = reader.at(next) {
                assert!(found.count > 0);
                next += found.count;
            }
            assert!(next <= image.pages());
        }
    }
}

#[test]
fn a_forged_index_is_refused_with_the_reason() {
    let dir = sample();
    let child = dir.path().join("child");
    let path = child.join("memory.pages");
    let original = (
        fs::read(&path).expect("readable"),
        fs::read(child.join("manifest.json")).expect("readable"),
    );
    // The fields of the index, as postcard writes them: a chunk of 24 bytes and one of 22, then two runs.
    for (position, byte, reason) in [
        (0, 3, "does not hold what it should"),
        (1, 9, "does not hold what it should"),
        (2, 0x81, "a chunk of 16 bytes at 4097, past the end of all chunks"),
        (4, 17, "a chunk of 4096 bytes at 17, past the end of all chunks"),
        (5, 0x81, "a chunk of 1 pages in 4097 bytes"),
        (27, 1, "zero pages that take room"),
    ] {
        replace_index(&child, |mut index| {
            index[position] = byte;
            index
        });
        let error = Chain::open(&child).expect("a chain").image("memory").expect_err(reason);
        let message = format!(
            "{error}: {:?}",
            std::error::Error::source(&error).map(ToString::to_string)
        );
        assert!(
            message.contains(reason) && message.contains("memory.pages"),
            "{position}: {message}"
        );
        fs::write(&path, &original.0).expect("writable");
        fs::write(child.join("manifest.json"), &original.1).expect("writable");
    }
    reseal(&child, |manifest| set(manifest, "/images/0/index/version", json!(1)));
    let error = Chain::open(&child)
        .expect("a chain")
        .image("memory")
        .expect_err("older");
    assert!(
        error.to_string().contains("a chunk of 1 pages in 4096 bytes"),
        "{error}"
    );
    reseal(&child, |manifest| set(manifest, "/images/0/index/version", json!(3)));
    let error = Chain::open(&child)
        .expect("a chain")
        .image("memory")
        .expect_err("a newer index");
    assert!(
        matches!(&error, Error::Section { name, .. } if name == "index"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_forged_index_never_makes_a_reader_fail_badly(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        more in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let dir = sample();
        let child = dir.path().join("child");
        replace_index(&child, |mut index| {
            for (position, byte) in &changes {
                let position = position.index(index.len());
                index[position] = *byte;
            }
            index.extend(more);
            index
        });
        use_all(&child);
    }
}
