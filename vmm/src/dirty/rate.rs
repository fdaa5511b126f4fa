//! How fast a guest changes its memory: what a migration of it would have to keep up with.

use std::time::{Duration, Instant};

use super::{Baseline, Consumer, PAGE_SIZE, Tracker};
use crate::Error;

/// How long nobody may ask before measuring ends.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Pages that changed in a stretch of time. A page counts once, however often it was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyRate {
    /// How many.
    pub pages: u64,
    /// In which time.
    pub interval: Duration,
}

impl DirtyRate {
    /// Pages per second; none in no time.
    pub fn pages_per_second(&self) -> u64 {
        let nanoseconds = self.interval.as_nanos();
        (u128::from(self.pages) * 1_000_000_000)
            .checked_div(nanoseconds)
            .map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
    }

    /// Bytes per second.
    pub fn bytes_per_second(&self) -> u64 {
        self.pages_per_second().saturating_mul(PAGE_SIZE)
    }
}

/// Measures from one sample to the next. While there is one, the guest's writes are tracked, which slows it down: it is
/// to be dropped at its [`expiry`](RateMeter::expiry).
pub struct RateMeter {
    consumer: Consumer,
    since: Instant,
}

impl RateMeter {
    /// Begins to measure, at time `now`.
    ///
    /// # Errors
    /// KVM refused to notice writes.
    pub fn start(tracker: &Tracker, now: Instant) -> Result<Self, Error> {
        let consumer = tracker.register(Baseline::Now)?;
        Ok(Self { consumer, since: now })
    }

    /// What changed since the last sample, or the start. It is `now`.
    ///
    /// # Errors
    /// KVM did not tell what was written; the next sample is of the longer time.
    pub fn sample(&mut self, now: Instant) -> Result<DirtyRate, Error> {
        let taken = self.consumer.take()?;
        let rate = DirtyRate {
            pages: taken.len(),
            interval: now.saturating_duration_since(self.since),
        };
        taken.commit();
        self.since = now;
        Ok(rate)
    }

    /// When it has to be dropped, unless somebody asks before.
    pub fn expiry(&self) -> Instant {
        self.since + IDLE_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_pages_by_time() {
        let rate = DirtyRate {
            pages: 600,
            interval: Duration::from_millis(1500),
        };
        assert_eq!((rate.pages_per_second(), rate.bytes_per_second()), (400, 400 * 4096));
    }

    #[test]
    fn nothing_is_measured_in_no_time() {
        let rate = DirtyRate {
            pages: 5,
            interval: Duration::ZERO,
        };
        assert_eq!(rate.pages_per_second(), 0);
    }
}
