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
