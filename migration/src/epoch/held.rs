//! Epochs that a standby has and that are not permanent yet.
//!
//! ```text
//!  applied │ n+1  n+2  …  last │         each complete and verified; numbers grow, and may be left out
//!          └─ take_next ► applied        └─ add
//! ```

use std::collections::VecDeque;

use cutover_snapshot::section::State;

use crate::error::Error;
use crate::streams::HeldBatch;

/// An epoch.
pub struct HeldEpoch {
    /// Its number.
    pub number: u64,
    /// The state at its cut.
    pub state: State,
    /// Its pages.
    pub batches: Vec<HeldBatch>,
    /// Bytes of memory that it takes.
    pub bytes: u64,
}

/// See the module.
pub struct Held {
    epochs: VecDeque<HeldEpoch>,
    bytes: u64,
    bytes_max: u64,
    /// The cut that the image is at, or will be as soon as what was taken is applied; 0 before the first.
    applied: u64,
    /// Whether nothing is added any more.
    is_closed: bool,
}

impl Held {
    /// None, with room until they are `bytes_max`.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            epochs: VecDeque::new(),
            bytes: 0,
            bytes_max,
            applied: 0,
            is_closed: false,
        }
    }

    /// Whether one more may come.
    pub fn has_room(&self) -> bool {
        self.bytes < self.bytes_max
    }

    /// Whether an epoch with this number may come next.
    ///
    /// # Errors
    /// It is none that follows what is here, or there is no room.
    pub fn check_next(&self, number: u64) -> Result<(), Error> {
        let last = self.epochs.back().map_or(self.applied, |last| last.number);
        if number <= last {
            return Err(invalid(format!("its number is {number}, after {last}")));
        }
        if !self.has_room() {
            return Err(invalid(format!(
                "it is number {number}, where {} bytes are held and {} may be",
                self.bytes, self.bytes_max
            )));
        }
        Ok(())
    }

    /// Keeps an epoch.
    ///
    /// # Errors
    /// As of [`check_next`](Self::check_next), or nobody [wants](Self::close) one any more.
    pub fn add(&mut self, epoch: HeldEpoch) -> Result<(), Error> {
        if self.is_closed {
            return Err(Error::Cancelled);
        }
        self.check_next(epoch.number)?;
        self.bytes += epoch.bytes;
        self.epochs.push_back(epoch);
        Ok(())
    }

    /// Whether the image is at `cut`, or can be.
    ///
    /// # Errors
    /// It is beyond it, or that epoch is not here.
    pub fn check_cut(&self, action: &'static str, cut: u64) -> Result<(), Error> {
        let no_such = |reason| Error::NoSuchCut { action, cut, reason };
        if cut < self.applied {
            return Err(no_such(format!("it is at cut {} already", self.applied)));
        }
        if cut == 0 || (cut != self.applied && self.epochs.iter().all(|epoch| epoch.number != cut)) {
            let held: Vec<u64> = self.epochs.iter().map(|epoch| epoch.number).collect();
            return Err(no_such(format!(
                "it is at cut {} and holds the epochs {held:?}",
                self.applied
            )));
        }
        Ok(())
    }

    /// The next epoch up to `cut`, which is to be applied.
    pub fn take_next(&mut self, cut: u64) -> Option<HeldEpoch> {
        self.epochs.front().filter(|epoch| epoch.number <= cut)?;
        let epoch = self.epochs.pop_front()?;
        self.applied = epoch.number;
        self.bytes -= epoch.bytes;
        Some(epoch)
    }

    /// Drops those after `cut`.
    ///
    /// # Errors
    /// Some of them are applied: that is not undone.
    pub fn drop_after(&mut self, cut: u64) -> Result<(), Error> {
        if cut < self.applied {
            return Err(Error::NoSuchCut {
                action: "go back to cut",
                cut,
                reason: format!("it is at cut {} already", self.applied),
            });
        }
        self.epochs.retain(|epoch| epoch.number <= cut);
        self.bytes = self.epochs.iter().map(|epoch| epoch.bytes).sum();
        Ok(())
    }

    /// From here on nothing is added.
    pub fn close(&mut self) {
        self.is_closed = true;
    }

    /// Whether nothing is added any more.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }
}

fn invalid(reason: String) -> Error {
    Error::Invalid {
        what: "an epoch",
        reason,
    }
}
