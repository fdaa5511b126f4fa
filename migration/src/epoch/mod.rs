//! Replication: the epoch stream of which a migration is one of length one, without an end.
//!
//! ```text
//!  primary: Replica                                                standby: Standby
//!  Hello{PROTECT}, Reserve ── as a migration's ─────────────────►  builds the VM, stopped
//!                            ◄─────────────────────────── Reserved
//!  Round ► batches ► RoundEnd ──────────────────────────────────►  applied as they come: nothing is protected yet
//!                            ◄─────────────────────── RoundApplied
//!  Seeded ──────────────────────────────────────────────────────►  from here on epochs
//!                            ◄───────────────────────────── Seeded
//!
//!  Epoch{n, state} ► batches ► RoundEnd ── in one go ───────────►  kept as bytes, all of them verified
//!                            ◄─────────────────────────── Holds{n}
//!                                                    permanent(n)  the coordinator's word: applied, in order
//!  RolledBack{cut} ─────────────────────────────────────────────►  drops what it holds of later epochs
//!                            ◄───────────────────────── RolledBack
//!  Alive ───────────────────────────────────────────────────────►  when nothing else was said for a while
//!                            ◄────────────────────────────── Alive
//! ```
//! Whoever speaks waits for the answer before he speaks again, so that either side knows at any time what may come, and
//! until when. A standby's image changes only by whole epochs, in order, each verified to its last byte before the first
//! page is touched; what is begun to be applied needs the primary no more.
//!
//! One standby has one primary and one link. A link that ends is not taken up again: the primary gets another standby,
//! and this one keeps what it has until it is promoted or ended. So there are no two primaries of one standby, and
//! whoever was fenced has nothing to say to the VM that took his place.

mod held;
mod message;
mod serving;
mod session;
pub mod source;
pub mod standby;

use std::sync::Arc;
use std::time::Duration;

use cutover_snapshot::section::Sections;

use self::message::{ToPrimary, ToStandby};
use crate::link::Link;
use crate::options::Compression;
use crate::pages::PageBits;
pub use crate::streams::PageSource;

/// The [feature](crate::message) of a peer that replicates a VM, or is a standby.
pub const PROTECT: u64 = 1;

/// The primary's end, after the handshake.
type PrimaryLink = Link<ToStandby, ToPrimary>;
/// The standby's end.
type StandbyLink = Link<ToPrimary, ToStandby>;

/// How a link of replication is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long the primary says nothing before it asks whether the standby is there.
    pub alive_every: Duration,
    /// How long the peer may be silent where it should speak, or take nothing; much longer than `alive_every`, at both
    /// sides. It is looked at every 100 ms.
    pub silence: Duration,
    /// Most bytes of epochs that are not permanent that a standby keeps before it has no room for one more. What it keeps
    /// at most is this and one epoch.
    pub held_bytes_max: u64,
    /// How pages are encoded.
    pub compression: Compression,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            alive_every: Duration::from_millis(200),
            silence: Duration::from_secs(5),
            held_bytes_max: 1 << 30,
            compression: Compression::Auto,
        }
    }
}

/// What is to be sent of one image.
#[derive(Clone)]
pub struct Part {
    /// Which pages.
    pub pages: PageBits,
    /// What is in these. Of an epoch it is what was in them at the cut, until the epoch is shipped.
    pub content: Arc<dyn PageSource>,
    /// What the image is like at the standby when it applies this, if that is known here: as it was at the cut of the
    /// epoch that was shipped before, or that the VM was rolled back to; before the first epoch, as it was sent. Pages are
    /// sent as what differs from it.
    pub base: Option<Arc<dyn PageSource>>,
}

/// What changed between two cuts.
pub struct Epoch {
    /// Its number, higher than those before.
    pub number: u64,
    /// What changed of each image, in the order of the reservation.
    pub parts: Vec<Part>,
    /// All but these, at the cut.
    pub state: Sections,
}

#[cfg(test)]
mod tests;
