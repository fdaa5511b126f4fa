//! Pages on their way from guest memory to an image.

use cutover_devices::GuestMemory;
use cutover_snapshot::image::Pages;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::dirty::{PAGE_SIZE, PageRange};

/// Copies of pages, up to a limit.
pub struct Batch {
    /// Has room for all, and grows to what is used: a batch is made while the guest stands still, and memory that is
    /// not touched costs nothing then.
    bytes: Vec<u8>,
    room: usize,
    used: usize,
    runs: Vec<Run>,
}

/// Pages that follow each other in the image and in the batch.
#[derive(Clone, Copy)]
struct Run {
    first: u64,
    offset: usize,
    bytes: usize,
}

impl Batch {
    /// An empty one, with room for `pages` pages.
    pub fn with_room_for(pages: u64) -> Self {
        Self {
            bytes: Vec::with_capacity(bytes_of(pages)),
            room: bytes_of(pages),
            used: 0,
            runs: Vec::new(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Whether there is no room left.
    pub fn is_full(&self) -> bool {
        self.used == self.room
    }

    /// Whether at most half of the room is left.
    pub fn is_half_full(&self) -> bool {
        self.used >= self.room / 2
    }

    /// Copies the pages of `range`, for which there is room, from `memory`; the first has number `first` in the image.
    ///
    /// # Errors
    /// There are no such pages.
    pub fn add(&mut self, memory: &GuestMemory, range: PageRange, first: u64) -> Result<(), GuestMemoryError> {
        let run = Run {
            first,
            offset: self.used,
            bytes: bytes_of(range.pages),
        };
        let end = run.offset + run.bytes;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        memory.read_slice(&mut self.bytes[run.offset..end], GuestAddress(range.start))?;
        self.used = end;
        match self.runs.last_mut() {
            Some(last) if last.first + last.bytes as u64 / PAGE_SIZE == first => last.bytes += run.bytes,
            _ => self.runs.push(run),
        }
        Ok(())
    }

    /// Brings them in the order of the image, last first, as they come from [`next`](Self::next).
    pub fn sort(&mut self) {
        self.runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.first));
    }

    /// The next pages. With the last ones the room is free again.
    pub fn next(&mut self) -> Option<Pages<'_>> {
        let run = self.runs.pop()?;
        if self.runs.is_empty() {
            self.used = 0;
        }
        Some(Pages {
            first: run.first,
            bytes: &self.bytes[run.offset..][..run.bytes],
        })
    }
}

fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages * PAGE_SIZE).expect("a batch is small")
}
