//! The server as clients meet it: over a real socket, with a VM behind it that only pretends.

mod events;
mod fake;
mod hostile;
mod migrations;
mod requests;
mod snapshots;
