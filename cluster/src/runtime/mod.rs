//! What the state machines decide, done: between processes and hosts, over links that break.
//!
//! ```text
//!  coordinator  one thread that does what the engines of its groups say; recovery: how long that takes
//!  journal   where that is made durable: in a database, in etcd
//!  coordinators  which of several decides, as members and standbys find it
//!  link      control links: messages both ways, each in time or not at all
//!  contact   a link that is opened again whenever it breaks
//!  seat      what members and standbys have in common; member, standby: the two of them
//!  agent     what is done on a host: VMs join, standbys start, and that one of them dies is told
//! ```

pub mod agent;
pub mod contact;
pub mod coordinator;
mod coordinators;
pub mod journal;
pub mod link;
mod member;
pub mod recovery;
pub mod seat;
mod standby;

#[cfg(test)]
mod tests;
