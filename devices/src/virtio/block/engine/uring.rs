//! The io_uring engine: one system call submits a batch, and completions need none.
//!
//! The ring's own descriptor is what the event loop watches. It is readable only while completions wait, so a batch
//! that the page cache answered during its submission, and that was reaped at once, wakes nobody.
//!
//! Images are not registered with the ring: the kernel takes a closed ring apart some time later, and until then they
//! would stay open, and locked, after the VM's end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode};

use super::{Completion, Operation};

/// What the kernel must know; the newest of them came with 5.6, as did the way to ask.
const OPCODES: [u8; 4] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// See the module.
pub struct Uring {
    ring: IoUring,
}

impl Uring {
    /// A ring for up to `depth` operations.
    pub fn new(depth: u16) -> io::Result<Self> {
        let ring = IoUring::new(depth.into())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !OPCODES.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's io_uring is older than Linux 5.6",
            ));
        }
        Ok(Self { ring })
    }

    /// # Safety
    /// As [`Engine::prepare`](super::Engine::prepare).
    pub unsafe fn prepare(
        &mut self,
        token: u16,
        operation: Operation,
        image: BorrowedFd<'_>,
        iovecs: &[libc::iovec],
    ) -> io::Result<()> {
        let count = u32::try_from(iovecs.len()).map_err(io::Error::other)?;
        let image = Fd(image.as_raw_fd());
        let entry = match operation {
            Operation::Read { offset } => opcode::Readv::new(image, iovecs.as_ptr(), count).offset(offset).build(),
            Operation::Write { offset, durable } => opcode::Writev::new(image, iovecs.as_ptr(), count)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Operation::Sync => opcode::Fsync::new(image).flags(FsyncFlags::DATASYNC).build(),
            Operation::Allocate { mode, offset, len } => opcode::Fallocate::new(image, len)
                .offset(offset)
                .mode(mode.bits().cast_signed())
                .build(),
        };
        let entry = entry.user_data(token.into());
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the caller keeps the vector and its memory in place, and the image open.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    /// The kernel takes all it is given, or says why; what is left is submitted with the next batch.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                submitted => {
                    submitted?;
                }
            }
        }
        Ok(())
    }

    pub fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.extend(self.ring.completion().filter_map(|entry| {
            let token = u16::try_from(entry.user_data()).ok()?;
            let result = entry.result();
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            Some(Completion { token, result })
        }));
    }
}

impl AsFd for Uring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}
