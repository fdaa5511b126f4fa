//! Where decisions about groups are made durable, by one coordinator at a time.
//!
//! ```text
//!  coordinator 1 ── claim ──► Granted ── records, put, put_cut, renew … ──► (dies, or is cut off)
//!  coordinator 2 ── claim ──► Held … Held …    the lease is over    Held ──► Granted: it goes on from there
//!                                       1, if it is back: put ──► Superseded
//! ```
//! The right to decide is a lease, and each grant of it is a *term*. A write is made if the term is still that of who
//! writes, and what it replaces is what he read or wrote last: this is one step with the write, so that it does not
//! depend on clocks that nothing is decided twice. What depends on them is that VMs have one coordinator at a time from
//! which they get leases: the holder counts its lease from before it asks for it, others count it from after.

mod etcd;
mod location;
mod sqlite;

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

pub use etcd::EtcdJournal;
pub use location::{Cluster, Link, Location, NotAJournal};
pub use sqlite::SqliteJournal;

use crate::Error;
use crate::engine::Record;
use crate::id::{Epoch, GroupId};
use crate::lease::{Nanos, nanos};

/// For how long others wait, unless something else is said.
pub const LEASE: Duration = Duration::from_secs(2);
/// The shortest that can be.
pub const LEASE_MIN: Duration = Duration::from_millis(100);
/// Most coordinators that wait beside the one that decides.
pub const WAITING_MAX: usize = 15;

/// Where decisions are made durable. An implementation belongs to one coordinator, which was named when it was opened.
///
/// Any method may fail because the journal cannot be reached, read or written ([`Error::Journal`]); then it is not known
/// whether what was asked for has happened, and nothing must be said that depends on it. Those that write fail with
/// [`Error::Superseded`], and have changed nothing, if this coordinator has not the right to decide any more.
pub trait Journal: Send {
    /// Asks for the right to decide; if another has it, this one is known to that one as waiting. Whoever has it itself
    /// gives it up first: what it knows may be old.
    ///
    /// # Errors
    /// See the trait.
    fn claim(&mut self) -> Result<Claim, Error>;

    /// Keeps the right to decide for another lease. Late is as well, if nobody has taken it: returns who waits for that,
    /// by name, at most [`WAITING_MAX`] of them.
    ///
    /// # Errors
    /// See the trait.
    fn renew(&mut self) -> Result<Vec<String>, Error>;

    /// Gives up the right to decide, or to wait for it.
    ///
    /// # Errors
    /// See the trait.
    fn release(&mut self) -> Result<(), Error>;

    /// For how long the right to decide lasts, from when it was last asked for.
    fn lease(&self) -> Duration;

    /// What it says of all groups; for who decides.
    ///
    /// # Errors
    /// See the trait.
    fn records(&mut self) -> Result<Vec<Record>, Error>;

    /// Has it say this of a group, durably.
    ///
    /// # Errors
    /// See the trait.
    fn put(&mut self, record: &Record) -> Result<(), Error>;

    /// Has it say durably that a cut is permanent; what else it says of the group, which is `record`, is as it was.
    ///
    /// # Errors
    /// See the trait.
    fn put_cut(&mut self, record: &Record, cut: Epoch) -> Result<(), Error>;

    /// Has it say nothing of a group any more, of which nobody is left who would ask.
    ///
    /// # Errors
    /// See the trait.
    fn forget(&mut self, group: GroupId) -> Result<(), Error>;
}

/// What came of asking for the right to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is this coordinator's.
    Granted,
    /// It is another's.
    Held {
        /// Its name.
        by: String,
    },
}

/// Opens the journal at `location` for the coordinator called `name`, whose right to decide lasts for `lease`.
///
/// # Errors
/// It cannot be used.
pub fn open(location: &Location, name: &str, lease: Duration) -> Result<Box<dyn Journal>, Error> {
    Ok(match location {
        Location::File(path) => Box::new(SqliteJournal::open(path, name, lease)?),
        Location::Etcd(cluster) => Box::new(EtcdJournal::open(cluster, name, lease)?),
    })
}

/// The time that leases of this host are counted in: that since it booted, also while it was suspended.
pub(super) fn uptime() -> Nanos {
    let time = clock_gettime(ClockId::Boottime);
    // The kernel gives neither a negative number of seconds nor more nanoseconds than a second has.
    let (seconds, rest) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    nanos(Duration::from_secs(seconds)).saturating_add(rest)
}

/// What [`Journal::put_cut`] has the journal say.
fn with_cut(record: Record, cut: Option<Epoch>) -> Record {
    use crate::engine::Decided;

    match cut {
        Some(cut) => Record {
            decided: Decided::Protected { cut },
            ..record
        },
        None => record,
    }
}

#[cfg(test)]
pub(super) mod memory;
#[cfg(test)]
mod tests;
