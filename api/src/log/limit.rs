//! How many messages are logged: what a guest can cause must not fill a disk, nor hide what matters.
//!
//! Time is cut into windows. In each, every place in the source may log so many messages, and all places together so
//! many; errors, ordinary messages and those for debugging have separate shares, so that a flood of one kind leaves
//! room for the others. What is held back is counted, and told with the next message of the same place.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use tracing::Level;

/// How long a share lasts.
pub const WINDOW: Duration = Duration::from_secs(10);

/// A share: messages in one [`WINDOW`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Of one place in the source.
    pub per_site: u32,
    /// Of all places together.
    pub overall: u32,
}

/// The share of errors.
pub const ERRORS: Share = Share {
    per_site: 10,
    overall: 100,
};
/// The share of warnings and information.
pub const ORDINARY: Share = Share {
    per_site: 10,
    overall: 100,
};
/// The share of what is logged for debugging only, where somebody looks for a fault and wants to see much.
pub const VERBOSE: Share = Share {
    per_site: 1000,
    overall: 5000,
};

const SHARES: [Share; 3] = [ERRORS, ORDINARY, VERBOSE];

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is logged.
    Log {
        /// Messages of the same place that were held back since the one before.
        held_back: u64,
        /// The place has used up its share: more of its messages are held back until the window ends.
        last: bool,
    },
    /// It is held back.
    HoldBack,
}

/// Counts messages of places, which `S` identifies.
pub struct Limiter<S> {
    /// As many as there are places in the source that log.
    sites: HashMap<S, Site>,
    overall: [Window; SHARES.len()],
    held_back: u64,
}

#[derive(Default)]
struct Site {
    window: Window,
    held_back: u64,
}

/// How much of a share is used since when.
#[derive(Default)]
struct Window {
    start: Option<Instant>,
    used: u32,
}

impl<S> Default for Limiter<S> {
    fn default() -> Self {
        Self {
            sites: HashMap::new(),
            overall: Default::default(),
            held_back: 0,
        }
    }
}

impl<S: Eq + Hash> Limiter<S> {
    /// Decides on a message that `site` has at `now`.
    pub fn admit(&mut self, site: S, level: Level, now: Instant) -> Verdict {
        let class = class(level);
        let share = SHARES[class];
        let site = self.sites.entry(site).or_default();
        // A place without a share left must not use up that of the others.
        if site.window.has(share.per_site, now) && self.overall[class].has(share.overall, now) {
            site.window.used += 1;
            self.overall[class].used += 1;
            Verdict::Log {
                held_back: std::mem::take(&mut site.held_back),
                last: site.window.used == share.per_site,
            }
        } else {
            site.held_back += 1;
            self.held_back += 1;
            Verdict::HoldBack
        }
    }

    /// Messages held back since the beginning.
    pub fn held_back(&self) -> u64 {
        self.held_back
    }

    /// Messages held back that no later message has told of.
    pub fn untold(&self) -> u64 {
        self.sites.values().map(|site| site.held_back).sum()
    }
}

impl Window {
    /// Whether something is left of a share of `most`; begins a new window if this one is over.
    fn has(&mut self, most: u32, now: Instant) -> bool {
        let is_over = self
            .start
            .is_none_or(|start| now.saturating_duration_since(start) >= WINDOW);
        if is_over {
            *self = Self {
                start: Some(now),
                used: 0,
            };
        }
        self.used < most
    }
}

fn class(level: Level) -> usize {
    match level {
        Level::ERROR => 0,
        Level::WARN | Level::INFO => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Verdict = Verdict::Log {
        held_back: 0,
        last: false,
    };

    /// How many of `count` messages of `site` are logged at `now`.
    fn logged(limiter: &mut Limiter<usize>, site: usize, level: Level, count: u32, now: Instant) -> usize {
        let verdicts = (0..count).map(|_| limiter.admit(site, level, now));
        verdicts.filter(|verdict| *verdict != Verdict::HoldBack).count()
    }

    #[test]
    fn a_place_has_its_share_of_each_window_and_says_when_it_is_used_up() {
        let mut limiter = Limiter::default();
        let now = Instant::now();
        assert_eq!(limiter.admit(0, Level::WARN, now), FIRST);
        assert_eq!(logged(&mut limiter, 0, Level::WARN, 8, now), 8);
        let last = Verdict::Log {
            held_back: 0,
            last: true,
        };
        assert_eq!(limiter.admit(0, Level::WARN, now), last);
        assert_eq!(logged(&mut limiter, 0, Level::WARN, 5, now), 0);
        assert_eq!(
            limiter.admit(1, Level::WARN, now),
            FIRST,
            "another place has its own share"
        );
    }

    #[test]
    fn what_was_held_back_is_told_with_the_next_message_of_the_place() {
        let mut limiter = Limiter::default();
        let now = Instant::now();
        assert_eq!(logged(&mut limiter, 0, Level::INFO, 17, now), 10);
        assert_eq!((limiter.untold(), limiter.held_back()), (7, 7));
        let told = Verdict::Log {
            held_back: 7,
            last: false,
        };
        assert_eq!(limiter.admit(0, Level::INFO, now + WINDOW), told);
        assert_eq!(limiter.admit(0, Level::INFO, now + WINDOW), FIRST);
        assert_eq!((limiter.untold(), limiter.held_back()), (0, 7));
    }

    #[test]
    fn all_places_together_are_limited_and_a_flood_leaves_room_for_errors() {
        let mut limiter = Limiter::default();
        let now = Instant::now();
        let warnings: usize = (0..50)
            .map(|site| logged(&mut limiter, site, Level::WARN, 10, now))
            .sum();
        assert_eq!(warnings, 100);
        assert_eq!(limiter.admit(50, Level::INFO, now), Verdict::HoldBack);
        assert_eq!(limiter.admit(51, Level::ERROR, now), FIRST);
        let debugging = logged(&mut limiter, 52, Level::DEBUG, 2000, now);
        assert_eq!(debugging, 1000);
    }

    #[test]
    fn a_place_without_a_share_left_does_not_use_up_that_of_the_others() {
        let mut limiter = Limiter::default();
        let now = Instant::now();
        assert_eq!(logged(&mut limiter, 0, Level::WARN, 1_000_000, now), 10);
        let others: usize = (1..10)
            .map(|site| logged(&mut limiter, site, Level::WARN, 10, now))
            .sum();
        assert_eq!(others, 90);
    }
}
