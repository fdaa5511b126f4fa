//! What a disk had at its last cuts, as far as it has something else now: logs, one for each epoch, the newest on top.
//!
//! ```text
//!              permanent          ended, shipped or not yet            goes on
//!   ───────────── n ─────────────── n+1 ─────────────── n+2 ───────────────►
//!                   log of epoch n+1    log of epoch n+2    current log
//! ```
//! The log of an epoch has, of each chunk that was written in it, the content from before: that of the cut it began with.
//! So a chunk has at a cut what the first log after that has of it, or else what the disk has now; and the disk goes back
//! to a cut when the logs after it are written back, the newest first.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// What a chunk had.
pub enum Before {
    /// Zeroes, which need no memory.
    Zeroes,
    /// These bytes.
    Bytes(Box<[u8]>),
    /// The host could not read it, and said so.
    Unreadable(String),
}

impl Before {
    /// Bytes that it takes to keep it.
    fn cost(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Zeroes | Self::Unreadable(_) => 0,
        }
    }
}

/// What of a chunk was kept in an epoch.
struct Kept {
    before: Before,
    /// Whether a request that changes the chunk was let pass. Others may have been given up.
    written: bool,
}

/// What was kept in one epoch, by the number of the chunk.
type Log = BTreeMap<u64, Kept>;

/// See the module.
pub struct Logs {
    /// The cut of which everything is known that is known at all: the last permanent one.
    base: u64,
    /// Epochs since then, with the cuts that ended them, oldest first.
    ended: VecDeque<(u64, Log)>,
    current: Log,
    bytes: usize,
}

impl Logs {
    /// Logs of a disk that was just cut, at `cut`.
    pub fn new(cut: u64) -> Self {
        Self {
            base: cut,
            ended: VecDeque::new(),
            current: Log::new(),
            bytes: 0,
        }
    }

    /// Bytes that the logs take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first of `chunks` that is not kept in the current epoch.
    pub fn first_missing(&self, mut chunks: Range<u64>) -> Option<u64> {
        chunks.find(|chunk| !self.current.contains_key(chunk))
    }

    /// Keeps what `chunk` has, unless it is kept already in the current epoch: nobody has changed it since that began.
    pub fn keep(&mut self, chunk: u64, before: Before) {
        self.current.entry(chunk).or_insert_with(|| {
            self.bytes += before.cost();
            Kept { before, written: false }
        });
    }

    /// Whether `chunks` may be changed now; they are taken for changed then.
    pub fn admit(&mut self, chunks: &Range<u64>) -> bool {
        if self.first_missing(chunks.clone()).is_some() {
            return false;
        }
        for (_, kept) in self.current.range_mut(chunks.clone()) {
            kept.written = true;
        }
        true
    }

    /// Ends the current epoch with `cut`; returns the chunks that were written in it. What was kept for a request that
    /// still waits for some of `wanted` is as good for the next epoch.
    pub fn cut(&mut self, cut: u64, wanted: &Range<u64>) -> Vec<u64> {
        let (written, others): (Log, Log) = std::mem::take(&mut self.current)
            .into_iter()
            .partition(|(_, kept)| kept.written);
        let (waited_for, given_up): (Log, Log) = others.into_iter().partition(|(chunk, _)| wanted.contains(chunk));
        self.forget(given_up);
        self.current = waited_for;
        let chunks = written.keys().copied().collect();
        self.ended.push_back((cut, written));
        chunks
    }

    /// `cut` is as if it had never been: its epoch and the next are one.
    pub fn invalidate(&mut self, cut: u64) {
        let Some(position) = self.ended.iter().position(|(ended, _)| *ended == cut) else {
            return;
        };
        let Some((_, older)) = self.ended.remove(position) else {
            return;
        };
        let newer = match self.ended.get_mut(position) {
            Some((_, log)) => log,
            None => &mut self.current,
        };
        let replaced: Log = older
            .into_iter()
            .filter_map(|(chunk, kept)| Some((chunk, newer.insert(chunk, kept)?)))
            .collect();
        self.forget(replaced);
    }

    /// `cut` is permanent: nobody goes back to one before it.
    pub fn make_permanent(&mut self, cut: u64) {
        while self.ended.front().is_some_and(|(ended, _)| *ended <= cut)
            && let Some((ended, log)) = self.ended.pop_front()
        {
            self.base = ended;
            self.forget(log);
        }
    }

    /// Whether what the disk had at `cut` is known.
    pub fn knows(&self, cut: u64) -> bool {
        cut == self.base || self.ended.iter().any(|(ended, _)| *ended == cut)
    }

    /// What `chunk` had at `cut`, which is [known](Self::knows), if the disk may have something else now.
    pub fn at(&self, cut: u64, chunk: u64) -> Option<&Before> {
        let ended = self.ended.iter().filter(|(ended, _)| *ended > cut);
        let logs = ended.map(|(_, log)| log).chain([&self.current]);
        logs.filter_map(|log| log.get(&chunk)).map(|kept| &kept.before).next()
    }

    /// What has to be written to the disk to have it as it was at `cut`, which is [known](Self::knows).
    pub fn changes_since(&self, cut: u64) -> BTreeMap<u64, &Before> {
        let mut changes = BTreeMap::new();
        let ended = self.ended.iter().filter(|(ended, _)| *ended > cut);
        for log in [&self.current].into_iter().chain(ended.rev().map(|(_, log)| log)) {
            let written = log.iter().filter(|(_, kept)| kept.written);
            changes.extend(written.map(|(&chunk, kept)| (chunk, &kept.before)));
        }
        changes
    }

    /// The disk is as it was at `cut`, which is [known](Self::knows), and a new epoch begins.
    pub fn went_back_to(&mut self, cut: u64) {
        while self.ended.back().is_some_and(|(ended, _)| *ended > cut)
            && let Some((_, log)) = self.ended.pop_back()
        {
            self.forget(log);
        }
        let current = std::mem::take(&mut self.current);
        self.forget(current);
    }

    fn forget(&mut self, log: Log) {
        self.bytes -= log.values().map(|kept| kept.before.cost()).sum::<usize>();
    }
}
