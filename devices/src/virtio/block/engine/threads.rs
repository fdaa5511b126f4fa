//! The engine for hosts without io_uring: a few threads, each of which does one operation at a time.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Completion, Operation};
use crate::OnThread;

/// Threads of one disk: the most operations its host sees at once.
const THREADS: usize = 4;

/// See the module. Dropping it lets the threads finish what was submitted.
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    prepared: Vec<Job>,
}

struct Shared {
    work: Mutex<Work>,
    /// Jobs came, or the end.
    changed: Condvar,
    /// Counts completions since the last reaping.
    completed: EventFd,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<Job>,
    completions: Vec<Completion>,
    ending: bool,
}

struct Job {
    token: u16,
    operation: Operation,
    image: RawFd,
    iovecs: *const libc::iovec,
    count: libc::c_int,
}

// SAFETY: whoever prepared the job keeps the image open and the vector and its memory, which any thread may use, in
// place.
unsafe impl Send for Job {}

impl Threads {
    /// Threads, each of which calls `on_thread` first.
    pub fn new(on_thread: &OnThread) -> io::Result<Self> {
        let completed = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared {
            work: Mutex::default(),
            changed: Condvar::new(),
            completed,
        });
        let mut threads = Self {
            shared,
            workers: Vec::new(),
            prepared: Vec::new(),
        };
        for index in 0..THREADS {
            let (shared, on_thread) = (threads.shared.clone(), on_thread.clone());
            let worker = std::thread::Builder::new()
                .name(format!("disk-io-{index}"))
                .stack_size(crate::THREAD_STACK_SIZE)
                .spawn(move || {
                    on_thread();
                    shared.run();
                })?;
            threads.workers.push(worker);
        }
        Ok(threads)
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
        let count = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
        self.prepared.push(Job {
            token,
            operation,
            image: image.as_raw_fd(),
            iovecs: iovecs.as_ptr(),
            count,
        });
        Ok(())
    }

    pub fn submit(&mut self) {
        if !self.prepared.is_empty() {
            self.shared.lock().jobs.extend(self.prepared.drain(..));
            self.shared.changed.notify_all();
        }
    }

    pub fn reap(&mut self, completions: &mut Vec<Completion>) {
        // Fails only if nothing was completed, which is then seen below.
        let _ = self.shared.completed.read();
        completions.append(&mut self.shared.lock().completions);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's life.
    fn run(&self) {
        while let Some(job) = self.next_job() {
            let result = job.perform();
            self.lock().completions.push(Completion {
                token: job.token,
                result,
            });
            if let Err(error) = self.completed.write(1) {
                tracing::error!(%error, "cannot report a completed disk operation");
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut work = self.lock();
        loop {
            match work.jobs.pop_front() {
                Some(job) => return Some(job),
                None if work.ending => return None,
                None => work = self.changed.wait(work).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Job {
    fn perform(&self) -> io::Result<usize> {
        let count = match self.operation {
            Operation::Read { offset } => {
                let offset = offset.try_into().map_err(io::Error::other)?;
                // SAFETY: whoever prepared the job keeps the vector and its memory in place.
                unsafe { libc::preadv(self.image, self.iovecs, self.count, offset) }
            }
            Operation::Write { offset, durable } => {
                let offset = offset.try_into().map_err(io::Error::other)?;
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                unsafe { libc::pwritev2(self.image, self.iovecs, self.count, offset, flags) }
            }
            Operation::Sync => return Ok(rustix::fs::fdatasync(self.image()).map(|()| 0)?),
            Operation::Allocate { mode, offset, len } => {
                return Ok(rustix::fs::fallocate(self.image(), mode, offset, len).map(|()| 0)?);
            }
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    fn image(&self) -> BorrowedFd<'_> {
        // SAFETY: whoever prepared the job keeps the image open.
        unsafe { BorrowedFd::borrow_raw(self.image) }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // A panic of the worker was reported by the panic hook when it happened.
            let _ = worker.join();
        }
    }
}

impl AsFd for Threads {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `completed` owns its descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.shared.completed.as_raw_fd()) }
    }
}
