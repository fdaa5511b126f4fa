//! What the two sides of a migration say to each other.
//!
//! ```text
//!  source                                                          destination
//!  Hello{versions, features} ───────────────────────────────────►  ExpectHello
//!                            ◄──────────── Welcome{version, features, session}
//!  Reserve{reservation, streams} ───────────────────────────────►  ExpectReserve: builds the VM, stopped
//!                            ◄──────────── Reserved{older} │ Refused{all reasons}
//!  Attach{session, stream} ═════ each on a connection of its own ►
//!
//!  only of disks that the destination has an older copy of:
//!  Compare{image, chunk} ───────────────────────────────────────►  ExpectPages
//!                            ◄──────────── Checksums
//!
//!  Round{1} ────────────────────────────────────────────────────►
//!  batches, RoundEnd ═══════════ on each stream at once ════════►
//!                            ◄──────────── RoundApplied{1}
//!  … the guest runs, and each round sends what it wrote during the one before …
//!
//!  (the guest stops)
//!  Round{n, last} ──────────────────────────────────────────────►
//!  batches, RoundEnd ═══════════════════════════════════════════►
//!  State{sections, missing} ────────────────────────────────────►  ExpectState: takes it over, verifies it
//!                            ◄──────────── Ready
//!  Handoff{generation} ═════════ THE COMMIT POINT ══════════════►  ExpectHandoff: runs it
//!                            ◄──────────── Running
//!
//!  only if pages are missing (post-copy):
//!  batches, RoundEnd ═══════════ on stream 0, in the background ►
//!                            ◄──────────── Want{pages}, on a stream of its own
//!  batch ═══════════════════════ of these, at once, on that ════►
//!                            ◄──────────── Want{}, when all others have come
//!  RoundEnd ════════════════════ on that ═══════════════════════►
//!                            ◄──────────── Complete
//! ```
//! Stream 0 is the link that messages go over: within a round it carries batches, and nothing else to the destination.
//!
//! While the destination builds the VM, and while it makes a round's part of disks permanent, it says Alive every other
//! second: so a peer that works is told from one that hangs.
//!
//! Before Handoff either side may say Abort, or end the link, and it is as if nothing had been. After it, the source
//! does not run the VM again unless the destination says Abort: that it did not run it, and never will.
//!
//! # Versions
//! A version is a number, and each release speaks the one it was made with and the one before. Hello, Welcome and Abort
//! have the same form in all versions. Any change of the other messages, of batches, or of what they mean is a new
//! version. A feature is something that a version knows of and a side may lack: both say which they have, and what both
//! have is used. There is one: [replication](crate::epoch::PROTECT), in which what follows the reservation is
//! [something else](crate::epoch).

use cutover_snapshot::checksum::Checksum;
use cutover_snapshot::section::SectionEntry;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use uuid::Uuid;

/// The version this release was made with.
pub const VERSION: u16 = 1;
/// The oldest it speaks.
pub const VERSION_OLDEST: u16 = 1;

/// Most descriptors that are handed over: memory, and one for each device there can be.
pub const HANDED_MAX: usize = 1 + cutover_snapshot::spec::DEVICES_MAX;
/// The round that answers to Want are of.
pub const PULL_ROUND: u32 = 0;
/// Most pages that are wanted in one message.
pub const WANTED_MAX: usize = 256;

/// Something one side says to the other.
pub trait Message: Serialize + DeserializeOwned {
    /// What it is called in errors.
    fn name(&self) -> &'static str;

    /// The reason, if it says that the peer gave up.
    fn abort_reason(&self) -> Option<&str>;

    /// That this side gives up.
    fn abort(reason: String) -> Self;
}

/// What the source says. The order of the variants is part of the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDestination {
    /// The first message of a migration.
    Hello {
        /// The oldest version the source speaks.
        oldest: u16,
        /// The newest.
        newest: u16,
        /// Features it has.
        features: u64,
    },
    /// The first message of a page stream.
    Attach {
        /// Which migration it belongs to.
        session: Uuid,
        /// Which stream it is, from 1.
        stream: u8,
    },
    /// What the VM needs.
    Reserve {
        /// A [`Reservation`](crate::vm::Reservation) as JSON, as specifications are everywhere.
        reservation: String,
        /// Streams that pages will come on, this one among them.
        streams: u8,
        /// Whether one more stream comes, for pages that the guest waits for (post-copy).
        pull: bool,
        /// Names of the descriptors that are sent after this message.
        handed: Vec<String>,
    },
    /// A round begins.
    Round {
        /// Its number, from 1.
        number: u32,
        /// Whether the guest stands still, so that State follows the pages.
        last: bool,
    },
    /// All but the memory.
    State(SavedState),
    /// The VM is the destination's.
    Handoff {
        /// The incarnation that was reserved.
        generation: u64,
    },
    /// The migration does not take place.
    Abort {
        /// Why.
        reason: String,
    },
    /// What are the checksums of [chunks](crate::disk) of this image?
    Compare {
        /// An image that the destination has an older copy of.
        image: u8,
        /// The first chunk.
        chunk: u64,
    },
}

/// The state of a stopped VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Its sections.
    pub sections: Vec<SectionEntry>,
    /// Their encodings, one after the other.
    pub bytes: ByteBuf,
    /// Pages of memory that will come while the guest runs, a bit each, lowest first.
    pub missing: Option<ByteBuf>,
}

/// What the destination says. The order of the variants is part of the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// The answer to Hello.
    Welcome {
        /// The version that is spoken from here on.
        version: u16,
        /// Features that both sides have.
        features: u64,
        /// Made up for this migration.
        session: Uuid,
    },
    /// The VM is built.
    Reserved {
        /// Images that were not empty when that was done; all others are zero.
        older: Vec<u8>,
    },
    /// It cannot be.
    Refused {
        /// All reasons.
        reasons: Vec<String>,
    },
    /// All pages of a round are in place.
    RoundApplied {
        /// Its number.
        number: u32,
    },
    /// The state is in place: nothing is in the way of running the VM.
    Ready,
    /// It runs.
    Running {
        /// For how many nanoseconds by now: whoever says so may have waited for a processor that the guest had taken.
        for_ns: u64,
    },
    /// The guest waits for these pages: one batch answers. Without any, all others have come, and RoundEnd answers.
    Want {
        /// At most [`WANTED_MAX`].
        pages: Vec<u64>,
    },
    /// All of its memory is there.
    Complete,
    /// The VM does not run here, and never will.
    Abort {
        /// Why.
        reason: String,
    },
    /// The answer to Compare.
    Checksums {
        /// One for each chunk, at most [`CHUNKS_MAX`](crate::disk::CHUNKS_MAX).
        checksums: Vec<Checksum>,
    },
    /// The answer to what was said last takes its time.
    Alive,
}

impl Message for ToDestination {
    fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::Attach { .. } => "Attach",
            Self::Reserve { .. } => "Reserve",
            Self::Round { .. } => "Round",
            Self::State(_) => "State",
            Self::Handoff { .. } => "Handoff",
            Self::Abort { .. } => "Abort",
            Self::Compare { .. } => "Compare",
        }
    }

    fn abort_reason(&self) -> Option<&str> {
        match self {
            Self::Abort { reason } => Some(reason),
            _ => None,
        }
    }

    fn abort(reason: String) -> Self {
        Self::Abort { reason }
    }
}

impl Message for ToSource {
    fn name(&self) -> &'static str {
        match self {
            Self::Welcome { .. } => "Welcome",
            Self::Reserved { .. } => "Reserved",
            Self::Refused { .. } => "Refused",
            Self::RoundApplied { .. } => "RoundApplied",
            Self::Ready => "Ready",
            Self::Running { .. } => "Running",
            Self::Want { .. } => "Want",
            Self::Complete => "Complete",
            Self::Abort { .. } => "Abort",
            Self::Checksums { .. } => "Checksums",
            Self::Alive => "Alive",
        }
    }

    fn abort_reason(&self) -> Option<&str> {
        match self {
            Self::Abort { reason } => Some(reason),
            _ => None,
        }
    }

    fn abort(reason: String) -> Self {
        Self::Abort { reason }
    }
}
