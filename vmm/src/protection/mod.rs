//! Protection: a VM whose state is held elsewhere too, cut after cut, and that can go back to the last of these.
//!
//! ```text
//!  member of a group ── Protection ──► state driver ── stops, cuts, goes back ──► Machine, gates of its network
//!                                          │  cuts                                   │ what changes
//!                                          ▼                                         ▼
//!                        Cuts: pages of each cut, and the shadow: memory at the last permanent one
//!                                          ▲
//!                                  thread "checkpoint" ════ epochs ════► standby
//! ```
//! Cut n ends epoch n. What a guest sends in an epoch leaves when the cut that ends it is permanent: when everyone who
//! would have to go back to it can. Who decides that is outside of this crate; here is what it means for one VM.

mod cuts;
mod disks;
mod handle;
mod member;
mod pages;
mod request;
mod seeding;
mod shipping;
mod standby;
mod taking;

pub(crate) use self::disks::Begin;
#[cfg(test)]
pub(crate) use self::disks::Disks;
pub use self::handle::Protection;
pub(crate) use self::member::{Guard, Member, Output, WayBack};
pub use self::request::{CutReport, MemberStatus, Notice, StandbyAddress, Step};
pub(crate) use self::seeding::{Seeding, copy as copy_pages, take as take_changes};
#[cfg(test)]
pub(crate) use self::shipping::{Seeded, SharedCuts};
pub(crate) use self::shipping::{SeedingDone, Work, in_full};
pub use self::standby::{Standby, StandbyListener, StandbyNotice, StandbyRequest};
pub(crate) use self::taking::Taking;
