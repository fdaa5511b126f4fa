//! Session tokens: random, each good for its time, and no more of them than there is room for.

use std::collections::HashMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};

/// Shortest and longest life of a token, in seconds.
pub const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21600;
/// Most tokens that are good at a time. One more takes the place of the one that has least time left.
const TOKENS_MAX: usize = 1024;
/// Random bytes of a token: too many to be guessed.
const TOKEN_BYTES: usize = 32;

/// The tokens that were given out. They are those of one process: no other takes them.
#[derive(Debug, Default)]
pub struct Tokens {
    /// When each ends. The map's own secret keeps the time of a look-up from telling how much of a guess is right.
    ends: HashMap<String, Instant>,
}

impl Tokens {
    /// A new token, good for `seconds` from `now` on; none if the operating system has no random numbers.
    pub fn issue(&mut self, seconds: u32, now: Instant) -> Option<String> {
        let mut bytes = [0; TOKEN_BYTES];
        // So few bytes come in one piece (getrandom(2)).
        getrandom(&mut bytes, GetRandomFlags::empty()).ok()?;
        let mut token = String::with_capacity(2 * TOKEN_BYTES);
        for byte in bytes {
            write!(token, "{byte:02x}").ok()?;
        }
        self.make_room(now);
        self.ends
            .insert(token.clone(), now + Duration::from_secs(seconds.into()));
        Some(token)
    }

    /// Whether `token` was given out and has not ended.
    pub fn is_good(&self, token: &str, now: Instant) -> bool {
        self.ends.get(token).is_some_and(|&end| now < end)
    }

    fn make_room(&mut self, now: Instant) {
        if self.ends.len() < TOKENS_MAX {
            return;
        }
        self.ends.retain(|_, end| now < *end);
        if self.ends.len() < TOKENS_MAX {
            return;
        }
        let first = self.ends.iter().min_by_key(|(_, end)| **end);
        if let Some(token) = first.map(|(token, _)| token.clone()) {
            self.ends.remove(&token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_time_and_nobody_elses_is() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.issue(5, now).unwrap();
        assert_eq!(token.len(), 64);
        assert!(tokens.is_good(&token, now + Duration::from_millis(4999)));
        assert!(!tokens.is_good(&token, now + Duration::from_secs(5)));
        assert!(!tokens.is_good(&token[..63], now) && !tokens.is_good("", now));
        assert!(!Tokens::default().is_good(&token, now));
        assert_ne!(tokens.issue(5, now).unwrap(), token);
    }

    #[test]
    fn there_are_never_more_than_there_is_room_for_and_the_one_with_least_time_goes_first() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let kept = tokens.issue(20, now).unwrap();
        let next = tokens.issue(10, now).unwrap();
        for _ in 0..TOKENS_MAX - 1 {
            tokens.issue(30, now).unwrap();
        }
        assert_eq!(tokens.ends.len(), TOKENS_MAX);
        assert!(tokens.is_good(&kept, now) && !tokens.is_good(&next, now));
        // Those that have ended go together.
        tokens.issue(1, now + Duration::from_secs(30)).unwrap();
        assert_eq!(tokens.ends.len(), 1);
    }
}
