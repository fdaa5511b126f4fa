//! What a migration cost: the figures by which migrations are compared, taken by the source.
//!
//! ```text
//!  │◄─────────────────────────────── total ───────────────────────────────►│
//!  │◄ preparation ►│◄ round 1 ►│ … │◄ round n ►│◄──── downtime ────►│◄ resume ►│
//!  connect, reserve   the guest runs here          it stands still     it runs there, the rest follows
//! ```
//! Times are in nanoseconds by the source's clock: between two hosts there is no other that both have.

use std::ops::AddAssign;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A migration that came to its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// From the start until the destination has everything that the VM needs and pages can be sent, in nanoseconds.
    pub preparation_ns: u64,
    /// How long the guest stood still.
    pub downtime: Downtime,
    /// From the moment the guest runs at the destination until nothing of it is at the source any more, in nanoseconds.
    /// With post-copy its memory follows meanwhile.
    pub resume_ns: u64,
    /// From the start until then, in nanoseconds.
    pub total_ns: u64,
    /// All that went over the wire, in bytes, both ways and with everything that is not pages.
    pub wire_bytes: u64,
    /// Pages by what was sent of them, in all rounds together.
    pub pages: PageCounts,
    /// Of these, how many had been sent before.
    pub duplicate_pages: u64,
    /// Pages that would have been sent once more had they not waited for the stop phase.
    pub deferred_pages_saved: u64,
    /// Pages that the guest waited for after it ran at the destination (post-copy).
    pub pages_pulled: u64,
    /// The longest time that it waited for one of them, in nanoseconds.
    pub pull_ns_max: u64,
    /// Most that the guest was slowed down on purpose, in percent of its time.
    pub throttle_percent_max: u8,
    /// How long it ran slowed down so, in nanoseconds.
    pub throttled_ns: u64,
    /// The rounds, in order; the last one is that of the stop phase, and after it that of post-copy, if there is one.
    pub rounds: Vec<RoundReport>,
}

/// How long the guest stood still, and what for. The parts follow each other and make up the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the last vCPU's stop until the vCPUs at the destination are told to run, in nanoseconds. The guest's own gap is
    /// shorter by the way of the message that says so.
    pub total_ns: u64,
    /// Stopping: devices are quiesced, the last dirty pages harvested, the state saved.
    pub stop_ns: u64,
    /// Sending the last pages.
    pub pages_ns: u64,
    /// Sending the state, and the destination's restoring it.
    pub state_ns: u64,
    /// From the handing over until they are told to run.
    pub handoff_ns: u64,
}

/// A round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundReport {
    /// How long it took, in nanoseconds.
    pub took_ns: u64,
    /// Pages by what was sent of them.
    pub pages: PageCounts,
    /// Bytes of these on the wire.
    pub wire_bytes: u64,
    /// Pages that waited for the stop phase instead.
    pub deferred_pages: u64,
    /// Pages that the guest dirtied during it.
    pub dirtied_pages: u64,
    /// How much the guest was slowed down, in percent of its time.
    pub throttle_percent: u8,
}

/// Numbers of pages, by what was sent of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Only zeroes.
    pub zero: u64,
    /// As sent before.
    pub unchanged: u64,
    /// Sent as what had changed since they were sent before.
    pub delta: u64,
    /// Compressed, or sent as the word or pattern that they consist of.
    pub compressed: u64,
    /// As they are.
    pub raw: u64,
}

impl PageCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.zero + self.unchanged + self.delta + self.compressed + self.raw
    }
}

impl AddAssign for PageCounts {
    fn add_assign(&mut self, more: Self) {
        self.zero += more.zero;
        self.unchanged += more.unchanged;
        self.delta += more.delta;
        self.compressed += more.compressed;
        self.raw += more.raw;
    }
}

impl RoundReport {
    /// Pages that the guest dirtied per second.
    pub fn dirty_pages_per_second(&self) -> u64 {
        per_second(self.dirtied_pages, self.took_ns)
    }

    /// Pages that were sent per second.
    pub fn sent_pages_per_second(&self) -> u64 {
        per_second(self.pages.total(), self.took_ns)
    }

    /// Bytes that were sent per second.
    pub fn bytes_per_second(&self) -> u64 {
        per_second(self.wire_bytes, self.took_ns)
    }
}

impl Report {
    /// Adds a round to its list and its sums.
    pub fn add_round(&mut self, round: RoundReport) {
        self.pages += round.pages;
        self.rounds.push(round);
    }

    /// How long the guest stood still.
    pub fn downtime(&self) -> Duration {
        Duration::from_nanos(self.downtime.total_ns)
    }
}

fn per_second(count: u64, took_ns: u64) -> u64 {
    let rate = u128::from(count) * 1_000_000_000 / u128::from(took_ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTS: PageCounts = PageCounts {
        zero: 1,
        unchanged: 2,
        delta: 4,
        compressed: 8,
        raw: 16,
    };

    #[test]
    fn rounds_add_up() {
        let mut report = Report::default();
        let round = RoundReport {
            took_ns: 500_000_000,
            pages: COUNTS,
            wire_bytes: 1_000,
            dirtied_pages: 7,
            ..RoundReport::default()
        };
        report.add_round(round);
        report.add_round(round);
        assert_eq!(report.pages.total(), 62);
        assert_eq!(report.pages.raw, 32);
        assert_eq!(report.rounds, [round, round]);
        assert_eq!(round.sent_pages_per_second(), 62);
        assert_eq!(round.dirty_pages_per_second(), 14);
        assert_eq!(round.bytes_per_second(), 2_000);
    }

    #[test]
    fn a_round_that_took_no_time_has_rates_all_the_same() {
        let round = RoundReport {
            dirtied_pages: u64::MAX,
            ..RoundReport::default()
        };
        assert_eq!(round.dirty_pages_per_second(), u64::MAX);
    }
}
