//! How pages are sent on the link at hand: what is measured, and what follows from it.
//!
//! ```text
//!             fast link                       slower                         ever slower
//!             │                               │                              │
//!  Wide: as they are ──────────────► Narrow: deltas, lz4 ─────────► Narrow: deltas, zstd
//!                                      │ ▲
//!          compressing does not pay    ▼ │ a look at every 1st, 2nd, 4th, … 16th run finds that it does again
//!                                    Narrow: deltas
//! ```
//! On a wide link a byte saved is worth a few copies of it, and to remember what was sent costs one in fresh memory for each
//! byte, whether it is sent again or not. So a link is narrow if it takes many times as
//! long as that copy. Sending and compressing overlap: the kernel sends what it was given while the next pages are compressed. So
//! what counts of a way is the slower of the two, and it pays to compress what is at the destination sooner for it.
//!
//! Measurements come from outside, so that everything here can be computed.

use std::time::Duration;

use super::compressor::Tool;
use crate::options::Compression;

/// It pays to compress if it takes at most this share of the time that it takes to send as it is.
const WORTH_PERCENT: u64 = 90;
/// Most runs that are sent uncompressed before the next look at whether they shrink.
const BACKOFF_MAX: u32 = 16;
/// Fewest bytes sent at once that tell how fast the link is. Of fewer the kernel takes all at once, or lets the peer run
/// first where there are too few processors: then that counts which the peer does with them.
const LINK_BATCH_BYTES: u64 = 64 << 10;
/// Bytes over which the link's speed is taken.
const LINK_WINDOW_BYTES: u64 = 1 << 20;
/// Time after which it is taken at the latest.
const LINK_WINDOW: Duration = Duration::from_millis(200);
/// A link becomes narrow if pages could be copied so many times as fast as they are sent.
const NARROW_COPIES: u64 = 8;
/// It becomes wide again if they could be copied no more than so many times as fast.
const WIDE_COPIES: u64 = 4;
/// Every so many runs the tool is tried that is not in use.
const RETRY_RUNS: u32 = 64;

/// What to do with pages that are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Send them as they are, unless they have a pattern.
    Wide,
    /// Remember them, and send as little as possible.
    Narrow,
}

/// What to do with a run of pages on a narrow link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Send it as it is.
    None,
    /// Compress a page of it, to see whether that pays.
    Look,
    /// Compress it.
    Compress,
}

/// What a tool takes and leaves, of data where it pays.
#[derive(Clone, Copy, Debug)]
struct Figures {
    /// To compress a MiB, in nanoseconds.
    ns_per_mib: u64,
    /// Bytes that are left of it.
    left_per_mib: u64,
}

/// Whether it pays to compress the data at hand.
#[derive(Clone, Copy, Debug)]
enum Paying {
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
    /// Bytes per second that can be copied to fresh memory; 0 if not known.
    copying: u64,
    narrow: bool,
    lz4: Option<Figures>,
    zstd: Option<Figures>,
    paying: Paying,
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
            copying: 0,
            narrow: false,
            lz4: None,
            zstd: None,
            paying: Paying::No { wait: 0, backoff: 1 },
            runs: 0,
        }
    }

    /// The stream may send so many bytes per second from here on, or as many as it can.
    pub fn set_limit(&mut self, bytes_per_second: Option<u64>) {
        self.limit = bytes_per_second;
    }

    /// `bytes` were given to the kernel, which took them after `took`; what was waited for a limit does not count.
    pub fn sent(&mut self, bytes: u64, took: Duration) {
        if bytes < LINK_BATCH_BYTES {
            return;
        }
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

    /// Whether it has to be known how fast pages can be [copied](Self::copied), and is not.
    pub fn wants_sample(&self) -> bool {
        self.compression == Compression::Auto && self.copying == 0 && self.link().is_some()
    }

    /// `bytes` were copied to fresh memory in `took`.
    pub fn copied(&mut self, bytes: u64, took: Duration) {
        self.copying = speed(bytes, took);
    }

    /// Whether pages that have a pattern are to be sent as such.
    pub fn wants_patterns(&self) -> bool {
        self.compression != Compression::Never
    }

    /// How the next pages are to be sent.
    pub fn width(&mut self) -> Width {
        self.narrow = match (self.compression, self.link()) {
            (Compression::Never, _) | (Compression::Auto, None) => false,
            (Compression::Always, _) => true,
            (Compression::Auto, Some(link)) => {
                let copies = if self.narrow { WIDE_COPIES } else { NARROW_COPIES };
                link < self.copying / copies
            }
        };
        if self.narrow { Width::Narrow } else { Width::Wide }
    }

    /// What to do with the next run of pages.
    pub fn attempt(&mut self) -> Attempt {
        match &mut self.paying {
            Paying::Yes => Attempt::Compress,
            Paying::No { wait: 0, .. } => Attempt::Look,
            Paying::No { wait, .. } => {
                *wait -= 1;
                Attempt::None
            }
        }
    }

    /// With what to compress the next run.
    pub fn tool(&mut self) -> Tool {
        let (Some(lz4), Some(zstd)) = (self.lz4, self.zstd) else {
            return if self.lz4.is_none() { Tool::Lz4 } else { Tool::Zstd };
        };
        let link = self.link_or_least();
        let (better, other) = if zstd.ns(link) < lz4.ns(link) {
            (Tool::Zstd, Tool::Lz4)
        } else {
            (Tool::Lz4, Tool::Zstd)
        };
        self.runs = (self.runs + 1) % RETRY_RUNS;
        if self.runs == 0 { other } else { better }
    }

    /// `tool` made `left` bytes of a run of `bytes` in `took`.
    pub fn compressed(&mut self, tool: Tool, bytes: usize, left: usize, took: Duration) {
        let found = Figures::of(bytes, left, took);
        let pays = self.pays(&found);
        let figures = match tool {
            Tool::Lz4 => &mut self.lz4,
            Tool::Zstd => &mut self.zstd,
        };
        match figures {
            None => *figures = Some(found),
            Some(figures) if pays => figures.blend(&found),
            Some(_) => {}
        }
        // Also a tool that is not the best one for this link tells whether data shrinks.
        self.note(pays);
    }

    /// `left` bytes were made of a page of `bytes` in `took`. Tells whether that pays.
    pub fn looked(&mut self, bytes: usize, left: usize, took: Duration) -> bool {
        let pays = self.pays(&Figures::of(bytes, left, took));
        self.note(pays);
        pays
    }

    fn note(&mut self, pays: bool) {
        self.paying = match self.paying {
            _ if pays => Paying::Yes,
            Paying::Yes => Paying::No { wait: 1, backoff: 1 },
            Paying::No { backoff, .. } => {
                let backoff = (backoff * 2).min(BACKOFF_MAX);
                Paying::No { wait: backoff, backoff }
            }
        };
    }

    fn pays(&self, found: &Figures) -> bool {
        let link = self.link_or_least();
        let uncompressed = ns(1 << 20, link);
        u128::from(found.ns(link)) * 100 <= u128::from(uncompressed) * u128::from(WORTH_PERCENT)
    }

    /// Bytes per second of the link; as long as nothing is known of it, those of the narrowest.
    fn link_or_least(&self) -> u64 {
        self.link().unwrap_or(1)
    }

    /// Bytes per second of the link, as far as known.
    fn link(&self) -> Option<u64> {
        let link = (self.link > 0).then_some(self.link);
        [link, self.limit].into_iter().flatten().min()
    }
}

impl Figures {
    /// `left` bytes of `bytes` in `took`.
    fn of(bytes: usize, left: usize, took: Duration) -> Self {
        let per_mib = |amount: u128| {
            let per_mib = amount.saturating_mul(1 << 20) / (bytes as u128).max(1);
            u64::try_from(per_mib).unwrap_or(u64::MAX)
        };
        Self {
            ns_per_mib: per_mib(took.as_nanos()),
            left_per_mib: per_mib(left as u128),
        }
    }

    /// How long it takes to bring a MiB over a link: to compress it or to send what is left, whichever takes longer.
    fn ns(&self, link: u64) -> u64 {
        self.ns_per_mib.max(ns(self.left_per_mib, link))
    }

    /// Has newer figures count as much as all before.
    fn blend(&mut self, newer: &Self) {
        self.ns_per_mib = self.ns_per_mib.midpoint(newer.ns_per_mib);
        self.left_per_mib = self.left_per_mib.midpoint(newer.left_per_mib);
    }
}

/// How long `bytes` take at so many per second, in nanoseconds.
fn ns(bytes: u64, per_second: u64) -> u64 {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(per_second.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// Bytes per second, at least 1.
fn speed(bytes: u64, took: Duration) -> u64 {
    let per_second = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
    u64::try_from(per_second).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests;
