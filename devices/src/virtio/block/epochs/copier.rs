//! The thread that keeps what chunks have before they are changed: the only one that adds to a log, and on demand alone.
//!
//! It reads without the lock. What it read belongs to the log all the same: the chunk was missing there, so nobody was
//! let change it, and nobody will be before it is kept. Only a step back changes the disk otherwise; what was read
//! before one is read again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};

use super::log::Before;
use super::{Protected, Shared};
use crate::virtio::block::gate::{COPY_BYTES, COPY_CHUNKS};
use crate::{CheckpointSoon, OnThread, THREAD_STACK_SIZE};

/// What to read next.
struct Job {
    stretch: u64,
    image: Arc<File>,
    /// A chunk, and where its bytes are.
    chunks: Vec<(u64, Range<u64>)>,
}

/// Starts it. It ends when the disk is no longer protected.
pub fn spawn(shared: Arc<Shared>, on_thread: &OnThread) -> io::Result<JoinHandle<()>> {
    let on_thread = on_thread.clone();
    thread::Builder::new()
        .name("disk-undo".to_owned())
        .stack_size(THREAD_STACK_SIZE)
        .spawn(move || {
            on_thread();
            while let Some(job) = shared.next_job() {
                let read = job.read();
                if let Some(soon) = shared.keep(job.stretch, read) {
                    soon();
                }
            }
        })
}

impl Job {
    fn read(&self) -> Vec<(u64, Before)> {
        let chunks = self.chunks.iter();
        chunks.map(|(chunk, bytes)| (*chunk, self.read_chunk(bytes))).collect()
    }

    fn read_chunk(&self, bytes: &Range<u64>) -> Before {
        let mut content = vec![0; usize::try_from(bytes.end - bytes.start).expect("at most a chunk")];
        match self.image.read_exact_at(&mut content, bytes.start) {
            Ok(()) if content.iter().all(|&byte| byte == 0) => Before::Zeroes,
            Ok(()) => Before::Bytes(content.into()),
            Err(error) => {
                tracing::warn!(offset = bytes.start, %error, "a protected disk cannot be read; it cannot go back either");
                Before::Unreadable(error.to_string())
            }
        }
    }
}

impl Shared {
    /// Waits for something to do; nothing when the disk is no longer protected.
    fn next_job(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            let stretch = state.stretch;
            let protected = state.protected.as_ref()?;
            if let Some(chunks) = protected.missing(self.limit) {
                return Some(Job {
                    stretch,
                    image: protected.image.clone(),
                    chunks: chunks.map(|chunk| (chunk, protected.bytes_of(chunk))).collect(),
                });
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Keeps what was `read`, and tells the disk if it need not wait any more. Returns whom to ask for a checkpoint, if
    /// that is needed now.
    fn keep(&self, stretch: u64, read: Vec<(u64, Before)>) -> Option<CheckpointSoon> {
        let mut state = self.state();
        if state.stretch != stretch {
            return None;
        }
        let protected = state.protected.as_mut()?;
        for (chunk, before) in read {
            protected.logs.keep(chunk, before);
        }
        if protected.logs.first_missing(protected.wanted.clone()).is_none() {
            self.tell();
        }
        let half_full = protected.logs.bytes() >= self.limit / 2;
        let ask = half_full && !protected.asked;
        protected.asked = half_full;
        ask.then(|| protected.soon.clone())
    }
}

impl Protected {
    /// The next chunks that a request waits for, a few at a time, if there is space to keep them.
    fn missing(&self, limit: usize) -> Option<Range<u64>> {
        let space = limit.saturating_sub(self.logs.bytes());
        let first = self.logs.first_missing(self.wanted.clone())?;
        let end = self.wanted.end.min(first + COPY_CHUNKS);
        (space as u64 >= COPY_BYTES).then_some(first..end)
    }
}
