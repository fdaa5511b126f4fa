//! Merging in place: the snapshot is complete afterwards, or as it was, and nothing that is built on it ever breaks.

use std::path::Path;
use std::sync::Arc;

use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::image::Layout;
use cutover_snapshot::merge::merge_in_place;
use cutover_snapshot::prune::{Selection, prune};
use cutover_snapshot::store::Store;

use crate::faulty_files::{Fault, FaultyFiles};
use crate::sample::{base_content, child_content, draft, read_content, store, write_base, write_child};

fn sample() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let files = Arc::new(FaultyFiles::sound());
    let base = write_base(dir.path(), files.clone()).expect("written");
    write_child(dir.path(), &base, files).expect("written");
    dir
}

fn merge_child(dir: &Path, store: &Store) -> Result<(), Error> {
    let chain = Chain::open(&dir.join("child"))?;
    merge_in_place(&chain, store, Layout::Packed, &mut |_| ()).map(|_| ())
}

#[test]
fn a_snapshot_merged_in_place_needs_no_other() {
    let dir = sample();
    let store = store(dir.path());
    merge_child(dir.path(), &store).expect("merged");
    assert_eq!(
        Chain::open(&dir.path().join("child")).expect("sound").snapshots().len(),
        1
    );
    let gone = prune(&store, &Selection::Delete(vec!["base".to_owned()]), false).expect("not needed");
    assert_eq!((gone.snapshots.len(), gone.leftovers.len()), (1, 0));
    assert_eq!(
        read_content(&dir.path().join("child")).expect("complete"),
        child_content()
    );
}

#[test]
fn a_snapshot_that_others_are_built_on_is_not_merged_in_place() {
    let dir = sample();
    let store = store(dir.path());
    let base = Chain::open(&dir.path().join("base")).expect("a chain");
    let error = merge_in_place(&base, &store, Layout::Packed, &mut |_| ()).expect_err("child needs it");
    assert!(
        error.to_string().contains("'child' is built on it as it is now"),
        "{error}"
    );
    assert_eq!(
        read_content(&dir.path().join("child")).expect("untouched"),
        child_content()
    );
}

#[test]
fn nothing_is_merged_in_place_while_somebody_writes() {
    let dir = sample();
    let store = store(dir.path());
    let writer = store.create("other", draft(1, None)).expect("begun");
    assert!(matches!(merge_child(dir.path(), &store), Err(Error::Busy(_))));
    writer.commit().expect("committed");
    merge_child(dir.path(), &store).expect("nobody writes");
}

#[test]
fn merging_in_place_that_is_stopped_at_any_step_leaves_both_snapshots_whole() {
    for (fault, power) in [
        (Fault::Full, None),
        (Fault::Crash, None),
        (Fault::Crash, Some(false)),
        (Fault::Crash, Some(true)),
    ] {
        let mut stopped = 0;
        for step in 0.. {
            let dir = sample();
            let files = FaultyFiles::failing(step, fault);
            let faulty = Store::with_files(dir.path(), Arc::new(files.clone())).expect("a directory");
            let result = merge_child(dir.path(), &faulty);
            if files.held() {
                result.expect("there was no fault");
                break;
            }
            stopped += usize::from(result.is_err());
            if let Some(rename_lost) = power {
                files.cut_power(rename_lost);
            }
            for (name, content) in [("base", base_content()), ("child", child_content())] {
                let read = read_content(&dir.path().join(name)).expect("always whole");
                assert!(read == content, "step {step}: {name}");
            }
            prune(&store(dir.path()), &Selection::Leftovers, false).expect("pruned");
            assert_eq!(
                std::fs::read_dir(dir.path()).expect("a directory").count(),
                2,
                "step {step}"
            );
        }
        assert!(stopped > 10, "{fault:?}: only {stopped} steps can fail");
    }
}
