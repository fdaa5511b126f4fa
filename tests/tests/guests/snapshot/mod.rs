//! Snapshots of guests that go on working, and guests made of them: nothing lost, nothing stale, nothing doubled.

mod bucket;
mod busy;
mod clones;
mod damage;
pub mod database;
mod files;
mod kills;
mod travel;
