//! How long recoveries take, step by step.
//!
//! ```text
//!  last heard of ─ detect ─► Failed ─ decide ─► RollingBack ─ restore ─► Recovered ─ resume ─► all say that they run
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::engine::Report;
use crate::id::{Epoch, Seat};
use crate::message::{Stage, Standing};

/// How long a recovery took, from one step to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// The cut that all went back to.
    pub cut: Epoch,
    /// Members that failed.
    pub lost: Vec<Seat>,
    /// From the last that was heard of the first of them until it was taken for dead.
    pub detect: Duration,
    /// Until the journal said what is done.
    pub decide: Duration,
    /// Until all stood at the cut, and the journal said that they go on.
    pub restore: Option<Duration>,
    /// Until all have said that they run.
    pub resume: Option<Duration>,
}

/// Watches a group for recoveries.
#[derive(Debug, Default)]
pub(super) struct Recoveries {
    /// When each member was last heard.
    heard: BTreeMap<Seat, Instant>,
    /// Members that failed and are not replaced yet, how long that was not noticed, and when it was.
    failures: Vec<(Seat, Duration, Instant)>,
    last: Option<Recovery>,
    /// When the step began that the last one is at.
    since: Option<Instant>,
    /// Who has not said yet that it runs.
    standing_still: BTreeSet<Seat>,
}

impl Recoveries {
    /// `seat` has said where it stands.
    pub fn hear(&mut self, seat: Seat, standing: Standing) {
        if matches!(standing.stage, Stage::Empty | Stage::Whole) {
            return;
        }
        self.heard.insert(seat, Instant::now());
        let stands_still = matches!(standing.stage, Stage::GoingBack | Stage::AtCut);
        if !stands_still
            && self.standing_still.remove(&seat)
            && self.standing_still.is_empty()
            && let (Some(last), Some(since)) = (&mut self.last, self.since)
        {
            last.resume = Some(since.elapsed());
        }
    }

    /// The group has something to report; `members` are those that have its VMs.
    pub fn note(&mut self, report: &Report, members: impl Iterator<Item = Seat>) {
        let now = Instant::now();
        match report {
            // That of a standby is no reason to go back.
            Report::Failed { seat, .. } => {
                if let Some(at) = self.heard.remove(seat) {
                    self.failures.push((*seat, now - at, now));
                }
            }
            Report::RollingBack { cut } => self.begin(*cut, now),
            Report::Recovered { .. } => {
                let since = self.since.replace(now);
                if let (Some(last), Some(since)) = (&mut self.last, since) {
                    last.restore = Some(now - since);
                }
                self.standing_still = members.collect();
                self.failures.clear();
            }
            _ => {}
        }
    }

    fn begin(&mut self, cut: Epoch, now: Instant) {
        let first = self.failures.first();
        let (detect, noticed) = first.map_or((Duration::ZERO, now), |(_, unnoticed, at)| (*unnoticed, *at));
        self.last = Some(Recovery {
            cut,
            lost: self.failures.iter().map(|(seat, ..)| *seat).collect(),
            detect,
            decide: now - noticed,
            restore: None,
            resume: None,
        });
        self.since = Some(now);
        self.standing_still.clear();
    }

    /// The last one.
    pub fn last(&self) -> Option<&Recovery> {
        self.last.as_ref()
    }
}
