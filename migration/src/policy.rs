//! When rounds of pre-copy end, and how: the convergence policy, which decides and does nothing.
//!
//! ```text
//!                  expected downtime ≤ goal ───────────────────────────────► Stop
//!   Measured ──►   few rounds since the least was left ────────────────────► Continue
//!   (a round)      the guest writes faster than is sent, may be slowed down ► Throttle
//!                  nothing helps any more, or it takes too many rounds ─────► PostCopy or GiveUp
//! ```
//! The expected downtime counts all that happens while the guest stands still: the pages that are left, and what a stop
//! costs with no page at all (quiescing, state, restoring it, the messages). A goal for the pages alone would be met
//! while the guest stands still for many times as long.

use std::fmt;
use std::time::Duration;

use crate::options::{Options, PostCopy};

/// Rounds in a row that may bring nothing before something is done about it. One may be bad luck.
const IDLE_ROUNDS_MAX: u32 = 2;
/// A round brings something when it leaves less than this share of the least that was ever left.
const PROGRESS_PERCENT: u64 = 90;
/// Most that a guest is slowed down: of each period it has this much less.
pub const THROTTLE_PERCENT_MAX: u8 = 99;
/// Most by which a guest is slowed down further at once, so that it is slowed down no more than needed.
const THROTTLE_STEP_MAX: u8 = 10;
/// Share of the rate of sending that a slowed-down guest may dirty: rounds then become shorter by that factor.
const THROTTLED_DIRTY_PERCENT: u64 = 60;
/// Share of what may be left for the stop phase that hot pages may take: the rest is for those that happen to be dirty.
const DEFERRED_PERCENT: u64 = 50;

/// What is known at the end of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// How many rounds there were, 1 after the first.
    pub rounds: u32,
    /// Pages the destination does not have as they are now, those that were deferred among them.
    pub pages_left: u64,
    /// Pages that the guest dirtied per second, each counted once in a round.
    pub dirty_pages_per_second: u64,
    /// Pages that were sent per second, within the bandwidth limit.
    pub sent_pages_per_second: u64,
    /// What each page is expected to take in the stop phase, where no limit holds, all streams together.
    pub page_ns: u64,
    /// What the stop phase is expected to take without any page.
    pub fixed_ns: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Continue,
    /// Slow the guest down to have this share less of each period, in percent, and another round.
    Throttle(u8),
    /// Stop the guest and send the rest.
    Stop,
    /// Have it go on at the destination, and send the rest behind it.
    PostCopy,
    /// Leave it where it is.
    GiveUp(Reason),
}

/// Why the downtime cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The guest writes too fast.
    DirtyRate {
        /// Pages that it dirties per second.
        dirty_pages_per_second: u64,
        /// Pages that are sent per second.
        sent_pages_per_second: u64,
        /// Downtime that was reached, as far as it can be foreseen.
        expected: Duration,
    },
    /// There were as many rounds as may be.
    Rounds {
        /// How many.
        rounds: u32,
        /// Downtime that was reached, as far as it can be foreseen.
        expected: Duration,
    },
    /// Stopping takes longer than that without a page to send.
    Fixed {
        /// How long.
        expected: Duration,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DirtyRate {
                dirty_pages_per_second: dirty,
                sent_pages_per_second: sent,
                expected,
            } => write!(
                f,
                "the guest dirties {dirty} pages/s, {sent} pages/s are sent, so that it would stand still for {expected:.0?}"
            ),
            Self::Rounds { rounds, expected } => {
                write!(f, "after {rounds} rounds it would still stand still for {expected:.0?}")
            }
            Self::Fixed { expected } => write!(f, "to stop it takes {expected:.0?} even with no page to send"),
        }
    }
}

/// The policy, with what it remembers of earlier rounds.
#[derive(Clone, Debug)]
pub struct Policy {
    options: Options,
    least_left: u64,
    /// Rounds since that was reached.
    idle_rounds: u32,
    throttle_percent: u8,
}

impl Measured {
    /// How long the guest is expected to stand still if it is stopped now.
    pub fn expected_downtime(&self) -> Duration {
        Duration::from_nanos(
            self.fixed_ns
                .saturating_add(self.pages_left.saturating_mul(self.page_ns)),
        )
    }
}

impl Policy {
    /// The policy of a migration with `options`.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            least_left: u64::MAX,
            idle_rounds: 0,
            throttle_percent: 0,
        }
    }

    /// What to do after a round.
    pub fn decide(&mut self, measured: &Measured) -> Decision {
        if measured.expected_downtime() <= self.options.downtime {
            return Decision::Stop;
        }
        if self.options.post_copy == PostCopy::Always {
            return Decision::PostCopy;
        }
        self.note_progress(measured.pages_left);
        if measured.rounds >= self.options.rounds {
            return self.last_resort(Reason::Rounds {
                rounds: measured.rounds,
                expected: measured.expected_downtime(),
            });
        }
        if self.idle_rounds < IDLE_ROUNDS_MAX {
            return Decision::Continue;
        }
        match self.more_throttle(measured) {
            Some(percent) => {
                self.idle_rounds = 0;
                self.throttle_percent = percent;
                Decision::Throttle(percent)
            }
            None => self.last_resort(self.hopeless(measured)),
        }
    }

    /// Most hot pages that may wait for the stop phase.
    pub fn deferrable_pages(&self, measured: &Measured) -> u64 {
        let goal = u64::try_from(self.options.downtime.as_nanos()).unwrap_or(u64::MAX);
        let for_pages = goal.saturating_sub(measured.fixed_ns);
        (for_pages / measured.page_ns.max(1)).saturating_mul(DEFERRED_PERCENT) / 100
    }

    fn note_progress(&mut self, pages_left: u64) {
        if pages_left < self.least_left.saturating_mul(PROGRESS_PERCENT) / 100 {
            self.least_left = pages_left;
            self.idle_rounds = 0;
        } else {
            self.idle_rounds += 1;
        }
    }

    /// How much to slow the guest down now, if that may be and can help: enough that less is dirtied than is sent, in
    /// steps.
    fn more_throttle(&self, measured: &Measured) -> Option<u8> {
        let stop_is_short_enough = Duration::from_nanos(measured.fixed_ns) < self.options.downtime;
        if !self.options.throttle || !stop_is_short_enough || self.throttle_percent >= THROTTLE_PERCENT_MAX {
            return None;
        }
        let running = u64::from(100 - self.throttle_percent);
        let affordable = measured.sent_pages_per_second.saturating_mul(THROTTLED_DIRTY_PERCENT) / 100;
        let share = affordable.saturating_mul(running) / measured.dirty_pages_per_second.max(1);
        let needed = 100 - u8::try_from(share.min(100)).expect("at most 100");
        let next = needed.clamp(self.throttle_percent + 1, self.throttle_percent + THROTTLE_STEP_MAX);
        Some(next.min(THROTTLE_PERCENT_MAX))
    }

    fn hopeless(&self, measured: &Measured) -> Reason {
        let fixed = Duration::from_nanos(measured.fixed_ns);
        if fixed >= self.options.downtime {
            return Reason::Fixed { expected: fixed };
        }
        Reason::DirtyRate {
            dirty_pages_per_second: measured.dirty_pages_per_second,
            sent_pages_per_second: measured.sent_pages_per_second,
            expected: measured.expected_downtime(),
        }
    }

    fn last_resort(&self, reason: Reason) -> Decision {
        match self.options.post_copy {
            PostCopy::Never => Decision::GiveUp(reason),
            PostCopy::LastResort | PostCopy::Always => Decision::PostCopy,
        }
    }
}

#[cfg(test)]
mod tests;
