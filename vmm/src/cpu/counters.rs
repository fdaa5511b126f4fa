//! Counting a vCPU's exits without slowing it down: one writer, the vCPU's thread, so that no counter needs a locked
//! instruction, in cache lines that no other vCPU writes.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::stats::VcpuExits;

/// Why a vCPU left guest mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    Interrupted,
    Failed,
}

/// The counters of one vCPU, which anyone may read.
#[derive(Default)]
#[repr(align(64))]
pub struct ExitCounters([AtomicU64; ExitKind::Failed as usize + 1]);

impl ExitCounters {
    /// Counts an exit. Only the vCPU's thread does, so nothing falls between reading and writing.
    pub fn count(&self, kind: ExitKind) {
        let counter = &self.0[kind as usize];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// All counters; those of a running vCPU may be of slightly different moments.
    pub fn read(&self) -> VcpuExits {
        let get = |kind: ExitKind| self.0[kind as usize].load(Ordering::Relaxed);
        VcpuExits {
            io_in: get(ExitKind::IoIn),
            io_out: get(ExitKind::IoOut),
            mmio_read: get(ExitKind::MmioRead),
            mmio_write: get(ExitKind::MmioWrite),
            interrupted: get(ExitKind::Interrupted),
            failed: get(ExitKind::Failed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_exit_has_a_counter_of_its_own() {
        let counters = ExitCounters::default();
        let kinds = [
            ExitKind::IoIn,
            ExitKind::IoOut,
            ExitKind::MmioRead,
            ExitKind::MmioWrite,
            ExitKind::Interrupted,
            ExitKind::Failed,
        ];
        for (times, kind) in (1..).zip(kinds) {
            (0..times).for_each(|_| counters.count(kind));
        }
        assert_eq!(
            counters.read(),
            VcpuExits {
                io_in: 1,
                io_out: 2,
                mmio_read: 3,
                mmio_write: 4,
                interrupted: 5,
                failed: 6,
            }
        );
    }
}
