//! A journal in an SQLite database, for coordinators of one host.
//!
//! ```text
//!  PATH            lease    whose term it is, and until when     groups   a record each, and its last permanent cut
//!                  waiting  who else has opened it
//!  PATH-holder-N   locked by the coordinator of term N for as long as it lives
//! ```
//! A transaction is durable when it has returned: write-ahead logging, with the log flushed at each commit (one flush of
//! the disk). A coordinator that has died is found by its lock at once; one that is stuck, by its lease. The lease counts
//! the time since the host booted, and is that of one boot.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};
use rustix::fs::{FlockOperation, flock};

use super::{Claim, Journal, WAITING_MAX, uptime, with_cut};
use crate::Error;
use crate::engine::Record;
use crate::id::{Epoch, GroupId};
use crate::lease::nanos;

/// Says of a database that it is a journal: "CUTJ".
const APPLICATION: i32 = 0x4355_544a;
/// How long another coordinator may keep the database locked: its transactions are short.
const BUSY_MAX: Duration = Duration::from_secs(10);
/// Which boot of the host this is (Linux `Documentation/admin-guide/sysctl/kernel.rst`, random).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

const SCHEMA: &str = "
    CREATE TABLE lease (one INTEGER PRIMARY KEY CHECK (one = 1), term INTEGER NOT NULL, holder TEXT NOT NULL,
                        boot TEXT NOT NULL, until INTEGER NOT NULL) STRICT;
    CREATE TABLE waiting (coordinator TEXT PRIMARY KEY, boot TEXT NOT NULL, until INTEGER NOT NULL) STRICT;
    CREATE TABLE groups (id TEXT PRIMARY KEY, version INTEGER NOT NULL, record TEXT NOT NULL, cut INTEGER) STRICT;";

/// See the module.
#[derive(Debug)]
pub struct SqliteJournal {
    path: PathBuf,
    name: String,
    lease: Duration,
    boot: String,
    database: Connection,
    /// What this coordinator decides in, as long as it does.
    term: Option<Term>,
    /// Which version of a record it has read or written last.
    versions: BTreeMap<GroupId, i64>,
    /// When those that decide were last told that it waits, by [`uptime`].
    waits_since: Option<u64>,
}

#[derive(Debug)]
struct Term {
    number: i64,
    /// Locked until dropped.
    _holder: File,
}

/// Whose turn the database says it is.
struct Lease {
    term: i64,
    holder: String,
    boot: String,
    until: i64,
}

/// Why something was not done.
enum Refusal {
    Failed(rusqlite::Error),
    File(io::Error),
    /// What the database says cannot be.
    Damaged(String),
    /// Another has the right to decide.
    By(String),
}

impl From<rusqlite::Error> for Refusal {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failed(error)
    }
}

impl SqliteJournal {
    /// The journal in the file `path`, which is made if there is none, for the coordinator called `name`.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn open(path: &Path, name: &str, lease: Duration) -> Result<Self, Error> {
        let unusable = |reason: String| Error::Journal {
            journal: path.display().to_string(),
            action: "open it",
            reason,
        };
        if path.is_dir() {
            return Err(unusable(
                "it is a directory, and a journal is a file: name one in it, such as journal.db, and create groups \
                 again that only this directory knows of"
                    .to_owned(),
            ));
        }
        let boot = prepare(path).map_err(|error| unusable(error.to_string()))?;
        let database = connect(path).map_err(|error| unusable(error.to_string()))?;
        let journal = Self {
            path: path.to_owned(),
            name: name.to_owned(),
            lease,
            boot,
            database,
            term: None,
            versions: BTreeMap::new(),
            waits_since: None,
        };
        journal.make_tables().map_err(unusable)?;
        Ok(journal)
    }

    fn make_tables(&self) -> Result<(), String> {
        let text = |error: rusqlite::Error| error.to_string();
        let change = Transaction::new_unchecked(&self.database, TransactionBehavior::Immediate).map_err(text)?;
        let application: i32 = change
            .pragma_query_value(None, "application_id", |row| row.get(0))
            .map_err(text)?;
        let tables: i64 = change
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
            .map_err(text)?;
        match (application, tables) {
            (APPLICATION, _) => Ok(()),
            (0, 0) => {
                change
                    .pragma_update(None, "application_id", APPLICATION)
                    .map_err(text)?;
                change.execute_batch(SCHEMA).map_err(text)?;
                change.commit().map_err(text)
            }
            _ => Err("it is a database of something else".to_owned()),
        }
    }

    /// The file that the coordinator of a term has locked.
    fn holder_path(&self, term: i64) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("-holder-{term}"));
        path.into()
    }

    /// Whether the coordinator of a term is known to be dead: its file is there, and not locked.
    fn is_dead(&self, term: i64) -> bool {
        File::open(self.holder_path(term)).is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_ok())
    }

    fn is_held(&self, lease: &Lease) -> bool {
        let has_time = lease.boot == self.boot && now() < lease.until;
        has_time && !self.is_dead(lease.term)
    }

    fn until(&self) -> i64 {
        now().saturating_add(signed(nanos(self.lease)))
    }

    fn try_claim(&mut self) -> Result<Claim, Refusal> {
        // Whoever only waits takes no lock, and seldom writes.
        if let Some(lease) = lease(&self.database)?
            && self.is_held(&lease)
            && self.has_said_that_it_waits()
        {
            return Ok(Claim::Held { by: lease.holder });
        }
        let change = Transaction::new_unchecked(&self.database, TransactionBehavior::Immediate)?;
        let before = lease(&change)?;
        if let Some(lease) = before.as_ref().filter(|lease| self.is_held(lease)) {
            change.execute(
                "INSERT OR REPLACE INTO waiting VALUES (?1, ?2, ?3)",
                params![self.name, self.boot, self.until()],
            )?;
            change.commit()?;
            self.waits_since = Some(uptime());
            return Ok(Claim::Held {
                by: lease.holder.clone(),
            });
        }
        let number = before.as_ref().map_or(0, |lease| lease.term) + 1;
        let holder = self.hold(number).map_err(Refusal::File)?;
        change.execute(
            "INSERT OR REPLACE INTO lease VALUES (1, ?1, ?2, ?3, ?4)",
            params![number, self.name, self.boot, self.until()],
        )?;
        change.execute("DELETE FROM waiting WHERE coordinator = ?1", [&self.name])?;
        change.commit()?;
        if let Some(lease) = before {
            // One that is left behind takes a name in a directory.
            let _ = fs::remove_file(self.holder_path(lease.term));
        }
        self.waits_since = None;
        self.term = Some(Term {
            number,
            _holder: holder,
        });
        Ok(Claim::Granted)
    }

    /// Locks the file of a term. Nobody else has it: terms are given one after the other, in transactions.
    fn hold(&self, term: i64) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(self.holder_path(term))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(file)
    }

    fn has_said_that_it_waits(&self) -> bool {
        let is_recent = |since| uptime().saturating_sub(since) < nanos(self.lease) / 3;
        self.waits_since.is_some_and(is_recent)
    }

    /// Has `work` done in a transaction of the term.
    fn decide<T>(&mut self, work: impl FnOnce(&Transaction<'_>) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let nobody = || Refusal::By("nobody".to_owned());
        let term = self.term.as_ref().ok_or_else(nobody)?.number;
        let change = Transaction::new_unchecked(&self.database, TransactionBehavior::Immediate)?;
        match lease(&change)? {
            Some(lease) if lease.term == term => {}
            lease => return Err(lease.map_or_else(nobody, |lease| Refusal::By(lease.holder))),
        }
        let done = work(&change)?;
        change.commit()?;
        Ok(done)
    }

    /// Changes what is said of a group, if it is what was read or written last: the statement has the group as `?1`, that
    /// version as `?2`, the next as `?3`.
    fn change(&mut self, group: GroupId, statement: &str, value: impl rusqlite::ToSql) -> Result<(), Refusal> {
        let known = self.versions.get(&group).copied().unwrap_or(0);
        self.decide(|change| {
            let changed = change.execute(statement, params![group.to_string(), known, known + 1, value])?;
            if changed == 1 {
                Ok(())
            } else {
                Err(Refusal::By("somebody who wrote without the right to".to_owned()))
            }
        })?;
        self.versions.insert(group, known + 1);
        Ok(())
    }

    fn try_records(&mut self) -> Result<Vec<Record>, Refusal> {
        let rows = self.decide(|change| {
            let mut select = change.prepare("SELECT id, version, record, cut FROM groups ORDER BY id")?;
            let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
            Ok(rows.collect::<Result<Vec<(String, i64, String, Option<i64>)>, _>>()?)
        })?;
        let mut records = Vec::new();
        self.versions.clear();
        for (id, version, record, cut) in rows {
            let damaged = |error: &dyn std::fmt::Display| Refusal::Damaged(format!("group {id}: {error}"));
            let record: Record = serde_json::from_str(&record).map_err(|error| damaged(&error))?;
            if record.group.to_string() != id {
                return Err(damaged(&"its record is that of another"));
            }
            let cut = cut.map(Epoch::try_from).transpose().map_err(|error| damaged(&error))?;
            self.versions.insert(record.group, version);
            records.push(with_cut(record, cut));
        }
        Ok(records)
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(Refusal) -> Error + use<> {
        let journal = self.path.display().to_string();
        move |refusal| {
            let reason = match refusal {
                Refusal::By(by) => return Error::Superseded { journal, by },
                Refusal::Failed(error) => error.to_string(),
                Refusal::File(error) => error.to_string(),
                Refusal::Damaged(reason) => reason,
            };
            Error::Journal {
                journal,
                action,
                reason,
            }
        }
    }
}

impl Journal for SqliteJournal {
    fn claim(&mut self) -> Result<Claim, Error> {
        self.term = None;
        self.try_claim().map_err(self.failed("ask for the right to decide"))
    }

    fn renew(&mut self) -> Result<Vec<String>, Error> {
        let (until, boot) = (self.until(), self.boot.clone());
        let renewed = self.decide(|change| {
            change.execute("UPDATE lease SET until = ?1", [until])?;
            change.execute(
                "DELETE FROM waiting WHERE boot != ?1 OR until < ?2",
                params![boot, now()],
            )?;
            let mut select = change.prepare("SELECT coordinator FROM waiting ORDER BY coordinator LIMIT ?1")?;
            let names = select.query_map([signed(WAITING_MAX as u64)], |row| row.get(0))?;
            Ok(names.collect::<Result<_, _>>()?)
        });
        renewed.map_err(self.failed("keep the right to decide"))
    }

    fn release(&mut self) -> Result<(), Error> {
        let name = self.name.clone();
        let released = if self.term.is_some() {
            self.decide(|change| Ok(change.execute("UPDATE lease SET until = 0", [])?))
        } else {
            let deleted = self
                .database
                .execute("DELETE FROM waiting WHERE coordinator = ?1", [name]);
            deleted.map_err(Refusal::Failed)
        };
        self.term = None;
        released.map(drop).map_err(self.failed("give up the right to decide"))
    }

    fn lease(&self) -> Duration {
        self.lease
    }

    fn records(&mut self) -> Result<Vec<Record>, Error> {
        self.try_records().map_err(self.failed("read it"))
    }

    fn put(&mut self, record: &Record) -> Result<(), Error> {
        let damaged = |error: serde_json::Error| Refusal::Damaged(error.to_string());
        let written = serde_json::to_string(record).map_err(damaged).and_then(|text| {
            let statement = if self.versions.contains_key(&record.group) {
                "UPDATE groups SET version = ?3, record = ?4, cut = NULL WHERE id = ?1 AND version = ?2"
            } else {
                "INSERT OR IGNORE INTO groups SELECT ?1, ?3, ?4, NULL WHERE ?2 = 0"
            };
            self.change(record.group, statement, text)
        });
        written.map_err(self.failed("write a decision"))
    }

    fn put_cut(&mut self, record: &Record, cut: Epoch) -> Result<(), Error> {
        let statement = "UPDATE groups SET version = ?3, cut = ?4 WHERE id = ?1 AND version = ?2";
        let written = self.change(record.group, statement, signed(cut));
        written.map_err(self.failed("write that a cut is permanent"))
    }

    fn forget(&mut self, group: GroupId) -> Result<(), Error> {
        let forgotten =
            self.decide(|change| Ok(change.execute("DELETE FROM groups WHERE id = ?1", [group.to_string()])?));
        self.versions.remove(&group);
        forgotten.map(drop).map_err(self.failed("remove a group"))
    }
}

/// Makes the file and its directory; returns which boot this is.
fn prepare(path: &Path) -> io::Result<String> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut options = OpenOptions::new();
    // Whoever can read it knows which VMs are where; whoever can write it decides about them.
    options
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)?;
    Ok(fs::read_to_string(BOOT_ID)?.trim_end().to_owned())
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let database = Connection::open_with_flags(path, flags)?;
    database.busy_timeout(BUSY_MAX)?;
    database.pragma_update(None, "journal_mode", "WAL")?;
    database.pragma_update(None, "synchronous", "FULL")?;
    Ok(database)
}

fn lease(database: &Connection) -> rusqlite::Result<Option<Lease>> {
    let select = "SELECT term, holder, boot, until FROM lease";
    let lease = database.query_row(select, [], |row| {
        Ok(Lease {
            term: row.get(0)?,
            holder: row.get(1)?,
            boot: row.get(2)?,
            until: row.get(3)?,
        })
    });
    lease.optional()
}

fn now() -> i64 {
    signed(uptime())
}

/// SQLite's integers are signed; neither times nor epochs come near the end of them.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    fn journal(folder: &tempfile::TempDir) -> SqliteJournal {
        let mut journal = SqliteJournal::open(&folder.path().join("journal.db"), "a", super::super::LEASE).unwrap();
        assert_eq!(journal.claim().unwrap(), Claim::Granted);
        journal
    }

    #[test]
    fn a_coordinator_that_has_died_is_followed_at_once_and_what_it_left_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let never = Duration::from_secs(1 << 32);
        let mut first = SqliteJournal::open(&path, "a", never).unwrap();
        let mut second = SqliteJournal::open(&path, "b", never).unwrap();
        let record = record();
        first.claim().unwrap();
        first.put(&record).unwrap();
        assert_eq!(second.claim().unwrap(), Claim::Held { by: "a".to_owned() });
        drop(first);
        assert_eq!(second.claim().unwrap(), Claim::Granted);
        assert_eq!(second.records().unwrap(), [record]);
    }

    #[test]
    fn a_lease_of_a_former_boot_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = journal(&folder);
        first.database.execute("UPDATE lease SET boot = 'before'", []).unwrap();
        let mut second = SqliteJournal::open(&first.path, "b", super::super::LEASE).unwrap();
        assert_eq!(second.claim().unwrap(), Claim::Granted);
        let error = first.renew().expect_err("another has it").to_string();
        assert!(error.contains("b has taken over"), "{error}");
    }

    #[test]
    fn a_disk_that_is_full_or_read_only_is_named_and_what_was_written_before_stays() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = journal(&folder);
        let first = record();
        journal.put(&first).unwrap();
        let pages: i64 = journal
            .database
            .pragma_query_value(None, "page_count", |row| row.get(0))
            .unwrap();
        let limit = format!("PRAGMA max_page_count = {pages}");
        journal.database.query_row(&limit, [], |_| Ok(())).unwrap();
        let mut large = record();
        large.spec.name = "x".repeat(1 << 20);
        let error = journal.put(&large).expect_err("there is no room").to_string();
        assert!(
            error.contains("journal.db: cannot write a decision: database or disk is full"),
            "{error}"
        );
        journal.database.pragma_update(None, "query_only", true).unwrap();
        let error = journal.put_cut(&first, 1).expect_err("it is read-only").to_string();
        assert!(error.contains("readonly database"), "{error}");
        journal.database.pragma_update(None, "query_only", false).unwrap();
        assert_eq!(journal.records().unwrap(), [first]);
    }

    #[test]
    fn a_directory_and_a_database_of_something_else_are_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let open = |path: &Path| SqliteJournal::open(path, "a", super::super::LEASE);
        let error = open(folder.path()).expect_err("it is a directory").to_string();
        assert!(error.contains("name one in it"), "{error}");
        let path = folder.path().join("other.db");
        let other = Connection::open(&path).unwrap();
        other.execute_batch("CREATE TABLE mine (x)").unwrap();
        let error = open(&path).expect_err("it is another's").to_string();
        assert!(error.contains("of something else"), "{error}");
        let path = folder.path().join("text");
        fs::write(&path, "dear diary, ".repeat(100)).unwrap();
        let error = open(&path).expect_err("it is no database").to_string();
        assert!(error.contains("not a database"), "{error}");
    }

    #[test]
    fn a_record_that_was_damaged_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = journal(&folder);
        let record = record();
        journal.put(&record).unwrap();
        journal.database.execute("UPDATE groups SET record = '{}'", []).unwrap();
        let error = journal.records().expect_err("it says nothing").to_string();
        assert!(error.contains(&record.group.to_string()), "{error}");
    }
}
