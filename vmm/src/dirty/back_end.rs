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
use super::ring::RING_ENTRIES;
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
    /// It does not stop a vCPU in time.
    #[error(
        "it stopped the guest that tried it when {used} of the {RING_ENTRIES} entries of its ring were used, and loses \
         pages when it is later than that"
    )]
    Late {
        /// Entries that were used.
        used: usize,
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
        self.settle_by(probe::probe, events)
    }

    /// As [`settle`](Self::settle), where `probe` tells what is exact.
    fn settle_by(self, probe: impl Fn(BackEnd) -> Result<BackEnd, Error>, events: &EventLog) -> Result<BackEnd, Error> {
        match self {
            Self::Bitmap => Ok(BackEnd::Bitmap),
            Self::Ring => probe(BackEnd::Ring),
            Self::Scan => probe(BackEnd::Scan),
            Self::Auto => Ok(probe(BackEnd::Ring).unwrap_or_else(|error| {
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

#[cfg(test)]
mod tests {
    //! Which back end is used, whatever the host offers.

    use super::*;

    fn nothing_is_exact(back_end: BackEnd) -> Result<BackEnd, Error> {
        Err(Error::DirtyLog {
            log: back_end,
            reason: Unfit::Stuck,
        })
    }

    #[test]
    fn what_is_asked_for_is_used_where_it_is_exact() {
        let events = EventLog::default();
        for (asked, back_end) in [
            (DirtyLog::Bitmap, BackEnd::Bitmap),
            (DirtyLog::Ring, BackEnd::Ring),
            (DirtyLog::Scan, BackEnd::Scan),
            (DirtyLog::Auto, BackEnd::Ring),
        ] {
            assert_eq!(asked.settle_by(Ok, &events).unwrap(), back_end);
        }
        assert!(events.since(0).events.is_empty());
    }

    #[test]
    fn what_is_not_exact_is_refused_by_name() {
        let events = EventLog::default();
        for (asked, name) in [(DirtyLog::Ring, "ring"), (DirtyLog::Scan, "scan")] {
            let text = asked.settle_by(nothing_is_exact, &events).unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("--dirty-log {name} cannot be used here: ")),
                "{text}"
            );
        }
        assert!(events.since(0).events.is_empty());
    }

    #[test]
    fn the_bitmap_replaces_what_nobody_insists_on_and_an_event_says_why() {
        let events = EventLog::default();
        let settled = DirtyLog::Auto.settle_by(nothing_is_exact, &events).unwrap();
        assert_eq!(settled, BackEnd::Bitmap);
        let told = events.since(0).events;
        assert!(matches!(&told[..], [event] if matches!(event.kind, EventKind::DirtyLogFallback { .. })));
    }
}
