//! What the state machines decide, done: between processes and hosts, over links that break.
//!
//! ```text
//!  link      control links: messages both ways, each in time or not at all
//!  contact   a link that is opened again whenever it breaks
//!  agent     what is done on a host: VMs join, standbys start, and that one of them dies is told
//! ```

pub mod agent;
pub mod contact;
pub mod link;
