//! Which of the ways to notice a guest's writes is used, and why not another.
//!
//! ```text
//!  --dirty-log   bitmap ───────────────────────────► bitmap
//!                ring, scan ──► probe ── exact ────► ring, scan        not exact: the VM does not start
//!                auto ────────► probe ring ─ exact ► ring              not exact: bitmap, and an event
//! ```

use std::fmt;
use std::io;

use super::probe;
use crate::Error;
use crate::events::{EventKind, EventLog};
use crate::page_fault::Unavailable;

/// How it is noticed what a guest writes, as far as somebody wants to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLog {
    /// By KVM's bitmap of each memory slot, which every KVM has.
    #[default]
    Bitmap,
    /// By KVM's dirty rings, or not at all.
    Ring,
    /// By a scan of page tables, or not at all.
    Scan,
    /// By KVM's dirty rings where they are exact, else by its bitmap. Not by a scan, beside which there are no live
    /// snapshots.
    Auto,
}

/// What notices the writes of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackEnd {
    /// [`kvm_log`](super::kvm_log).
    Bitmap,
    /// [`ring`](super::ring).
    Ring,
    /// [`scan`](super::scan).
    Scan,
}

/// Why a back end is not used.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// KVM is older than that.
    #[error("this host's KVM has no dirty ring (there is one since Linux 5.11)")]
    NoRing,
    /// Userfaultfd is not to be had, or not for this memory.
    #[error(transparent)]
    Unavailable(Unavailable),
    /// The kernel is older than that, or there is no `/proc`.
    #[error("the kernel does not tell which pages were written (PAGEMAP_SCAN, since Linux 6.7): {0}")]
    NoScan(io::Error),
    /// Page tables of memory that is shared come and go.
    #[error("guest memory is shared, and what was written to it can be lost with its page tables")]
    SharedMemory,
    /// It is not exact.
    #[error("it lost {lost} of {written} pages that a guest wrote to try it")]
    Lost {
        /// Pages it did not report.
        lost: u64,
        /// Pages that were written.
        written: u64,
    },
    /// It reports again what it has reported.
    #[error("it reported {pages} pages that the guest which tried it did not write")]
    Stale {
        /// How many.
        pages: u64,
    },
    /// A ring from which nothing can be taken.
    #[error("it stopped the guest that tried it because its ring was full, and there was nothing in it")]
    Stuck,
}

impl DirtyLog {
    /// The back end of a VM on this host, once it is known to be exact here.
    ///
    /// # Errors
    /// It is not, and nothing else is wanted.
    pub(crate) fn settle(self, events: &EventLog) -> Result<BackEnd, Error> {
        match self {
            Self::Bitmap => Ok(BackEnd::Bitmap),
            Self::Ring => probe::probe(BackEnd::Ring),
            Self::Scan => probe::probe(BackEnd::Scan),
            Self::Auto => Ok(probe::probe(BackEnd::Ring).unwrap_or_else(|error| {
                let reason = error.to_string();
                tracing::info!(%reason, "KVM's bitmap notices what the guest writes");
                events.push(EventKind::DirtyLogFallback { reason });
                BackEnd::Bitmap
            })),
        }
    }
}

impl fmt::Display for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bitmap => "bitmap",
            Self::Ring => "ring",
            Self::Scan => "scan",
        })
    }
}
