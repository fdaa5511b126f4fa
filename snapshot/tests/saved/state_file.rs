//! Files of state: whole or not there, and damage anywhere is noticed.

use std::fs;
use std::path::Path;

use cutover_snapshot::Error;
use cutover_snapshot::files::HostFiles;
use cutover_snapshot::state_file;
use proptest::prelude::*;

use crate::faulty_files::{Fault, FaultyFiles};
use crate::sample::{read_state_file, write_state_file};

/// Writes the file `state` of `dir`; returns its bytes.
fn written(dir: &Path) -> Vec<u8> {
    let path = dir.join("state");
    write_state_file(&path, 1, &FaultyFiles::sound()).expect("written");
    fs::read(path).expect("readable")
}

/// What reading a file with these bytes comes to.
fn reading(dir: &Path, bytes: &[u8]) -> Result<u64, Error> {
    let path = dir.join("state");
    fs::write(&path, bytes).expect("writable");
    read_state_file(&path)
}

#[test]
fn state_and_manifest_read_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("state");
    write_state_file(&path, 7, &HostFiles).expect("written");
    assert_eq!(read_state_file(&path).expect("whole"), 7);
    let (manifest, state) = state_file::read(&path).expect("whole");
    assert_eq!((manifest.images.len(), manifest.state.len()), (0, 2));
    assert_eq!(state.names().collect::<Vec<_>>(), ["clock", "clock/new"]);
}

#[test]
fn a_file_that_is_there_is_replaced_whole_or_not_at_all() {
    let mut steps = 0;
    for (fault, power) in [(Fault::Crash, false), (Fault::Crash, true), (Fault::Full, false)] {
        for step in 0.. {
            let dir = tempfile::tempdir().expect("a directory");
            let path = dir.path().join("state");
            write_state_file(&path, 1, &FaultyFiles::sound()).expect("written");
            let files = FaultyFiles::failing(step, fault);
            let result = write_state_file(&path, 2, &files);
            if files.held() {
                result.expect("there was no fault");
                break;
            }
            if power && result.is_err() {
                files.cut_power(false);
            }
            let found = read_state_file(&path).expect("always whole");
            // The new file may have its name although the writer died before it could say so.
            assert!(
                found == 2 || result.is_err(),
                "step {step}: written, but {found} is there"
            );
            if fault == Fault::Full {
                assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "step {step}");
            }
            steps += 1;
        }
    }
    assert!(
        steps >= 3 * 5,
        "only {steps} steps: create, write, sync, rename, sync of the directory"
    );
}

#[test]
fn a_file_cut_short_anywhere_is_noticed_and_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let whole = written(dir.path());
    for length in 0..whole.len() {
        let error = reading(dir.path(), &whole[..length]).expect_err("cut short");
        assert!(error.to_string().contains("/state: "), "{length}: {error}");
    }
    let error = reading(dir.path(), &[&whole[..], b"x"].concat()).expect_err("longer");
    let expected = format!("damaged at byte {}: there is something after", whole.len());
    assert!(error.to_string().contains(&expected), "{error}");
}

#[test]
fn a_changed_byte_is_noticed_and_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let whole = written(dir.path());
    let text = String::from_utf8_lossy(&whole).into_owned();
    for position in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[position] ^= 1 << (position % 8);
        match reading(dir.path(), &bytes) {
            Err(error) => assert!(error.to_string().contains("/state: "), "{position}: {error}"),
            // One blank for another between the parts of JSON makes no difference.
            Ok(_) => assert!(
                bytes[position].is_ascii_whitespace(),
                "{position} of {text} is not noticed"
            ),
        }
    }
    let mut bytes = whole.clone();
    let last = whole.len() - 1;
    bytes[last] ^= 1;
    let error = reading(dir.path(), &bytes).expect_err("changed");
    // The last section has two bytes: a number below 128 and a truth.
    let expected = format!(
        "damaged at byte {}: state 'clock/new' does not have its checksum",
        last - 1
    );
    assert!(error.to_string().contains(&expected), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), head in 0..40_usize) {
        let dir = tempfile::tempdir().expect("a directory");
        let mut whole = written(dir.path());
        whole.truncate(head);
        prop_assert!(reading(dir.path(), &[whole, bytes].concat()).is_err());
    }
}
