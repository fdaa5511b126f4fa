//! A coordinator that is killed while it writes: what was acknowledged is there, and nothing is half there.
//!
//! The one that writes is this test program, started once more and told by its environment where to write.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use super::etcd::Etcd;
use super::{Folder, LEASE, Place, record, wait_for_turn};
use crate::runtime::journal::{Claim, Journal, Location, open};

/// Says to the one that is killed which journal is meant.
const JOURNAL: &str = "CUTOVER_TEST_JOURNAL";
/// How many acknowledged writes it has made when it is killed.
const WRITES: usize = 60;

/// Writes for ever, a number after each write.
fn write_for_ever(location: &str) -> ! {
    let location: Location = location.parse().expect("a journal");
    let mut journal = open(&location, "killed", LEASE).expect("it can be opened");
    assert_eq!(journal.claim().expect("it can be asked"), Claim::Granted);
    let mut record = record();
    let mut output = std::io::stdout();
    for cut in 1.. {
        // Both kinds of writes, each with the number of the round.
        record.generation.0 = cut;
        journal.renew().expect("its right to write is not over");
        journal.put(&record).expect("it can be written");
        journal.put_cut(&record, cut).expect("it can be written");
        writeln!(output, "wrote {cut}").expect("somebody reads");
    }
    unreachable!("numbers do not end");
}

fn check(test: &str, place: &impl Place, location: &str) {
    if let Ok(location) = env::var(JOURNAL) {
        write_for_ever(&location);
    }
    let this = env::current_exe().expect("it runs");
    let mut writer = Command::new(this)
        .args(["--exact", test, "--nocapture"])
        .env(JOURNAL, location)
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs once more");
    let lines = BufReader::new(writer.stdout.take().expect("it was asked for")).lines();
    let wrote = |line: String| line.strip_prefix("wrote ")?.parse::<u64>().ok();
    let mut wrote = lines.map_while(Result::ok).filter_map(wrote);
    let mut acknowledged = wrote.by_ref().take(WRITES).last().expect("it writes");
    writer.kill().expect("it is ours");
    writer.wait().expect("it was killed");
    // What it had said by then.
    acknowledged = wrote.last().unwrap_or(acknowledged);
    let mut journal = place.open("next", LEASE);
    wait_for_turn(&mut journal);
    let [found] = journal.records().unwrap().try_into().expect("one group");
    let (round, cut) = (found.generation.0, found.permanent().unwrap_or(found.generation.0 - 1));
    assert!(
        (acknowledged..=acknowledged + 1).contains(&cut) && (cut..=cut + 1).contains(&round),
        "{acknowledged} was acknowledged, found {found:?}"
    );
    journal.put_cut(&found, cut + 1).unwrap();
}

#[test]
fn what_sqlite_has_acknowledged_is_there_after_a_crash() {
    let folder = Folder::default();
    let path = folder.0.path().join("journal.db");
    let test = "runtime::journal::tests::crash::what_sqlite_has_acknowledged_is_there_after_a_crash";
    check(test, &folder, &path_text(&path));
}

#[test]
fn what_etcd_has_acknowledged_is_there_after_a_crash() {
    // The one that is killed has no etcd of its own.
    if let Ok(location) = env::var(JOURNAL) {
        write_for_ever(&location);
    }
    let etcd = Etcd::default();
    let test = "runtime::journal::tests::crash::what_etcd_has_acknowledged_is_there_after_a_crash";
    check(test, &etcd, &etcd.cluster().to_string());
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}
