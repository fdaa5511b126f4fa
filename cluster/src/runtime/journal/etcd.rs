//! A journal in etcd, for coordinators of several hosts.
//!
//! ```text
//!  PREFIX/decides             who decides: there as long as his lease; its create revision is the term
//!  PREFIX/waiting/NAME        who waits, with a lease each
//!  PREFIX/groups/ID/record    what was decided about a group
//!  PREFIX/groups/ID/cut       its last permanent cut, if that is all that has changed since
//! ```
//! Each write is one transaction, made if the term is still that of who writes and both keys of the group are at the
//! revision he knows. So one whose answer was lost may be sent again, to another server, as often as it takes: if it was
//! made before it is not made again, and one that is delayed on its way changes nothing (etcd v3 API, "KV.Txn").

mod api;
mod gateway;

use std::collections::BTreeMap;
use std::time::Duration;

use self::api::{Compared, Revision, compare, delete, get, get_all, put, txn};
use self::gateway::{Failed, Gateway};
use super::location::Cluster;
use super::{Claim, Journal, WAITING_MAX, uptime, with_cut};
use crate::Error;
use crate::engine::Record;
use crate::id::{Epoch, GroupId};
use crate::lease::{Nanos, nanos};

/// See the module.
#[derive(Debug)]
pub struct EtcdJournal {
    gateway: Gateway,
    location: String,
    prefix: String,
    name: String,
    /// As long as etcd made of what was asked for.
    duration: Duration,
    lease: Option<Granted>,
    /// The term in which this coordinator decides, as long as it does.
    term: Option<Revision>,
    /// At which revisions the keys of a group were read or written last.
    known: BTreeMap<GroupId, Known>,
}

/// A lease of etcd.
#[derive(Debug)]
struct Granted {
    /// A 64-bit number, as text.
    id: String,
    /// When it was last kept alive, by [`uptime`].
    kept_at: Nanos,
    /// Whether those that decide were told that this coordinator waits.
    waits: bool,
}

/// 0 is that of a key that is not there.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    record: Revision,
    cut: Revision,
}

/// What is said of a group.
#[derive(Clone, Copy)]
enum Change<'a> {
    Record(&'a str),
    Cut(Epoch),
    Nothing,
}

/// Why something was not done.
enum Refusal {
    Failed(String),
    /// Another has the right to decide.
    By(String),
}

impl From<Failed> for Refusal {
    fn from(Failed(reason): Failed) -> Self {
        Self::Failed(reason)
    }
}

impl EtcdJournal {
    /// The journal in `cluster`, for the coordinator called `name`. A lease is some seconds, at least what etcd takes to
    /// elect a leader.
    ///
    /// # Errors
    /// It cannot be used: so no connection, certificates that cannot be read. Nobody is asked anything yet.
    pub fn open(cluster: &Cluster, name: &str, lease: Duration) -> Result<Self, Error> {
        let location = cluster.to_string();
        // What takes longer than a lease is no use any more.
        let gateway = Gateway::new(cluster, lease).map_err(|Failed(reason)| Error::Journal {
            journal: location.clone(),
            action: "open it",
            reason,
        })?;
        Ok(Self {
            gateway,
            location,
            prefix: cluster.prefix.clone(),
            name: name.to_owned(),
            duration: lease,
            lease: None,
            term: None,
            known: BTreeMap::new(),
        })
    }

    fn decides(&self) -> String {
        format!("{}/decides", self.prefix)
    }

    fn waiting(&self) -> String {
        format!("{}/waiting/", self.prefix)
    }

    fn group(&self, group: impl std::fmt::Display, part: &str) -> String {
        format!("{}/groups/{group}/{part}", self.prefix)
    }

    /// Has a lease of etcd, one that runs for a while yet.
    fn keep_lease(&mut self) -> Result<(), Refusal> {
        if let Some(lease) = &mut self.lease {
            let now = uptime();
            let is_old = now.saturating_sub(lease.kept_at) >= nanos(self.duration) / 3;
            if !is_old || self.gateway.keep_alive(&lease.id)? {
                lease.kept_at = if is_old { now } else { lease.kept_at };
                return Ok(());
            }
        }
        self.lease = None;
        let kept_at = uptime();
        let (id, duration) = self.gateway.grant(self.duration)?;
        self.duration = duration;
        self.lease = Some(Granted {
            id,
            kept_at,
            waits: false,
        });
        Ok(())
    }

    fn try_claim(&mut self) -> Result<Claim, Refusal> {
        self.keep_lease()?;
        let (decides, me) = (self.decides(), format!("{}{}", self.waiting(), self.name));
        let Some(Granted { id, waits, .. }) = &mut self.lease else {
            return Err(Refusal::Failed("there is no lease".to_owned()));
        };
        let mut otherwise = vec![get(&decides)];
        if !*waits {
            otherwise.push(put(&me, &self.name, Some(id)));
        }
        let claim = txn(
            &[compare(&decides, Compared::Created, 0)],
            &[put(&decides, &self.name, Some(id)), delete(&me)],
            &otherwise,
        );
        let answer = self.gateway.txn(&claim)?;
        if answer.succeeded {
            *waits = false;
            self.term = Some(answer.revision);
            return Ok(Claim::Granted);
        }
        *waits = true;
        match answer.kvs(0)?.into_iter().next() {
            // That of a claim whose answer was lost.
            Some(holder) if holder.lease == *id => {
                self.term = Some(holder.created);
                Ok(Claim::Granted)
            }
            Some(holder) => Ok(Claim::Held { by: holder.text()? }),
            None => Err(Refusal::Failed("it says that somebody decides, and not who".to_owned())),
        }
    }

    fn term(&self) -> Result<Revision, Refusal> {
        self.term.ok_or_else(|| Refusal::By("nobody".to_owned()))
    }

    fn try_renew(&mut self) -> Result<Vec<String>, Refusal> {
        let is_alive = match &self.lease {
            Some(lease) => self.gateway.keep_alive(&lease.id)?,
            None => false,
        };
        let (decides, waiting) = (self.decides(), self.waiting());
        let is_mine = compare(&decides, Compared::Created, self.term()?);
        let answer = self
            .gateway
            .txn(&txn(&[is_mine], &[get_all(&waiting)], &[get(&decides)]))?;
        if !answer.succeeded || !is_alive {
            return Err(self.superseded(&answer)?);
        }
        let names = answer
            .kvs(0)?
            .iter()
            .map(api::KeyValue::text)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(names.into_iter().take(WAITING_MAX).collect())
    }

    /// Who decides, by the first answer of a transaction that came to nothing.
    fn superseded(&self, answer: &api::Answer) -> Result<Refusal, Refusal> {
        let holder = answer.kvs(0)?.into_iter().next();
        let name = holder.map(|holder| holder.text()).transpose()?;
        Ok(Refusal::By(
            name.unwrap_or_else(|| "nobody: its lease is over".to_owned()),
        ))
    }

    /// Has the journal say something of a group.
    fn write(&mut self, group: GroupId, change: Change<'_>) -> Result<(), Refusal> {
        let known = self.known.get(&group).copied().unwrap_or_default();
        let (decides, record, cut) = (self.decides(), self.group(group, "record"), self.group(group, "cut"));
        let is_as_known = [
            compare(&decides, Compared::Created, self.term()?),
            compare(&record, Compared::Modified, known.record),
            compare(&cut, Compared::Modified, known.cut),
        ];
        let number;
        let (key, value, writes) = match change {
            Change::Record(text) => (&record, Some(text), vec![put(&record, text, None), delete(&cut)]),
            Change::Cut(epoch) => {
                number = epoch.to_string();
                (&cut, Some(number.as_str()), vec![put(&cut, &number, None)])
            }
            Change::Nothing => (&record, None, vec![delete(&record), delete(&cut)]),
        };
        let answer = self
            .gateway
            .txn(&txn(&is_as_known, &writes, &[get(&decides), get(key)]))?;
        let revision = if answer.succeeded {
            answer.revision
        } else {
            self.made_before(&answer, value)?
        };
        let now = match change {
            Change::Record(_) => Known {
                record: revision,
                cut: 0,
            },
            Change::Cut(_) => Known { cut: revision, ..known },
            Change::Nothing => Known::default(),
        };
        self.known.insert(group, now);
        Ok(())
    }

    /// The revision at which a write was made whose answer was lost; otherwise another wrote.
    fn made_before(&self, answer: &api::Answer, value: Option<&str>) -> Result<Revision, Refusal> {
        let decides = answer.kvs(0)?.into_iter().next();
        if decides.is_none_or(|decides| Some(decides.created) != self.term) {
            return Err(self.superseded(answer)?);
        }
        match (answer.kvs(1)?.into_iter().next(), value) {
            (Some(now), Some(value)) if now.text()? == value => Ok(now.modified),
            (None, None) => Ok(0),
            _ => Err(Refusal::By("somebody who wrote without the right to".to_owned())),
        }
    }

    fn try_records(&mut self) -> Result<Vec<Record>, Refusal> {
        let (decides, groups) = (self.decides(), format!("{}/groups/", self.prefix));
        let is_mine = compare(&decides, Compared::Created, self.term()?);
        let answer = self
            .gateway
            .txn(&txn(&[is_mine], &[get_all(&groups)], &[get(&decides)]))?;
        if !answer.succeeded {
            return Err(self.superseded(&answer)?);
        }
        let mut cuts = BTreeMap::new();
        let mut records = BTreeMap::new();
        for entry in answer.kvs(0)? {
            let damaged = |error: &dyn std::fmt::Display| Refusal::Failed(format!("{}: {error}", entry.key));
            let text = entry.text()?;
            match entry.key[groups.len()..].rsplit_once('/') {
                Some((id, "cut")) => {
                    let cut: Epoch = text.parse().map_err(|error| damaged(&error))?;
                    cuts.insert(id.to_owned(), (cut, entry.modified));
                }
                Some((id, "record")) => {
                    let record: Record = serde_json::from_str(&text).map_err(|error| damaged(&error))?;
                    if record.group.to_string() != id {
                        return Err(damaged(&"it is the record of another group"));
                    }
                    records.insert(id.to_owned(), (record, entry.modified));
                }
                _ => return Err(damaged(&"nothing of that name belongs there")),
            }
        }
        self.known.clear();
        let joined = records.into_iter().map(|(id, (record, at))| {
            let cut = cuts.remove(&id);
            let known = Known {
                record: at,
                cut: cut.map_or(0, |(_, at)| at),
            };
            self.known.insert(record.group, known);
            with_cut(record, cut.map(|(cut, _)| cut))
        });
        Ok(joined.collect())
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(Refusal) -> Error + use<> {
        let journal = self.location.clone();
        move |refusal| match refusal {
            Refusal::By(by) => Error::Superseded { journal, by },
            Refusal::Failed(reason) => Error::Journal {
                journal,
                action,
                reason,
            },
        }
    }
}

impl Journal for EtcdJournal {
    fn claim(&mut self) -> Result<Claim, Error> {
        if self.term.take().is_some() {
            // Another term needs another key, so the lease of that one is not used any more.
            self.release()?;
        }
        self.try_claim().map_err(self.failed("ask for the right to decide"))
    }

    fn renew(&mut self) -> Result<Vec<String>, Error> {
        self.try_renew().map_err(self.failed("keep the right to decide"))
    }

    fn release(&mut self) -> Result<(), Error> {
        self.term = None;
        match self.lease.take() {
            // With its lease goes all that it has there.
            Some(lease) => {
                let revoked = self.gateway.revoke(&lease.id).map_err(Refusal::from);
                revoked.map_err(self.failed("give up the right to decide"))
            }
            None => Ok(()),
        }
    }

    fn lease(&self) -> Duration {
        self.duration
    }

    fn records(&mut self) -> Result<Vec<Record>, Error> {
        self.try_records().map_err(self.failed("read it"))
    }

    fn put(&mut self, record: &Record) -> Result<(), Error> {
        let text = serde_json::to_string(record).map_err(|error| Refusal::Failed(error.to_string()));
        let written = text.and_then(|text| self.write(record.group, Change::Record(&text)));
        written.map_err(self.failed("write a decision"))
    }

    fn put_cut(&mut self, record: &Record, cut: Epoch) -> Result<(), Error> {
        let written = self.write(record.group, Change::Cut(cut));
        written.map_err(self.failed("write that a cut is permanent"))
    }

    fn forget(&mut self, group: GroupId) -> Result<(), Error> {
        let forgotten = self.write(group, Change::Nothing);
        self.known.remove(&group);
        forgotten.map_err(self.failed("remove a group"))
    }
}
