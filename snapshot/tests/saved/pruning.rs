//! Pruning deletes what no chain needs, and nothing else.

use std::fs;
use std::path::Path;

use cutover_snapshot::Error;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::prune::{Selection, prune};
use cutover_snapshot::store::Store;
use proptest::prelude::*;

use crate::sample::{draft, store};

/// Snapshots `0`, `1`, …, each built on the one `parents` says, if that is older.
fn write_tree(dir: &Path, parents: &[Option<usize>]) -> Store {
    let store = store(dir);
    let mut snapshots = Vec::new();
    for (number, parent) in parents.iter().enumerate() {
        let parent = parent.and_then(|parent| snapshots.get(parent));
        let writer = store.create(&number.to_string(), draft(1, parent)).expect("begun");
        snapshots.push(writer.commit().expect("committed"));
    }
    store
}

fn left(store: &Store) -> Vec<String> {
    let mut names: Vec<_> = store
        .list()
        .expect("sound")
        .into_iter()
        .map(|snapshot| snapshot.name)
        .collect();
    names.sort();
    names
}

fn named(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn keep(names: &[&str], last: usize) -> Selection {
    Selection::Keep {
        names: named(names),
        last,
    }
}

#[test]
fn the_newest_are_kept_with_what_they_are_built_on() {
    let parents = [None, Some(0), Some(1), None, Some(3)];
    for (selection, stay, needed) in [
        (keep(&[], 1), &["3", "4"][..], &[("3", "4")][..]),
        (keep(&[], 2), &["3", "4"], &[]),
        (
            keep(&["2"], 1),
            &["0", "1", "2", "3", "4"],
            &[("1", "2"), ("0", "2"), ("3", "4")],
        ),
        (keep(&["0"], 2), &["0", "3", "4"], &[]),
        (keep(&[], 9), &["0", "1", "2", "3", "4"], &[]),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let store = write_tree(dir.path(), &parents);
        let done = prune(&store, &selection, false).expect("pruned");
        let told: Vec<_> = done
            .needed
            .iter()
            .map(|needed| (&needed.name[..], &needed.by[..]))
            .collect();
        assert_eq!(
            (&left(&store)[..], &told[..]),
            (&named(stay)[..], needed),
            "{selection:?}"
        );
    }
}

#[test]
fn a_snapshot_that_another_is_built_on_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = write_tree(dir.path(), &[None, Some(0), Some(1), Some(1)]);
    let delete = |names: &[&str]| prune(&store, &Selection::Delete(named(names)), false);
    for names in [&["0"][..], &["1"], &["0", "1"], &["1", "2"]] {
        let error = delete(names).expect_err("needed");
        assert!(matches!(&error, Error::Needed { .. }), "{error}");
    }
    assert!(matches!(delete(&["4"]), Err(Error::Absent(_))));
    assert_eq!(left(&store), ["0", "1", "2", "3"]);
    assert_eq!(delete(&["2"]).expect("a leaf").snapshots, ["2"]);
    assert_eq!(
        delete(&["0", "3", "1"]).expect("all that is left").snapshots,
        ["3", "1", "0"]
    );
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
}

#[test]
fn a_rehearsal_tells_and_does_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = write_tree(dir.path(), &[None, Some(0), None]);
    fs::create_dir(dir.path().join(".partial-x")).expect("created");
    let told = prune(&store, &keep(&["2"], 0), true).expect("a rehearsal");
    assert_eq!(
        (told.snapshots, told.leftovers),
        (named(&["1", "0"]), named(&[".partial-x"]))
    );
    assert_eq!(left(&store), ["0", "1", "2"]);
    assert!(dir.path().join(".partial-x").exists());
}

#[test]
fn leftovers_go_unless_a_writer_is_at_work() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = write_tree(dir.path(), &[None]);
    fs::create_dir(dir.path().join(".deleted-x")).expect("created");
    fs::write(dir.path().join(".partial-y"), b"what was to be a single file").expect("created");
    let writer = store.create("new", draft(1, None)).expect("begun");
    let second = store.create("other", draft(1, None)).expect("two can write");
    assert!(matches!(
        prune(&store, &Selection::Leftovers, false),
        Err(Error::Busy(_))
    ));
    drop(second);
    writer.commit().expect("committed");
    let mut done = prune(&store, &Selection::Leftovers, false).expect("nobody writes");
    done.leftovers.sort();
    assert_eq!(
        (done.snapshots, done.leftovers),
        (vec![], named(&[".deleted-x", ".partial-y"]))
    );
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 2);
    assert_eq!(left(&store), ["0", "new"]);
}

#[test]
fn nothing_is_deleted_while_it_is_unknown_what_some_snapshot_needs() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = write_tree(dir.path(), &[None, Some(0), None]);
    fs::write(dir.path().join("1/manifest.json"), b"{}").expect("writable");
    let error = prune(&store, &Selection::Delete(named(&["0"])), false).expect_err("unknown");
    assert!(error.to_string().contains("1/manifest.json"), "{error}");
    assert!(dir.path().join("0").exists());
}

#[test]
fn a_copy_with_the_same_id_is_deleted_alone_when_nothing_is_built_on_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = write_tree(dir.path(), &[None]);
    let (from, to) = (dir.path().join("0"), dir.path().join("copy"));
    fs::create_dir(&to).expect("created");
    for file in ["manifest.json", "state.bin"] {
        fs::copy(from.join(file), to.join(file)).expect("copied");
    }
    assert_eq!(
        prune(&store, &Selection::Delete(named(&["copy"])), false)
            .expect("deleted")
            .snapshots,
        ["copy"]
    );
    assert_eq!(left(&store), ["0"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_kept_keeps_its_whole_chain_and_nothing_else_stays(
        parents in prop::collection::vec(prop::option::of(0..12_usize), 1..12),
        keep in prop::collection::btree_set(0..12_usize, 1..4),
    ) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = write_tree(dir.path(), &parents);
        let keep: Vec<String> = keep.into_iter().filter(|number| *number < parents.len()).map(|number| number.to_string()).collect();
        let mut needed: Vec<String> = keep
            .iter()
            .flat_map(|name| Chain::open(&dir.path().join(name)).expect("a chain").snapshots().to_vec())
            .map(|snapshot| snapshot.name)
            .collect();
        needed.sort();
        needed.dedup();
        prune(&store, &Selection::Keep { names: keep.clone(), last: 0 }, false).expect("pruned");
        prop_assert_eq!(left(&store), needed);
        for name in keep {
            Chain::open(&dir.path().join(name)).expect("still whole");
        }
    }
}
