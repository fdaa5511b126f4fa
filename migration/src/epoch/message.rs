//! What is said after the reservation: see [the module](super). Batches of pages follow Round and Epoch.

use cutover_snapshot::section::SectionEntry;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::message::Message;

/// What the primary says. The order of the variants is part of the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToStandby {
    /// Pages come that are put in place at once.
    Round,
    /// Enough of them came that epochs are small.
    Seeded,
    /// An epoch comes.
    Epoch(Header),
    /// The VM is again as it was at this cut: later epochs have not been.
    RolledBack {
        /// The cut.
        cut: u64,
    },
    /// Is anybody there?
    Alive,
    /// There will be no more.
    Abort {
        /// Why.
        reason: String,
    },
}

/// All of an epoch but its pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Its number, higher than those before.
    pub number: u64,
    /// Which incarnation of the VM it is of: that which was reserved.
    pub generation: u64,
    /// The sections of the state.
    pub sections: Vec<SectionEntry>,
    /// Their encodings, one after the other.
    pub state: ByteBuf,
}

/// What the standby answers. The order of the variants is part of the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPrimary {
    /// All pages of the round are in place.
    RoundApplied,
    /// It waits for epochs.
    Seeded,
    /// All of an epoch is here.
    Holds {
        /// Its number.
        number: u64,
        /// Whether there is room for one more.
        room: bool,
    },
    /// What came after the cut is dropped.
    RolledBack {
        /// The cut.
        cut: u64,
    },
    /// Somebody is here.
    Alive {
        /// Whether there is room for one more epoch.
        room: bool,
    },
    /// The standby is none any more.
    Abort {
        /// Why.
        reason: String,
    },
}

impl Message for ToStandby {
    fn name(&self) -> &'static str {
        match self {
            Self::Round => "Round",
            Self::Seeded => "Seeded",
            Self::Epoch(_) => "Epoch",
            Self::RolledBack { .. } => "RolledBack",
            Self::Alive => "Alive",
            Self::Abort { .. } => "Abort",
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

impl Message for ToPrimary {
    fn name(&self) -> &'static str {
        match self {
            Self::RoundApplied => "RoundApplied",
            Self::Seeded => "Seeded",
            Self::Holds { .. } => "Holds",
            Self::RolledBack { .. } => "RolledBack",
            Self::Alive { .. } => "Alive",
            Self::Abort { .. } => "Abort",
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
