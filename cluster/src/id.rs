//! What things are called: groups, members, the processes that have or keep a member's VM, hosts, generations.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A group, made up when it is created: another group of the same name is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GroupId(pub Uuid);

/// A member of a group: its place among the members the group was created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MemberId(pub u16);

/// Which of the processes that were ever to have a member's VM. The VM that joins is the first, 0; each standby that is
/// started has the next number. No number is used twice in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Incarnation(pub u32);

/// A process that has a member's VM, or keeps its image: who sits at one end of a control link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seat {
    /// Whose VM.
    pub member: MemberId,
    /// Which process.
    pub incarnation: Incarnation,
}

/// A seat of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The group.
    pub group: GroupId,
    /// Who in it.
    pub seat: Seat,
}

/// A term of a group: it is raised, durably, before anything that may make two VMs of one, and by each coordinator that
/// takes the group over. What is said in a lower one does not count any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation(pub u64);

/// An epoch, by its number, and the cut that ends it. 0 is none; numbers grow, some are left out, none is used twice.
pub type Epoch = u64;

/// A host, by the name its agent gives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Host(pub String);

impl Generation {
    /// The one after.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Incarnation {
    /// The VM that joins.
    pub const FIRST: Self = Self(0);
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.member.0, self.incarnation.0)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
