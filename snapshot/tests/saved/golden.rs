//! Snapshots written by every version of the format so far, checked in: today's code reads them.
//!
//! Beside them are a file of state and a chain in a single file, in all forms there have been.
//!
//! When the version of the format or of a part of it goes up, and before the release: make sure the sample shows what is
//! new, add a name to [`STORES`], run
//! `WRITE_GOLDEN_FILES=1 cargo test -p cutover-snapshot --test saved golden_files_of_every_version_are_read`, and commit
//! the new directory `tests/golden/NAME`. What is there already is never written again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cutover_snapshot::archive::write_archive;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::files::HostFiles;
use cutover_snapshot::image::Layout;
use cutover_snapshot::manifest::Manifest;
use cutover_snapshot::verify::verify;

use crate::sample::{
    SAMPLE_PAGES, base_content, child_content, draft, read_content, read_state_file, write_base, write_child,
    write_state_file,
};

/// Stores by the versions of what is in them, today's last: of the format, and of the index, if that is not 1.
const STORES: [&str; 2] = ["v1", "v1-index-2"];

fn golden_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Writes the sample as golden files of today's version, if the environment asks for it.
fn write_if_asked() {
    if std::env::var_os("WRITE_GOLDEN_FILES").is_some() {
        let store = golden_file(STORES[STORES.len() - 1]);
        fs::create_dir_all(&store).expect("created");
        let base = write_base(&store, Arc::new(HostFiles)).expect("not there yet");
        write_child(&store, &base, Arc::new(HostFiles)).expect("not there yet");
    }
}

#[test]
fn golden_files_of_every_version_are_read() {
    write_if_asked();
    for version in STORES {
        let store = golden_file(version);
        assert_eq!(
            read_content(&store.join("base")).expect("readable"),
            base_content(),
            "{version}"
        );
        assert_eq!(
            read_content(&store.join("child")).expect("readable"),
            child_content(),
            "{version}"
        );
        let chain = Chain::open(&store.join("child")).expect("a chain");
        assert_eq!(verify(&chain, &mut |_| ()).damage.len(), 0, "{version}");
    }
}

#[test]
fn the_golden_file_of_state_and_the_golden_single_file_are_read() {
    let (state, single) = (golden_file("state-file-1"), golden_file("single-file-1.tar"));
    if std::env::var_os("WRITE_GOLDEN_FILES").is_some() {
        assert!(
            !state.exists() && !single.exists(),
            "what is there is never written again"
        );
        write_state_file(&state, 7, &HostFiles).expect("written");
        let chain = Chain::open(&golden_file(STORES[0]).join("child")).expect("a chain");
        let layout = Layout::Compressed { level: 1 };
        write_archive(&chain, &HostFiles, &single, layout, &mut |_| ()).expect("written");
    }
    assert_eq!(read_state_file(&state).expect("readable"), 7);
    assert_eq!(read_content(&single).expect("readable"), child_content());
    let chain = Chain::open(&single).expect("a chain");
    assert_eq!(verify(&chain, &mut |_| ()).damage.len(), 0);
}

#[test]
fn the_manifests_of_golden_files_say_what_was_written() {
    for version in STORES {
        let chain = Chain::open(&golden_file(version).join("child")).expect("a chain");
        let manifest = |number: usize| -> &Manifest { &chain.snapshots()[number].sealed.manifest };
        let (child, base) = (manifest(0), manifest(1));
        let written = draft(SAMPLE_PAGES, None);
        for manifest in [child, base] {
            assert_eq!(manifest.created, written.created);
            assert_eq!(manifest.spec, written.spec);
            assert_eq!(manifest.memory, written.memory);
            assert_eq!(manifest.cpu, written.cpu);
            assert_eq!(manifest.state.len(), 1);
        }
        let stored = |manifest: &Manifest| -> Vec<(String, u64, u64)> {
            let images = manifest.images.iter();
            images
                .map(|image| (image.name.clone(), image.stored_pages, image.zero_pages))
                .collect()
        };
        assert_eq!(
            stored(base),
            [("memory".to_owned(), 3, 0), ("disk-root".to_owned(), 1, 0)]
        );
        assert_eq!(
            stored(child),
            [("memory".to_owned(), 1, 1), ("disk-root".to_owned(), 1, 0)]
        );
        assert_eq!(child.parent.as_ref().map(|parent| parent.id), Some(base.id));
    }
}
