//! What the journal says of a group: all that must survive the coordinator, and nothing else.
//!
//! ```text
//!  Unprotected ──── a cut is permanent ────► Protected{cut} ──── a member failed ────► RollingBack{cut}
//!   ▲   ▲                                      │  ▲ └─ the next cut                         │  │ ▲ another
//!   │   └──────── a standby is lost ───────────┘  └───────────────────────────              │  └─┘
//!   └──────────────────────────────────────────────────────── all stand at the cut ─────────┘
//! ```
//! Any of them becomes Dissolved. Whoever is told something hears of it after the journal has it.

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::id::{Epoch, Generation, GroupId, Host, Incarnation, MemberId, Seat};
use crate::message::Ending;
use crate::spec::GroupSpec;

/// What the journal says of a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Which group.
    pub group: GroupId,
    /// What it is to be.
    pub spec: GroupSpec,
    /// The generation it is in.
    pub generation: Generation,
    /// What was decided last.
    pub decided: Decided,
    /// Its members, in the order of the spec.
    pub members: Vec<Place>,
    /// The next incarnation.
    pub next: Incarnation,
}

/// What a group is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decided {
    /// Each member is on its own: there is nothing to go back to.
    Unprotected,
    /// The cut is permanent.
    Protected {
        /// Which.
        cut: Epoch,
    },
    /// All go back to the cut.
    RollingBack {
        /// Which.
        cut: Epoch,
    },
    /// It is a group no more.
    Dissolved,
}

/// What has become of a member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// It has not joined yet.
    Expected,
    /// It is one.
    In {
        /// Who has its VM.
        primary: Located,
        /// Who keeps an image of it, or is to.
        standby: Option<Located>,
    },
    /// Its guest ended by itself.
    Ended,
    /// It failed when nobody could take its place.
    Lost {
        /// What happened.
        reason: String,
        /// Who had its VM.
        was: Located,
        /// What becomes of that if it comes back: it may never have failed, but only been out of reach.
        ending: Ending,
    },
}

/// A process and its host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Located {
    /// Which.
    pub seat: Seat,
    /// Where.
    pub host: Host,
}

impl Record {
    /// A group that is new.
    ///
    /// # Errors
    /// There cannot be such a group.
    pub fn new(group: GroupId, spec: GroupSpec) -> Result<Self, Error> {
        spec.validate()?;
        let members = vec![Place::Expected; spec.members.len()];
        Ok(Self {
            group,
            spec,
            generation: Generation::default(),
            decided: Decided::Unprotected,
            members,
            next: Incarnation(1),
        })
    }

    /// Those that have members' VMs, in order.
    pub fn primaries(&self) -> impl Iterator<Item = &Located> {
        self.members.iter().filter_map(|place| match place {
            Place::In { primary, .. } => Some(primary),
            _ => None,
        })
    }

    /// Those that keep their images, in order.
    pub fn standbys(&self) -> impl Iterator<Item = &Located> {
        self.members.iter().filter_map(|place| match place {
            Place::In { standby, .. } => standby.as_ref(),
            _ => None,
        })
    }

    /// Whether `seat` has its member's VM.
    pub fn is_primary(&self, seat: Seat) -> bool {
        matches!(self.place(seat.member), Some(Place::In { primary, .. }) if primary.seat == seat)
    }

    /// Whether `seat` keeps its member's image.
    pub fn is_standby(&self, seat: Seat) -> bool {
        matches!(self.place(seat.member), Some(Place::In { standby: Some(standby), .. }) if standby.seat == seat)
    }

    /// What has become of a member; nothing if there never was such a one.
    pub fn place(&self, member: MemberId) -> Option<&Place> {
        self.members.get(usize::from(member.0))
    }

    /// The same, to change it.
    pub(super) fn place_mut(&mut self, member: MemberId) -> Option<&mut Place> {
        self.members.get_mut(usize::from(member.0))
    }

    /// The name of a member's VM.
    pub fn name(&self, member: MemberId) -> &str {
        let spec = self.spec.members.get(usize::from(member.0));
        spec.map_or("", |spec| spec.name.as_str())
    }

    /// Members that have not joined yet, and their hosts.
    pub(super) fn expected(&self) -> impl Iterator<Item = (MemberId, &Host)> {
        let places = (0..).map(MemberId).zip(&self.members).zip(&self.spec.members);
        places.filter_map(|((member, place), spec)| (*place == Place::Expected).then_some((member, &spec.host)))
    }

    /// The cut that is permanent, if one is.
    pub fn permanent(&self) -> Option<Epoch> {
        match self.decided {
            Decided::Protected { cut } | Decided::RollingBack { cut } => Some(cut),
            Decided::Unprotected | Decided::Dissolved => None,
        }
    }
}
