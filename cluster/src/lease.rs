//! How long a VM may run without hearing from its coordinator.
//!
//! ```text
//!  member       heartbeat sent at t ──┐        lease: until t + lease ────────┤ stops
//!  coordinator                        └► received at r ≥ t: answered     suspects at r + suspicion ────┤
//! ```
//! Both clocks run at the same rate, or nearly: whoever is suspected has stopped before, since a lease is shorter than a
//! suspicion and counts from earlier. What the two clocks show does not matter.

use std::time::Duration;

/// Nanoseconds of a clock that does not go back, from a time of its own.
pub type Nanos = u64;

/// A lease, which is renewed by answers to heartbeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lease {
    until: Nanos,
}

impl Lease {
    /// The heartbeat that was `sent` then has been answered.
    pub fn renew(&mut self, sent: Nanos, lease: Duration) {
        self.until = self.until.max(sent.saturating_add(nanos(lease)));
    }

    /// Whether it runs still.
    pub fn holds(&self, now: Nanos) -> bool {
        now < self.until
    }

    /// When it ends, if nothing comes.
    pub fn until(&self) -> Nanos {
        self.until
    }
}

/// `duration` in nanoseconds; that of centuries is the longest there is.
pub fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_nanos(200);

    #[test]
    fn a_lease_counts_from_when_the_heartbeat_was_sent_and_a_late_answer_does_not_shorten_it() {
        let mut lease = Lease::default();
        assert!(!lease.holds(0));
        lease.renew(100, LEASE);
        lease.renew(50, LEASE);
        assert!(lease.holds(299));
        assert!(!lease.holds(300));
    }
}
