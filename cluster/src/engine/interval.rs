//! How long until the next cut: the policy, which decides and does nothing.
//!
//! A cut costs its pause, so the shorter the interval, the slower the guest; and output leaves only at a cut, so the
//! longer it is, the later answers come. Adaptive: as short as keeps pauses to a [share](PAUSE_SHARE) of the time, but no
//! shorter than an epoch takes to become permanent. A longer interval is taken at once, since the guests suffer already; a
//! shorter one in steps, since one cheap epoch may be chance.

use std::time::Duration;

use crate::lease::{Nanos, nanos};
use crate::spec::{INTERVAL_MIN, Interval};
use crate::vm::CutReport;

/// One part of the time, of this many, may be pauses.
const PAUSE_SHARE: u64 = 20;
/// Of the way to a shorter interval, one part of this many is gone at once.
const STEP_SHARE: u64 = 4;

/// The interval, as it is and as it may be.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    wanted: Interval,
    now: Nanos,
}

impl Pace {
    /// A pace that is not known to cost anything yet.
    pub fn new(wanted: Interval) -> Self {
        let now = nanos(wanted.max());
        Self { wanted, now }
    }

    /// From the begin of one cut to that of the next.
    pub fn interval(&self) -> Nanos {
        self.now
    }

    /// A cut took this, and became permanent `took` after it was begun.
    pub fn learn(&mut self, cost: &CutReport, took: Nanos) {
        let Interval::Adaptive { max } = self.wanted else {
            return;
        };
        let range = nanos(INTERVAL_MIN)..=nanos(max).max(nanos(INTERVAL_MIN));
        let goal = cost.pause_ns.saturating_mul(PAUSE_SHARE).max(took);
        let goal = goal.clamp(*range.start(), *range.end());
        self.now = match goal < self.now {
            true => self.now - (self.now - goal).div_ceil(STEP_SHARE),
            false => goal,
        };
    }

    /// As a duration.
    pub fn duration(&self) -> Duration {
        Duration::from_nanos(self.now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Nanos = 1_000_000;

    fn pause(pause_ns: u64) -> CutReport {
        CutReport {
            pause_ns,
            ..CutReport::default()
        }
    }

    fn adaptive(max_ms: u64) -> Pace {
        let max = Duration::from_millis(max_ms);
        Pace::new(Interval::Adaptive { max })
    }

    #[test]
    fn cheap_cuts_come_as_often_as_may_be_and_dear_ones_seldom_at_once() {
        let mut pace = adaptive(400);
        for _ in 0..200 {
            pace.learn(&pause(100_000), MS);
        }
        assert_eq!(pace.interval(), 10 * MS);
        pace.learn(&pause(5 * MS), MS);
        assert_eq!(pace.interval(), 100 * MS);
        pace.learn(&pause(0), 150 * MS);
        assert_eq!(pace.interval(), 150 * MS);
        pace.learn(&pause(1000 * MS), MS);
        assert_eq!(pace.interval(), 400 * MS);
    }

    #[test]
    fn a_fixed_interval_stays_as_it_is() {
        let mut pace = Pace::new(Interval::Fixed(Duration::from_millis(25)));
        pace.learn(&pause(1000 * MS), 1000 * MS);
        assert_eq!(pace.duration(), Duration::from_millis(25));
    }

    proptest! {
        #[test]
        fn whatever_cuts_cost_the_interval_is_within_its_bounds(
            costs in proptest::collection::vec((any::<u64>(), any::<u64>()), 1..50),
            max_ms in 10_u64..60_000,
        ) {
            let mut pace = adaptive(max_ms);
            for (pause_ns, took) in costs {
                pace.learn(&pause(pause_ns), took);
                prop_assert!((10 * MS..=max_ms * MS).contains(&pace.interval()));
            }
        }
    }
}
