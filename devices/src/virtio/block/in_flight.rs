//! One request on its way: from what the guest asks to what the host is told, step by step until it can be answered.
//!
//! A step is one host operation; a short read or write, or a refused way to write zeroes, makes for another one.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use vm_memory::{Bytes, GuestAddress};

use super::disk::Disk;
use super::engine::Operation;
use super::request::{Request, Status};
use crate::GuestMemory;
use crate::stats::DiskCounters;
use crate::virtio::queue::{Chain, QueueError};

/// A request the device has taken and not answered.
pub struct InFlight {
    request: Result<Request, Status>,
    chain: Chain,
    /// The disk may get another image while the request is under way.
    image: Arc<File>,
    status_address: GuestAddress,
    operation: Operation,
    /// Bytes of the chain's writable part that are filled.
    written: usize,
}

/// What has to be done next about a request.
pub enum Step {
    /// Have the host do this; then call [`InFlight::finish_operation`].
    Do(Operation, InFlight),
    /// Tell the guest.
    Answer {
        /// The request.
        request: InFlight,
        /// How it ended.
        status: Status,
        /// Bytes of the chain's writable part that were filled, with the status.
        written: usize,
        /// What the host's disk said, if it failed.
        error: Option<RequestError>,
    },
}

/// A request the host's disk did not fulfil.
#[derive(Debug, thiserror::Error)]
#[error("{operation:?}: {source}")]
pub struct RequestError {
    operation: Operation,
    source: io::Error,
}

/// Space is taken from inside the image: its size never changes.
const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO_RANGE: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

impl InFlight {
    /// The first step of `request`, which came in `chain`.
    pub fn begin(
        chain: Chain,
        status_address: GuestAddress,
        request: Result<Request, Status>,
        disk: &Disk,
        writes_are_durable: bool,
    ) -> Result<Step, QueueError> {
        let mut in_flight = Self {
            request,
            chain,
            image: disk.file().clone(),
            status_address,
            operation: Operation::Sync,
            written: 0,
        };
        let operation = match request {
            Err(status) => return Ok(in_flight.answer(status)),
            Ok(Request::GetId) => {
                in_flight.written = in_flight.chain.writable.copy_from(0, disk.serial())?;
                return Ok(in_flight.answer(Status::Ok));
            }
            Ok(Request::Read { offset, .. }) => Operation::Read { offset },
            Ok(Request::Write { offset, .. }) => Operation::Write {
                offset,
                durable: writes_are_durable,
            },
            Ok(Request::Flush) => Operation::Sync,
            Ok(Request::Discard { offset, len }) => Operation::Allocate {
                mode: PUNCH_HOLE,
                offset,
                len,
            },
            Ok(Request::WriteZeroes { offset, len, unmap }) => Operation::Allocate {
                mode: if unmap { PUNCH_HOLE } else { ZERO_RANGE },
                offset,
                len,
            },
        };
        Ok(in_flight.do_or_answer(operation))
    }

    /// The step after the host did the last one.
    pub fn finish_operation(mut self, result: io::Result<usize>) -> Step {
        let count = match result {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Step::Do(self.operation, self),
            Err(error) => return self.fail_operation(error),
        };
        match self.operation {
            Operation::Read { .. } if count == 0 => self.fail_operation(io::ErrorKind::UnexpectedEof.into()),
            Operation::Write { .. } if count == 0 => self.fail_operation(io::ErrorKind::WriteZero.into()),
            Operation::Read { offset } => {
                self.chain.writable.mark_written(count);
                self.chain.writable.advance(count);
                self.written += count;
                self.do_or_answer(Operation::Read {
                    offset: offset + count as u64,
                })
            }
            Operation::Write { offset, durable } => {
                self.chain.readable.advance(count);
                self.do_or_answer(Operation::Write {
                    offset: offset + count as u64,
                    durable,
                })
            }
            Operation::Sync | Operation::Allocate { .. } => self.answer(Status::Ok),
        }
    }

    /// Index of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.chain.head
    }

    /// Where the current operation, once it is under way, may change the image.
    pub fn bytes_changed(&self) -> Option<Range<u64>> {
        match self.operation {
            Operation::Write { offset, .. } => Some(offset..offset + self.chain.readable.len() as u64),
            Operation::Allocate { offset, len, .. } => Some(offset..offset + len),
            Operation::Read { .. } | Operation::Sync => None,
        }
    }

    /// What it works on.
    pub fn image(&self) -> BorrowedFd<'_> {
        self.image.as_fd()
    }

    /// Counts how it ended.
    pub fn count(&self, status: Status, counters: &DiskCounters) {
        match &self.request {
            Ok(request) if status == Status::Ok => request.count(counters),
            Ok(_) | Err(_) => counters.failed.add(1),
        }
    }

    /// The memory the current operation is about.
    pub fn iovecs(&self) -> &[libc::iovec] {
        match self.operation {
            Operation::Read { .. } => self.chain.writable.iovecs(),
            Operation::Write { .. } => self.chain.readable.iovecs(),
            Operation::Sync | Operation::Allocate { .. } => &[],
        }
    }

    /// Writes the byte the driver finds at the end of its chain.
    pub fn write_status(&self, memory: &GuestMemory, status: Status) -> Result<(), QueueError> {
        Ok(memory.write_obj(status as u8, self.status_address)?)
    }

    /// The chain, to be used for another request.
    pub fn into_chain(self) -> Chain {
        self.chain
    }

    /// `operation`, unless there is no data left for it.
    fn do_or_answer(mut self, operation: Operation) -> Step {
        self.operation = operation;
        let nothing_left = match operation {
            Operation::Read { .. } | Operation::Write { .. } => self.iovecs().is_empty(),
            Operation::Allocate { len, .. } => len == 0,
            Operation::Sync => false,
        };
        if nothing_left {
            self.answer(Status::Ok)
        } else {
            Step::Do(operation, self)
        }
    }

    fn fail_operation(mut self, source: io::Error) -> Step {
        let unsupported = source.raw_os_error() == Some(libc::EOPNOTSUPP);
        match self.operation {
            // tmpfs can make holes but not zeroed ranges; both read as zeroes.
            Operation::Allocate {
                mode: ZERO_RANGE,
                offset,
                len,
            } if unsupported => {
                self.operation = Operation::Allocate {
                    mode: PUNCH_HOLE,
                    offset,
                    len,
                };
                Step::Do(self.operation, self)
            }
            Operation::Allocate { .. } if unsupported => self.answer(Status::Unsupported),
            operation => {
                if matches!(operation, Operation::Read { .. }) {
                    // It may have failed after it had filled some of the buffers.
                    self.chain.writable.mark_written(self.chain.writable.len());
                }
                let error = Some(RequestError { operation, source });
                let written = self.written + 1;
                Step::Answer {
                    request: self,
                    status: Status::IoError,
                    written,
                    error,
                }
            }
        }
    }

    fn answer(self, status: Status) -> Step {
        let written = self.written + 1;
        Step::Answer {
            request: self,
            status,
            written,
            error: None,
        }
    }
}
