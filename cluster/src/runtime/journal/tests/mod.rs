//! What every journal has to do, whatever it is made of.

mod crash;
mod etcd;

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use self::etcd::Etcd;
use super::memory::{MemoryJournal, Said};
use super::{Claim, EtcdJournal, Journal, SqliteJournal};
use crate::Error;
use crate::engine::{Decided, Record};
use crate::id::{GroupId, Host};
use crate::spec::{GroupSpec, Interval, MemberSpec, Timing};

/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// As short as etcd gives one.
const LEASE: Duration = Duration::from_secs(1);

/// A group that is new.
pub fn record() -> Record {
    let spec = GroupSpec {
        name: "g".to_owned(),
        members: vec![MemberSpec {
            name: "vm".to_owned(),
            host: Host("unix:a".to_owned()),
            restore: None,
        }],
        backups: vec![Host("unix:b".to_owned())],
        interval: Interval::Fixed(Duration::from_millis(100)),
        timing: Timing::default(),
    };
    Record::new(GroupId(uuid::Uuid::new_v4()), spec).expect("there can be such a group")
}

/// Where journals of one kind are.
trait Place: Default {
    type Journal: Journal + 'static;

    /// The journal there, for the coordinator called `name`.
    fn open(&self, name: &str, lease: Duration) -> Self::Journal;
}

#[derive(Default)]
struct Memory(Arc<Mutex<Said>>);

impl Place for Memory {
    type Journal = MemoryJournal;

    fn open(&self, name: &str, lease: Duration) -> MemoryJournal {
        MemoryJournal::open(&self.0, name, lease)
    }
}

struct Folder(TempDir);

impl Default for Folder {
    fn default() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }
}

impl Place for Folder {
    type Journal = SqliteJournal;

    fn open(&self, name: &str, lease: Duration) -> SqliteJournal {
        SqliteJournal::open(&self.0.path().join("journal.db"), name, lease).expect("a journal")
    }
}

impl Place for Etcd {
    type Journal = EtcdJournal;

    fn open(&self, name: &str, lease: Duration) -> EtcdJournal {
        EtcdJournal::open(&self.cluster(), name, lease).expect("a journal")
    }
}

/// Claims until the lease of the one before is over.
fn wait_for_turn(journal: &mut impl Journal) {
    let until = Instant::now() + PATIENCE;
    while journal.claim().expect("it can be asked") != Claim::Granted {
        assert!(Instant::now() < until, "the other's lease does not end");
        thread::sleep(Duration::from_millis(20));
    }
}

fn is_superseded<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Superseded { .. }))
}

fn what_was_written_last_is_read_by_the_next_coordinator(place: &impl Place) {
    let (first, second) = (record(), record());
    let mut journal = place.open("a", PATIENCE);
    assert_eq!(journal.claim().unwrap(), Claim::Granted);
    journal.put(&first).unwrap();
    journal.put(&second).unwrap();
    journal.put_cut(&first, 6).unwrap();
    journal.put_cut(&first, 7).unwrap();
    journal.forget(second.group).unwrap();
    journal.release().unwrap();
    let mut next = place.open("b", PATIENCE);
    assert_eq!(next.claim().unwrap(), Claim::Granted);
    let protected = Record {
        decided: Decided::Protected { cut: 7 },
        ..first.clone()
    };
    assert_eq!(next.records().unwrap(), [protected]);
    // What is said of it anew leaves nothing of what was.
    next.put(&first).unwrap();
    assert_eq!(next.records().unwrap(), std::slice::from_ref(&first));
    next.put_cut(&first, 9).unwrap();
    assert_eq!(next.records().unwrap()[0].permanent(), Some(9));
}

fn of_coordinators_that_race_one_decides_and_knows_who_waits(place: &impl Place) {
    let mut journals: Vec<_> = ["a", "b", "c"].map(|name| (name, place.open(name, PATIENCE))).into();
    let claims = thread::scope(|threads| {
        let claims = journals
            .iter_mut()
            .map(|(_, journal)| threads.spawn(|| journal.claim().unwrap()));
        let claims: Vec<_> = claims.collect();
        claims
            .into_iter()
            .map(|claim| claim.join().unwrap())
            .collect::<Vec<_>>()
    });
    let granted: Vec<_> = (0..3).filter(|number| claims[*number] == Claim::Granted).collect();
    assert_eq!(granted.len(), 1, "{claims:?}");
    let (name, mut winner) = journals.remove(granted[0]);
    for (_, loser) in &mut journals {
        assert_eq!(loser.claim().unwrap(), Claim::Held { by: name.to_owned() });
        assert!(is_superseded(loser.put(&record())));
        assert!(is_superseded(loser.records()));
    }
    let waiting: Vec<_> = journals.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(winner.renew().unwrap(), waiting);
    // Whoever gives up waiting is not known any more.
    journals[0].1.release().unwrap();
    assert_eq!(winner.renew().unwrap(), waiting[1..]);
    assert!(winner.records().unwrap().is_empty());
}

fn after_its_lease_another_decides_and_what_the_first_writes_is_refused(place: &impl Place) {
    let record = record();
    let (mut first, mut second) = (place.open("a", LEASE), place.open("b", PATIENCE));
    assert_eq!(first.claim().unwrap(), Claim::Granted);
    first.put(&record).unwrap();
    wait_for_turn(&mut second);
    assert!(is_superseded(first.renew()));
    assert!(is_superseded(first.put_cut(&record, 1)));
    assert!(is_superseded(first.put(&record)));
    assert!(is_superseded(first.forget(record.group)));
    assert_eq!(second.records().unwrap(), [record]);
    assert_eq!(first.claim().unwrap(), Claim::Held { by: "b".to_owned() });
}

fn who_was_superseded_knows_what_was_decided_meanwhile_before_it_decides_again(place: &impl Place) {
    let record = record();
    let (mut first, mut second) = (place.open("a", LEASE), place.open("b", PATIENCE));
    assert_eq!(first.claim().unwrap(), Claim::Granted);
    first.put(&record).unwrap();
    wait_for_turn(&mut second);
    assert_eq!(second.records().unwrap(), std::slice::from_ref(&record));
    second.put_cut(&record, 5).unwrap();
    second.release().unwrap();
    assert_eq!(first.claim().unwrap(), Claim::Granted);
    assert_eq!(first.records().unwrap()[0].permanent(), Some(5));
    first.put_cut(&record, 6).unwrap();
    assert_eq!(first.records().unwrap()[0].permanent(), Some(6));
}

fn a_right_that_is_renewed_stays(place: &impl Place) {
    let (mut first, mut second) = (place.open("a", LEASE), place.open("b", PATIENCE));
    assert_eq!(first.claim().unwrap(), Claim::Granted);
    let until = Instant::now() + 2 * LEASE;
    while Instant::now() < until {
        let renewed = Instant::now();
        first.renew().unwrap();
        let claim = second.claim().unwrap();
        // Where this program was kept waiting for longer than a lease, it is rightly over.
        if renewed.elapsed() >= LEASE {
            return;
        }
        assert_eq!(claim, Claim::Held { by: "a".to_owned() });
    }
}

macro_rules! conformance {
    ($name:ident, $place:ty: $($test:ident),* $(,)?) => {
        mod $name {
            $(#[test]
            fn $test() {
                super::$test(&<$place>::default());
            })*
        }
    };
    ($($name:ident: $place:ty),*) => {
        $(conformance! {
            $name, $place:
            what_was_written_last_is_read_by_the_next_coordinator,
            of_coordinators_that_race_one_decides_and_knows_who_waits,
            after_its_lease_another_decides_and_what_the_first_writes_is_refused,
            who_was_superseded_knows_what_was_decided_meanwhile_before_it_decides_again,
            a_right_that_is_renewed_stays,
        })*
    };
}

conformance!(in_memory: super::Memory, in_sqlite: super::Folder, in_etcd: super::Etcd);
