//! A journal that lasts as long as somebody has it, for tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Claim, Journal, uptime, with_cut};
use crate::Error;
use crate::engine::Record;
use crate::id::{Epoch, GroupId};
use crate::lease::{Nanos, nanos};
use crate::runtime::link::lock;

/// What all that have opened it share.
#[derive(Debug, Default)]
pub struct Said {
    term: u64,
    holder: Option<(String, Nanos)>,
    waiting: BTreeMap<String, Nanos>,
    pub records: BTreeMap<GroupId, Record>,
    /// Whether nothing can be written.
    pub is_broken: bool,
    /// Whether coordinators end without a word.
    pub is_held_by_the_dead: bool,
}

/// See the module.
#[derive(Debug)]
pub struct MemoryJournal {
    said: Arc<Mutex<Said>>,
    name: String,
    lease: Duration,
    term: Option<u64>,
}

impl MemoryJournal {
    pub fn open(said: &Arc<Mutex<Said>>, name: &str, lease: Duration) -> Self {
        Self {
            said: Arc::clone(said),
            name: name.to_owned(),
            lease,
            term: None,
        }
    }

    fn decide<T>(&self, work: impl FnOnce(&mut Said) -> T) -> Result<T, Error> {
        let mut said = lock(&self.said);
        check(&said)?;
        if self.term != Some(said.term) {
            return Err(Error::Superseded {
                journal: "in memory".to_owned(),
                by: said.holder.as_ref().map_or("nobody", |(name, _)| name).to_owned(),
            });
        }
        Ok(work(&mut said))
    }
}

fn check(said: &Said) -> Result<(), Error> {
    if said.is_broken {
        return Err(Error::Journal {
            journal: "in memory".to_owned(),
            action: "write",
            reason: "it is broken".to_owned(),
        });
    }
    Ok(())
}

impl Journal for MemoryJournal {
    fn claim(&mut self) -> Result<Claim, Error> {
        let (mut said, now) = (lock(&self.said), uptime());
        check(&said)?;
        if self.term.take() == Some(said.term) {
            said.holder = None;
        }
        let until = now + nanos(self.lease);
        if let Some((by, _)) = said.holder.clone().filter(|(_, until)| now < *until) {
            said.waiting.insert(self.name.clone(), until);
            return Ok(Claim::Held { by });
        }
        said.term += 1;
        said.holder = Some((self.name.clone(), until));
        said.waiting.remove(&self.name);
        self.term = Some(said.term);
        Ok(Claim::Granted)
    }

    fn renew(&mut self) -> Result<Vec<String>, Error> {
        let now = uptime();
        let holder = (self.name.clone(), now + nanos(self.lease));
        self.decide(|said| {
            said.holder = Some(holder);
            said.waiting.retain(|_, until| now < *until);
            said.waiting.keys().cloned().collect()
        })
    }

    fn release(&mut self) -> Result<(), Error> {
        if self.term.is_some() && !lock(&self.said).is_held_by_the_dead {
            self.decide(|said| said.holder = None)?;
        }
        self.term = None;
        lock(&self.said).waiting.remove(&self.name);
        Ok(())
    }

    fn lease(&self) -> Duration {
        self.lease
    }

    fn records(&mut self) -> Result<Vec<Record>, Error> {
        self.decide(|said| said.records.values().cloned().collect())
    }

    fn put(&mut self, record: &Record) -> Result<(), Error> {
        self.decide(|said| drop(said.records.insert(record.group, record.clone())))
    }

    fn put_cut(&mut self, record: &Record, cut: Epoch) -> Result<(), Error> {
        self.put(&with_cut(record.clone(), Some(cut)))
    }

    fn forget(&mut self, group: GroupId) -> Result<(), Error> {
        self.decide(|said| drop(said.records.remove(&group)))
    }
}
