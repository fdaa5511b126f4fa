//! The bandwidth limit: how long to wait before some bytes may be sent.
//!
//! ```text
//!   sent    ████ ██████ ████ …           each send moves `free_at` on by what it takes at the rate;
//!   time    ──────────────────┼────►     the next one waits until then
//!                          free_at
//! ```
//! Time that nobody used is not saved up beyond a burst, so that a limit holds over any longer time. All streams of a
//! migration share one limit. In the stop phase it is lifted: the guest stands still, and every byte counts.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Unused time that may be made up for.
const BURST: Duration = Duration::from_millis(20);

/// A limit as arithmetic: time comes from outside, since any fixed moment.
#[derive(Clone, Copy, Debug)]
struct Pace {
    bytes_per_second: u64,
    /// When everything that was admitted is sent.
    free_at: Duration,
}

/// A limit that many threads wait for.
#[derive(Debug)]
pub struct Limit {
    began: Instant,
    /// None if there is no limit, or none any more.
    pace: Mutex<Option<Pace>>,
    lifted: Condvar,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            free_at: Duration::ZERO,
        }
    }

    /// Admits `bytes` at `now`, or later: when the answer is over.
    fn admit(&mut self, bytes: u64, now: Duration) -> Duration {
        let begin = self.free_at.max(now.saturating_sub(BURST));
        let takes_ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let takes = Duration::from_nanos(u64::try_from(takes_ns).unwrap_or(u64::MAX));
        self.free_at = begin.saturating_add(takes);
        begin.saturating_sub(now)
    }
}

impl Limit {
    /// A limit of this many bytes per second; none if there is to be none.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            began: Instant::now(),
            pace: Mutex::new(bytes_per_second.map(Pace::new)),
            lifted: Condvar::new(),
        }
    }

    /// Waits until `bytes` may be sent, or the limit is lifted. Whoever was here first sends first.
    pub fn wait(&self, bytes: u64) {
        let mut pace = self.pace();
        let Some(limit) = pace.as_mut() else { return };
        let now = self.began.elapsed();
        let due = now.saturating_add(limit.admit(bytes, now));
        while pace.is_some() {
            let patience = due.saturating_sub(self.began.elapsed());
            if patience.is_zero() {
                return;
            }
            let waited = self.lifted.wait_timeout(pace, patience);
            pace = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What the limit is, in bytes per second, if there is one.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.pace().map(|pace| pace.bytes_per_second)
    }

    /// There is no limit any more: nobody waits, now or later.
    pub fn lift(&self) {
        *self.pace() = None;
        self.lifted.notify_all();
    }

    fn pace(&self) -> MutexGuard<'_, Option<Pace>> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn each_send_waits_for_those_before_it() {
        let mut pace = Pace::new(1_000);
        assert_eq!(
            pace.admit(500, SECOND),
            Duration::ZERO,
            "whoever is first does not wait"
        );
        let after_burst = SECOND - BURST + SECOND / 2;
        assert_eq!(pace.admit(1_000, SECOND), after_burst - SECOND);
        assert_eq!(pace.admit(1, after_burst), SECOND);
        assert_eq!(pace.admit(1, SECOND * 9), Duration::ZERO);
    }

    #[test]
    fn without_a_limit_and_after_one_nobody_waits() {
        Limit::new(None).wait(u64::MAX);
        let limit = Limit::new(Some(1));
        assert_eq!(limit.bytes_per_second(), Some(1));
        limit.wait(u64::MAX);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| limit.wait(1));
            limit.lift();
            waiting.join().unwrap();
        });
        limit.wait(1);
        assert_eq!(limit.bytes_per_second(), None);
    }

    proptest! {
        #[test]
        fn no_more_is_sent_than_the_limit_and_one_burst_and_no_less_than_the_limit_if_there_is_enough(
            rate in 1_000..1_000_000_000u64,
            sends in prop::collection::vec((1..1_000_000u64, 0..50_000_000u64), 1..50),
        ) {
            let mut pace = Pace::new(rate);
            let (mut now, mut sent, mut idle) = (BURST, 0u64, false);
            let at_rate = |bytes: u64| Duration::from_secs_f64(bytes as f64 / rate as f64);
            for (bytes, pause_ns) in sends {
                let wait = pace.admit(bytes, now);
                // What was sent before this fits into the time until this, and one burst.
                prop_assert!(at_rate(sent) <= now + wait + BURST + Duration::from_micros(1));
                if !idle {
                    prop_assert!(at_rate(sent) + Duration::from_micros(1) >= (now + wait).saturating_sub(BURST));
                }
                sent += bytes;
                let pause = Duration::from_nanos(pause_ns);
                idle |= wait.is_zero() && pause > Duration::ZERO;
                now += wait + pause;
            }
        }
    }
}
