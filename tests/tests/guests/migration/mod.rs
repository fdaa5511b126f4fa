//! Guests that move between two monitors: nothing lost, nothing stale, nothing doubled, and never two of one guest.

mod between_hosts;
mod clients;
mod database;
mod failures;
mod handed_over;
mod load;
mod network;
mod refusals;
mod secure;
mod storage;
mod visitors;
