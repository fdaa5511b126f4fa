//! A journal in a directory of a host: a file for each group.
//!
//! ```text
//!  DIR/lock              whose coordinator has it, as long as that runs
//!  DIR/GROUP.json        what was decided last about the group; replaced as a whole, so it is never half of two
//! ```
//! A decision is durable when the file and its name are: written beside, synchronised, renamed, the directory
//! synchronised (two flushes of the disk, each time). O(members) bytes are written for each.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::coordinator::Journal;
use crate::Error;
use crate::engine::{Decided, Record};
use crate::id::{Epoch, GroupId};

const LOCK: &str = "lock";
const EXTENSION: &str = "json";

/// See the module.
#[derive(Debug)]
pub struct FileJournal {
    directory: PathBuf,
    handle: File,
    /// Held until dropped.
    _lock: File,
}

impl FileJournal {
    /// The journal in `directory`, which is made if there is none.
    ///
    /// # Errors
    /// Another coordinator has it, or it cannot be used.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let failed = |action| move |error: io::Error| failed(directory, action, &error);
        fs::create_dir_all(directory).map_err(failed("make it"))?;
        let lock = File::create(directory.join(LOCK)).map_err(failed("lock it"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => Error::Journal {
                journal: directory.display().to_string(),
                action: "lock it",
                reason: "another coordinator has it".to_owned(),
            },
            error => failed("lock it")(error.into()),
        })?;
        Ok(Self {
            handle: File::open(directory).map_err(failed("open it"))?,
            directory: directory.to_owned(),
            _lock: lock,
        })
    }

    fn path(&self, group: GroupId) -> PathBuf {
        self.directory.join(format!("{group}.{EXTENSION}"))
    }

    fn read(path: &Path) -> Result<Record, Error> {
        let text = fs::read(path).map_err(|error| failed(path, "read it", &error))?;
        serde_json::from_slice(&text).map_err(|error| failed(path, "read it", &error.into()))
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let path = self.path(record.group);
        let beside = path.with_extension("new");
        let mut file = File::create(&beside)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.sync_data()?;
        fs::rename(&beside, &path)?;
        self.handle.sync_all()
    }

    fn remove(&self, group: GroupId) -> io::Result<()> {
        match fs::remove_file(self.path(group)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.handle.sync_all(),
        }
    }
}

impl Journal for FileJournal {
    fn records(&mut self) -> Result<Vec<Record>, Error> {
        let unreadable = |error: io::Error| failed(&self.directory, "read it", &error);
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                records.push(Self::read(&path)?);
            }
        }
        Ok(records)
    }

    fn put(&mut self, record: &Record) -> Result<(), Error> {
        self.write(record)
            .map_err(|error| failed(&self.directory, "write a decision", &error))
    }

    fn put_cut(&mut self, record: &Record, cut: Epoch) -> Result<(), Error> {
        let mut record = record.clone();
        record.decided = Decided::Protected { cut };
        self.put(&record)
    }

    fn forget(&mut self, group: GroupId) -> Result<(), Error> {
        self.remove(group)
            .map_err(|error| failed(&self.directory, "remove a group", &error))
    }
}

fn failed(path: &Path, action: &'static str, error: &io::Error) -> Error {
    Error::Journal {
        journal: path.display().to_string(),
        action,
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::id::Host;
    use crate::spec::{GroupSpec, Interval, MemberSpec, Timing};

    fn record() -> Record {
        let spec = GroupSpec {
            name: "g".to_owned(),
            members: vec![MemberSpec {
                name: "vm".to_owned(),
                host: Host("unix:a".to_owned()),
            }],
            backups: vec![Host("unix:b".to_owned())],
            interval: Interval::Fixed(Duration::from_millis(100)),
            timing: Timing::default(),
        };
        Record::new(GroupId(uuid::Uuid::new_v4()), spec).expect("there can be such a group")
    }

    #[test]
    fn what_was_written_last_is_read_by_the_next_coordinator() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path()).unwrap();
        let (first, second) = (record(), record());
        journal.put(&first).unwrap();
        journal.put(&second).unwrap();
        journal.put_cut(&first, 7).unwrap();
        journal.forget(second.group).unwrap();
        drop(journal);
        let read = FileJournal::open(folder.path()).unwrap().records().unwrap();
        let expected = Record {
            decided: Decided::Protected { cut: 7 },
            ..first
        };
        assert_eq!(read, [expected]);
    }

    #[test]
    fn a_journal_has_one_coordinator_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let _first = FileJournal::open(folder.path()).unwrap();
        let error = FileJournal::open(folder.path()).expect_err("it is taken").to_string();
        assert!(error.contains("another coordinator has it"), "{error}");
    }

    #[test]
    fn a_decision_that_was_being_written_when_the_host_died_was_never_made() {
        let folder = tempfile::tempdir().unwrap();
        let record = record();
        let mut journal = FileJournal::open(folder.path()).unwrap();
        journal.put(&record).unwrap();
        fs::write(journal.path(record.group).with_extension("new"), "{\"gro").unwrap();
        assert_eq!(journal.records().unwrap(), [record]);
    }

    #[test]
    fn a_journal_that_was_damaged_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let record = record();
        let mut journal = FileJournal::open(folder.path()).unwrap();
        fs::write(journal.path(record.group), "{}").unwrap();
        let error = journal.records().expect_err("it says nothing").to_string();
        assert!(error.contains(&record.group.to_string()), "{error}");
    }
}
