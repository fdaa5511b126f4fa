//! A writer that is stopped at any step leaves what was there, and nothing that looks like a snapshot but is none.

use std::path::Path;
use std::sync::Arc;

use cutover_snapshot::Error;
use cutover_snapshot::prune::{Selection, prune};
use cutover_snapshot::store::Store;

use crate::faulty_files::{Fault, FaultyFiles};
use crate::sample::{base_content, child_content, read_content, store, write_base, write_child};

fn sound() -> Arc<FaultyFiles> {
    Arc::new(FaultyFiles::sound())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

/// The base is whole; the child is whole or not there, and if not, can be written.
fn check_after_crash(dir: &Path, step: usize) {
    assert_eq!(
        read_content(&dir.join("base")).expect("untouched"),
        base_content(),
        "step {step}"
    );
    match read_content(&dir.join("child")) {
        Ok(content) => assert_eq!(content, child_content(), "step {step}"),
        Err(Error::Absent(_)) => {}
        Err(error) => panic!("step {step}: {error}"),
    }
    let store = store(dir);
    prune(&store, &Selection::Leftovers, false).expect("pruned");
    assert!(
        names(dir).iter().all(|name| !name.starts_with('.')),
        "step {step}: {:?}",
        names(dir)
    );
    if read_content(&dir.join("child")).is_err() {
        let base = store.snapshot("base").expect("untouched");
        write_child(dir, &base, sound()).expect("nothing is in the way");
        assert_eq!(read_content(&dir.join("child")).expect("written"), child_content());
    }
}

/// Writes the child with a crash at each step in turn; returns how many steps there are.
fn crash_at_every_step(after: impl Fn(&FaultyFiles)) -> usize {
    for step in 0.. {
        let dir = tempfile::tempdir().expect("a directory");
        let base = write_base(dir.path(), sound()).expect("written");
        let files = FaultyFiles::failing(step, Fault::Crash);
        let written = write_child(dir.path(), &base, Arc::new(files.clone()));
        if files.held() {
            written.expect("there was no fault");
            return step;
        }
        written.expect_err("the process died");
        after(&files);
        check_after_crash(dir.path(), step);
    }
    unreachable!("some step is the last")
}

#[test]
fn a_writer_killed_at_any_step_leaves_the_parent_and_no_half_snapshot() {
    let steps = crash_at_every_step(|_| ());
    assert!(
        steps > 15,
        "only {steps} steps: directory, files, their content, syncs, rename"
    );
}

#[test]
fn power_lost_at_any_step_leaves_the_parent_and_no_half_snapshot() {
    crash_at_every_step(|files| files.cut_power(false));
    crash_at_every_step(|files| files.cut_power(true));
}

#[test]
fn power_lost_after_the_snapshot_is_reported_written_does_not_lose_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let base = write_base(dir.path(), sound()).expect("written");
    let files = FaultyFiles::sound();
    write_child(dir.path(), &base, Arc::new(files.clone())).expect("written");
    files.cut_power(true);
    assert_eq!(
        read_content(&dir.path().join("child")).expect("permanent"),
        child_content()
    );
}

#[test]
fn a_full_disk_at_any_step_is_told_and_leaves_nothing_behind() {
    let mut full = 0;
    for step in 0.. {
        let dir = tempfile::tempdir().expect("a directory");
        let base = write_base(dir.path(), sound()).expect("written");
        let files = FaultyFiles::failing(step, Fault::Full);
        match write_child(dir.path(), &base, Arc::new(files.clone())) {
            Ok(_) if files.held() => break,
            // A step that stores nothing.
            Ok(_) => {}
            Err(error) => {
                full += 1;
                assert!(matches!(error, Error::Full(_)), "{error:?}");
                assert!(error.to_string().contains("the disk is full"), "{error}");
                assert_eq!(names(dir.path()), ["base"], "step {step}");
            }
        }
        assert_eq!(
            read_content(&dir.path().join("base")).expect("untouched"),
            base_content()
        );
    }
    assert!(full > 10, "only {full} steps that store something");
}

#[test]
fn deleting_that_is_killed_at_any_step_leaves_whole_chains() {
    for step in 0.. {
        let dir = tempfile::tempdir().expect("a directory");
        let base = write_base(dir.path(), sound()).expect("written");
        write_child(dir.path(), &base, sound()).expect("written");
        let files = FaultyFiles::failing(step, Fault::Crash);
        let faulty = Store::with_files(dir.path(), Arc::new(files.clone())).expect("a directory");
        let both = Selection::Delete(vec!["base".to_owned(), "child".to_owned()]);
        let result = prune(&faulty, &both, false);
        if files.held() {
            result.expect("there was no fault");
            assert!(names(dir.path()).is_empty());
            return;
        }
        let left = store(dir.path()).list().expect("a sound store");
        let left: Vec<_> = left.iter().map(|snapshot| snapshot.name.as_str()).collect();
        assert!(
            left != ["child"],
            "step {step}: the base went before what is built on it"
        );
        for name in left {
            read_content(&dir.path().join(name)).expect("whole");
        }
    }
}

#[test]
fn a_name_that_is_taken_meanwhile_is_not_overwritten() {
    let dir = tempfile::tempdir().expect("a directory");
    let base = write_base(dir.path(), sound()).expect("written");
    let second = store(dir.path())
        .create("child", crate::sample::draft(8, None))
        .expect("begun");
    write_child(dir.path(), &base, sound()).expect("written");
    assert!(matches!(second.commit(), Err(Error::Exists(_))));
    assert_eq!(
        read_content(&dir.path().join("child")).expect("the first"),
        child_content()
    );
    assert!(matches!(write_child(dir.path(), &base, sound()), Err(Error::Exists(_))));
    assert_eq!(names(dir.path()), ["base", "child"]);
}
