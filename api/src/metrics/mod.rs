//! What is counted of a VM, in the forms that monitoring systems read.
//!
//! ```text
//!  state driver ── VmStats ─┬─► firecracker: a JSON line of increments, appended to a file or named pipe
//!  log ── LogCounts ────────┼─► prometheus: text of totals, for who asks `/v1/metrics`
//!  migrations ── status ────┘
//! ```

#[cfg(test)]
mod dashboard;
pub mod firecracker;
pub mod migration;
pub mod prometheus;
#[cfg(test)]
pub(crate) mod testing;
