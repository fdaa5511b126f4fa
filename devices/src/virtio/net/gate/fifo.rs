//! Frames in the order they came, without an allocation for each.
//!
//! Frames lie one behind the other in segments, which are used again:
//!
//! ```text
//!   segments  ┌──────────────────┐ ┌──────────────────┐      spare ┌──────────────────┐
//!             │····│ 3  │ 4 │ 5 ·│ │ 6 │ 7 │··········│            │··················│
//!             └──────────────────┘ └──────────────────┘            └──────────────────┘
//!   entries          3    4   5      6   7
//! ```

use std::collections::VecDeque;

use super::super::FRAME_LEN_MAX;

/// Bytes of a segment: room for several of the longest frames.
const SEGMENT_LEN: usize = 256 << 10;
/// Most segments that are kept to be used again.
const SPARE_MAX: usize = 16;
const _: () = assert!(SEGMENT_LEN >= FRAME_LEN_MAX);

/// A queue of frames, each with a `T` that says something of it.
pub struct Fifo<T> {
    segments: VecDeque<Segment>,
    entries: VecDeque<Entry<T>>,
    spare: Vec<Segment>,
}

struct Segment {
    bytes: Box<[u8]>,
    /// Bytes in use or used up.
    filled: usize,
}

struct Entry<T> {
    about: T,
    start: usize,
    len: usize,
    /// Whether it is the first of its segment.
    begins: bool,
}

impl<T> Default for Fifo<T> {
    fn default() -> Self {
        Self {
            segments: VecDeque::new(),
            entries: VecDeque::new(),
            spare: Vec::new(),
        }
    }
}

impl<T> Fifo<T> {
    /// Bytes that it takes to keep a frame of `len` bytes.
    pub const fn cost(len: usize) -> usize {
        len + size_of::<Entry<T>>()
    }

    /// Appends a frame of `len` bytes, which `fill` puts in their place.
    ///
    /// # Errors
    /// Those of `fill`. Nothing is appended.
    ///
    /// # Panics
    /// If it is longer than [`FRAME_LEN_MAX`].
    pub fn push<E>(&mut self, len: usize, about: T, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<(), E> {
        if self.segments.back().is_none_or(|last| last.room() < len) {
            self.segments.push_back(self.spare.pop().unwrap_or_else(Segment::new));
        }
        let last = self.segments.back_mut().expect("there is one, or one was added");
        let start = last.filled;
        fill(&mut last.bytes[start..start + len])?;
        last.filled += len;
        self.entries.push_back(Entry {
            about,
            start,
            len,
            begins: start == 0,
        });
        Ok(())
    }

    /// The first frame, and what is said of it.
    pub fn first(&self) -> Option<(&T, &[u8])> {
        let (entry, segment) = (self.entries.front()?, self.segments.front()?);
        Some((&entry.about, &segment.bytes[entry.start..][..entry.len]))
    }

    /// Takes the first frame off; returns what it [cost](Self::cost).
    pub fn pop(&mut self) -> Option<usize> {
        let entry = self.entries.pop_front()?;
        if self.entries.front().is_none_or(|next| next.begins)
            && let Some(mut segment) = self.segments.pop_front()
            && self.spare.len() < SPARE_MAX
        {
            segment.filled = 0;
            self.spare.push(segment);
        }
        Some(Self::cost(entry.len))
    }

    /// What is said of the last frame.
    pub fn last(&self) -> Option<&T> {
        self.entries.back().map(|entry| &entry.about)
    }

    /// Takes the last frame off; returns what it [cost](Self::cost).
    pub fn pop_last(&mut self) -> Option<usize> {
        let entry = self.entries.pop_back()?;
        if entry.begins {
            self.segments.pop_back();
        } else if let Some(segment) = self.segments.back_mut() {
            segment.filled = entry.start;
        }
        Some(Self::cost(entry.len))
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

impl Segment {
    fn new() -> Self {
        Self {
            bytes: vec![0; SEGMENT_LEN].into(),
            filled: 0,
        }
    }

    fn room(&self) -> usize {
        self.bytes.len() - self.filled
    }
}
