//! How pages are sent on the link at hand: what is measured, and what follows from it.
//!
//! ```text
//!             link faster than lz4            slower                         ever slower
//!             │                               │                              │
//!  Wide: as they are ──────────────► Narrow: deltas, lz4 ─────────► Narrow: deltas, zstd
//!                                      │ ▲
//!             data does not shrink     ▼ │ a look at every 1st, 2nd, 4th, … 16th run finds that it does again
//!                                    Narrow: deltas
//! ```
//! Sending and compressing overlap: the kernel sends what it was given while the next pages are compressed. So what
//! counts of a way is the slower of the two, and a compressor pays as long as it is faster than the link.
//!
//! Measurements come from outside, so that everything here can be computed.

use std::time::Duration;

use super::compressor::Tool;
use crate::options::Compression;

/// A run of pages is compressed if that leaves at most this share of it.
const WORTH_PERCENT: usize = 90;
/// Most runs that are sent uncompressed before the next look at whether they shrink.
const BACKOFF_MAX: u32 = 16;
/// Bytes over which the link's speed is taken.
const LINK_WINDOW_BYTES: u64 = 1 << 20;
/// Time after which it is taken at the latest.
const LINK_WINDOW: Duration = Duration::from_millis(200);
/// The link is narrow if it has less than this share of lz4's speed; it is wide again if it has all of it.
const NARROW_PERCENT: u64 = 75;
/// By how much slower lz4 is assumed to be with data that shrinks than with data that does not.
const LZ4_SHRINKING_SLOWDOWN: u64 = 4;
/// Every so many runs the tool is tried that is not in use.
const RETRY_RUNS: u32 = 64;

/// What to do with pages that are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Send them as they are.
    Wide,
    /// Remember them, and send as little as possible.
    Narrow,
}

/// What to do with a run of pages on a narrow link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Send it as it is.
    None,
    /// Compress a page of it, to see whether it shrinks.
    Look,
    /// Compress it.
    Compress,
}

/// How fast a tool is, and what it leaves.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    /// Bytes taken in per second; 0 if not known.
    bytes_per_second: u64,
    /// Of 1000 bytes that shrink at all, how many are left.
    left_permille: u64,
}

/// Whether data shrinks.
#[derive(Clone, Copy, Debug)]
enum Shrinking {
    Yes,
    /// Not when it was looked at; after `wait` more runs it is looked at again.
    No {
        wait: u32,
        backoff: u32,
    },
}

/// The choice for one stream.
#[derive(Clone, Debug)]
pub struct Choice {
    compression: Compression,
    /// Bytes per second that the stream may send, if there is a limit.
    limit: Option<u64>,
    /// Bytes per second that the link took; 0 if not known.
    link: u64,
    /// What was sent since that was taken, and how long it took.
    window: (u64, Duration),
    narrow: bool,
    lz4: Figures,
    zstd: Figures,
    shrinking: Shrinking,
    runs: u32,
}

impl Choice {
    /// The choice for a stream of a migration that wants `compression`.
    pub fn new(compression: Compression) -> Self {
        Self {
            compression,
            limit: None,
            link: 0,
            window: Default::default(),
            narrow: false,
            lz4: Figures::default(),
            zstd: Figures::default(),
            shrinking: Shrinking::No { wait: 0, backoff: 1 },
            runs: 0,
        }
    }

    /// The stream may send so many bytes per second from here on, or as many as it can.
    pub fn set_limit(&mut self, bytes_per_second: Option<u64>) {
        self.limit = bytes_per_second;
    }

    /// `bytes` were given to the kernel, which took them after `took`; what was waited for a limit does not count.
    pub fn sent(&mut self, bytes: u64, took: Duration) {
        let (sum, time) = &mut self.window;
        *sum += bytes;
        *time += took;
        if *sum < LINK_WINDOW_BYTES && *time < LINK_WINDOW {
            return;
        }
        let mut speed = speed(*sum, *time);
        if self.narrow && self.link > 0 {
            // While a compressor keeps the link waiting the kernel takes everything at once, which says little.
            speed = speed.min(self.link.saturating_mul(2));
        }
        self.link = if self.link == 0 {
            speed
        } else {
            self.link.midpoint(speed)
        };
        self.window = Default::default();
    }

    /// Whether lz4's speed has to be known to decide, and is not: a run of pages is to be [measured](Self::measured).
    pub fn wants_sample(&self) -> bool {
        self.compression == Compression::Auto && self.lz4.bytes_per_second == 0 && self.link().is_some()
    }

    /// How the next pages are to be sent.
    pub fn width(&mut self) -> Width {
        self.narrow = match (self.compression, self.link()) {
            (Compression::Never, _) | (Compression::Auto, None) => false,
            (Compression::Always, _) => true,
            (Compression::Auto, Some(link)) => {
                let percent = if self.narrow { 100 } else { NARROW_PERCENT };
                link < self.lz4.bytes_per_second.saturating_mul(percent) / 100
            }
        };
        if self.narrow { Width::Narrow } else { Width::Wide }
    }

    /// What to do with the next run of pages.
    pub fn attempt(&mut self) -> Attempt {
        match &mut self.shrinking {
            Shrinking::Yes => Attempt::Compress,
            Shrinking::No { wait: 0, .. } => Attempt::Look,
            Shrinking::No { wait, .. } => {
                *wait -= 1;
                Attempt::None
            }
        }
    }

    /// With what to compress the next run.
    pub fn tool(&mut self) -> Tool {
        if self.lz4.bytes_per_second == 0 {
            return Tool::Lz4;
        }
        if self.zstd.bytes_per_second == 0 {
            return Tool::Zstd;
        }
        // Without a measurement, as for the narrowest link.
        let link = self.link().unwrap_or(1);
        let (better, other) = if self.zstd.ns_per_mib(link) < self.lz4.ns_per_mib(link) {
            (Tool::Zstd, Tool::Lz4)
        } else {
            (Tool::Lz4, Tool::Zstd)
        };
        self.runs = (self.runs + 1) % RETRY_RUNS;
        if self.runs == 0 { other } else { better }
    }

    /// `tool` made `left` bytes of `bytes` in `took`. Tells whether that is worth it.
    pub fn measured(&mut self, tool: Tool, bytes: usize, left: usize, took: Duration) -> bool {
        let shrank = self.looked(bytes, left);
        let mut found = Figures {
            bytes_per_second: speed(bytes as u64, took),
            left_permille: left as u64 * 1000 / (bytes as u64).max(1),
        };
        let figures = match tool {
            Tool::Lz4 => &mut self.lz4,
            Tool::Zstd => &mut self.zstd,
        };
        if figures.are_of_shrinking() && shrank {
            figures.bytes_per_second = figures.bytes_per_second.midpoint(found.bytes_per_second);
            figures.left_permille = figures.left_permille.midpoint(found.left_permille);
        } else if shrank {
            *figures = found;
        } else if figures.bytes_per_second == 0 && tool == Tool::Lz4 {
            found.bytes_per_second /= LZ4_SHRINKING_SLOWDOWN;
            *figures = found;
        }
        shrank
    }

    /// `left` bytes were made of `bytes`. Tells whether that is worth it.
    pub fn looked(&mut self, bytes: usize, left: usize) -> bool {
        let shrank = left * 100 <= bytes * WORTH_PERCENT;
        self.shrinking = match self.shrinking {
            _ if shrank => Shrinking::Yes,
            Shrinking::Yes => Shrinking::No { wait: 1, backoff: 1 },
            Shrinking::No { backoff, .. } => {
                let backoff = (backoff * 2).min(BACKOFF_MAX);
                Shrinking::No { wait: backoff, backoff }
            }
        };
        shrank
    }

    /// Bytes per second of the link, as far as known.
    fn link(&self) -> Option<u64> {
        let link = (self.link > 0).then_some(self.link);
        [link, self.limit].into_iter().flatten().min()
    }
}

impl Figures {
    /// Whether they come from data that shrank.
    fn are_of_shrinking(&self) -> bool {
        self.bytes_per_second > 0 && self.left_permille <= WORTH_PERCENT as u64 * 10
    }

    /// How long it takes to bring 1 MiB of pages over a link: to compress them or to send what is left, whichever takes
    /// longer.
    fn ns_per_mib(&self, link: u64) -> u64 {
        let ns = |bytes: u64, per_second: u64| bytes.saturating_mul(1_000_000_000) / per_second.max(1);
        ns(1 << 20, self.bytes_per_second).max(ns((1 << 20) * self.left_permille / 1000, link))
    }
}

/// Bytes per second, at least 1.
fn speed(bytes: u64, took: Duration) -> u64 {
    let per_second = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
    u64::try_from(per_second).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests;
