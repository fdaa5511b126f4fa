//! Pruning: deleting snapshots that no chain needs, and what interrupted writers left.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::iter;

use rustix::fs::FlockOperation;
use uuid::Uuid;

use crate::error::Error;
use crate::store::{DELETED, PARTIAL, Snapshot, Store};

/// Which snapshots are to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// These, on which no others are built.
    Delete(Vec<String>),
    /// All but some, and those they are built on.
    Keep {
        /// Names of snapshots to keep.
        names: Vec<String>,
        /// How many of the newest to keep as well.
        last: usize,
    },
    /// None: only what interrupted writers left.
    Leftovers,
}

/// What was, or would be, deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Names of snapshots, in the order in which they go: none before those built on it.
    pub snapshots: Vec<String>,
    /// Directories and files that interrupted writers left.
    pub leftovers: Vec<String>,
    /// Snapshots that stay only because of another.
    pub needed: Vec<Needed>,
}

/// A snapshot that nobody asked to keep, and that has to stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needed {
    /// Its name.
    pub name: String,
    /// Name of one that is kept and built on it.
    pub by: String,
}

/// Deletes what `selection` says; if `rehearse` is set, only tells what that would be.
///
/// A crash part of the way leaves a store with fewer snapshots, each of them with all it is built on.
///
/// # Errors
/// A snapshot to be deleted is needed, one that is named is not there, a manifest is damaged (so that it is not known
/// what that snapshot needs), someone writes to the store, or files cannot be deleted.
pub fn prune(store: &Store, selection: &Selection, rehearse: bool) -> Result<Pruned, Error> {
    let _lock = store.lock(FlockOperation::NonBlockingLockExclusive)?;
    let family = Family(store.list()?);
    let (doomed, needed) = match selection {
        Selection::Delete(names) => (family.delete(store, names)?, Vec::new()),
        Selection::Keep { names, last } => family.all_but(store, names, *last)?,
        Selection::Leftovers => (Vec::new(), Vec::new()),
    };
    // No writer is at work, so whatever is partial stays so.
    let leftovers = store
        .source()
        .entries(|name| name.starts_with(PARTIAL) || name.starts_with(DELETED))?;
    if !rehearse {
        for snapshot in &doomed {
            store.remove(&snapshot.path, snapshot.id())?;
        }
        for name in &leftovers {
            let path = store.dir().join(name);
            let removed = store.files.remove(&path);
            removed.map_err(Error::io("remove it", &path))?;
        }
    }
    Ok(Pruned {
        snapshots: doomed.iter().map(|snapshot| snapshot.name.clone()).collect(),
        leftovers,
        needed,
    })
}

/// The snapshots of a store and who is built on whom. Two can have one id: a directory and its copy.
struct Family(Vec<Snapshot>);

impl Family {
    fn parent(&self, snapshot: &Snapshot) -> Option<&Snapshot> {
        let parent = snapshot.sealed.manifest.parent.as_ref()?;
        self.0.iter().find(|other| other.id() == parent.id)
    }

    /// The snapshot and all it is built on; parents that go round in a circle are each there once.
    fn chain<'a>(&'a self, snapshot: &'a Snapshot) -> Vec<&'a Snapshot> {
        let mut seen = HashSet::new();
        iter::successors(Some(snapshot), |snapshot| self.parent(snapshot))
            .take_while(|snapshot| seen.insert(snapshot.id()))
            .collect()
    }

    fn named(&self, store: &Store, names: &[String]) -> Result<Vec<&Snapshot>, Error> {
        let find = |name: &String| {
            let found = self.0.iter().find(|snapshot| snapshot.name == *name);
            found.ok_or_else(|| Error::Absent(store.dir().join(name)))
        };
        names.iter().map(find).collect()
    }

    /// The snapshots with these names, if no other is built on one of them.
    fn delete(&self, store: &Store, names: &[String]) -> Result<Vec<&Snapshot>, Error> {
        let doomed = self.named(store, names)?;
        for child in self.0.iter().filter(|snapshot| !names.contains(&snapshot.name)) {
            let parent = child.sealed.manifest.parent.as_ref();
            let needed = parent.and_then(|parent| doomed.iter().find(|snapshot| snapshot.id() == parent.id));
            if let Some(needed) = needed {
                return Err(Error::Needed {
                    path: needed.path.clone(),
                    by: child.name.clone(),
                });
            }
        }
        Ok(self.children_first(|snapshot| names.contains(&snapshot.name)))
    }

    /// All snapshots but those with these names, the newest `last`, and those they are built on, which come second.
    fn all_but(&self, store: &Store, names: &[String], last: usize) -> Result<(Vec<&Snapshot>, Vec<Needed>), Error> {
        let newest = self.0.iter().rev().take(last);
        let wanted: Vec<&Snapshot> = self.named(store, names)?.into_iter().chain(newest).collect();
        let mut stay: HashSet<Uuid> = wanted.iter().map(|snapshot| snapshot.id()).collect();
        let mut needed = Vec::new();
        for snapshot in wanted {
            for ancestor in self.chain(snapshot) {
                if stay.insert(ancestor.id()) {
                    needed.push(Needed {
                        name: ancestor.name.clone(),
                        by: snapshot.name.clone(),
                    });
                }
            }
        }
        Ok((self.children_first(|snapshot| !stay.contains(&snapshot.id())), needed))
    }

    /// The snapshots that `wanted` wants, none before those built on it.
    fn children_first(&self, wanted: impl Fn(&Snapshot) -> bool) -> Vec<&Snapshot> {
        let mut snapshots: Vec<&Snapshot> = self.0.iter().filter(|snapshot| wanted(snapshot)).collect();
        snapshots.sort_by_cached_key(|snapshot| (Reverse(self.chain(snapshot).len()), snapshot.name.clone()));
        snapshots
    }
}
