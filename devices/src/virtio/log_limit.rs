//! Keeps what a guest can cause from flooding the log.

use std::time::{Duration, Instant};

/// Messages let through in one [`WINDOW`].
const MESSAGES_MAX: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

/// Lets [`MESSAGES_MAX`] messages through in each [`WINDOW`].
pub struct LogLimit {
    window_start: Instant,
    messages: u32,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self {
            window_start: Instant::now(),
            messages: 0,
        }
    }
}

impl LogLimit {
    /// Whether the next message may be logged.
    pub fn allows(&mut self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&mut self, now: Instant) -> bool {
        if now.duration_since(self.window_start) >= WINDOW {
            (self.window_start, self.messages) = (now, 0);
        }
        self.messages = self.messages.saturating_add(1);
        self.messages <= MESSAGES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_lets_its_share_through_and_the_next_one_begins_afresh() {
        let mut limit = LogLimit::default();
        let now = limit.window_start;
        let passed = (0..100).filter(|_| limit.allows_at(now)).count();
        assert_eq!(passed, 10);
        assert!(limit.allows_at(now + WINDOW));
    }
}
