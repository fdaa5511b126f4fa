//! Rounds of pre-copy: each sends what the guest wrote during the one before, until the policy has enough of it.
//!
//! ```text
//!  dirty ─► send_round ─► dirty ─► heat: what is hot waits ─► policy ─┬─ Continue, Throttle ─► the next round
//!                                                                     ├─ Stop, PostCopy ─────► what is left
//!                                                                     └─ GiveUp ─────────────► an error
//! ```

use std::time::{Duration, Instant};

use super::{Session, count, ns};
use crate::error::Error;
use crate::heat::Heat;
use crate::message::{ToDestination, ToSource};
use crate::pages::PageBits;
use crate::policy::{Decision, Measured, Policy};
use crate::report::RoundReport;
use crate::status::Phase;
use crate::streams::Sent;
use crate::vm::SourceVm;

/// How long the destination may take to have pages in place that were sent, as long as it says that it works: those of
/// disks have to be permanent.
const APPLY_MAX: Duration = Duration::from_secs(300);
/// How long it may say nothing meanwhile: so long may pages be on their way that the system has taken to send them.
const APPLY_SILENCE_MAX: Duration = Duration::from_secs(60);
/// Messages and answers while the guest stands still.
const STOP_ROUND_TRIPS: u32 = 2;
/// What stopping a guest and restoring it there is expected to take besides.
const STOP: Duration = Duration::from_millis(3);

/// What is left when the rounds are over.
pub(super) struct Left {
    /// Pages of each image.
    pub(super) pages: Vec<PageBits>,
    /// Whether those of memory may follow when the guest runs there (post-copy).
    pub(super) may_follow: bool,
}

/// How rounds went, as far as it says something about the stop phase.
#[derive(Default)]
struct Pace {
    /// What a page took last time that there were some, without what was waited for a limit.
    page_ns: u64,
    sent_pages_per_second: u64,
}

impl Session<'_> {
    /// Sends pages while the guest runs, until so few are left that it may be stopped, or it may run without them.
    pub(super) fn pre_copy(&mut self, vm: &mut dyn SourceVm) -> Result<Left, Error> {
        let mut pages = dirty(vm)?;
        // After that: what is written while they are compared is in the next ones.
        self.leave_out_older(vm, &mut pages)?;
        let mut policy = Policy::new(self.request.options.clone());
        let mut heat = pages.first().map(|first| Heat::new(first.pages()));
        let mut pace = Pace::default();
        let mut deferred = None;
        let mut throttle = 0;
        loop {
            let began = Instant::now();
            let (mut round, busy) = self.send_round(&pages, false)?;
            let mut left = dirty(vm)?;
            round.took_ns = ns(began.elapsed());
            round.dirtied_pages = count(&left);
            round.deferred_pages = deferred.as_ref().map_or(0, PageBits::len);
            round.throttle_percent = throttle;
            if let (Some(heat), Some(first)) = (&mut heat, left.first_mut()) {
                heat.record(first);
                if let Some(deferred) = &deferred {
                    first.union(deferred);
                }
                self.report.deferred_pages_saved = heat.saved_pages();
            }
            pace.note(&round, busy, self.outgoing.bytes_per_second().is_some());
            let measured = self.measured(&pace, &round, count(&left));
            self.note_round(round, &measured);
            match policy.decide(&measured) {
                Decision::Continue => (),
                Decision::Throttle(percent) => {
                    vm.throttle(percent).map_err(Error::vm("slow the guest down"))?;
                    throttle = percent;
                    self.request.status.update(|progress| progress.throttle = percent);
                    self.report.throttle_percent_max = self.report.throttle_percent_max.max(percent);
                }
                decision @ (Decision::Stop | Decision::PostCopy) => {
                    return Ok(Left {
                        pages: left,
                        may_follow: decision == Decision::PostCopy,
                    });
                }
                Decision::GiveUp(reason) => return Err(Error::NoConvergence(reason.to_string())),
            }
            deferred = match (&mut heat, left.first_mut()) {
                (Some(heat), Some(first)) => Some(heat.defer(first, policy.deferrable_pages(&measured))),
                _ => None,
            };
            pages = left;
        }
    }

    /// Sends `pages` as the next round, and waits until they are in place unless it is the last one: then the state
    /// follows at once. Returns also how long the streams worked for it.
    pub(super) fn send_round(&mut self, pages: &[PageBits], last: bool) -> Result<(RoundReport, Duration), Error> {
        self.round += 1;
        let number = self.round;
        let began = Instant::now();
        self.request.status.step(|progress| {
            progress.phase = if last { Phase::Stopping } else { Phase::PreCopy };
            progress.round = number;
            progress.pages_left = count(pages);
        });
        self.note_duplicates(pages);
        self.link.send(&ToDestination::Round { number, last })?;
        let connection = self.link.connection();
        let sent = self
            .outgoing
            .send_round(connection, number, pages, self.request.status)?;
        if !last {
            let all_sent = Instant::now();
            match self
                .link
                .receive_from_busy("RoundApplied", APPLY_SILENCE_MAX, APPLY_MAX)?
            {
                ToSource::RoundApplied { number: applied } if applied == number => (),
                other => return Err(Error::unexpected("RoundApplied", &other)),
            }
            // What took longer once, such as the first answer of a process that had just started, need not again.
            self.round_trip = self.round_trip.min(all_sent.elapsed());
        }
        let Sent {
            pages,
            wire_bytes,
            busy,
        } = sent;
        let round = RoundReport {
            took_ns: ns(began.elapsed()),
            pages,
            wire_bytes,
            ..RoundReport::default()
        };
        Ok((round, busy))
    }

    /// What the policy decides by.
    fn measured(&self, pace: &Pace, round: &RoundReport, pages_left: u64) -> Measured {
        Measured {
            rounds: self.round,
            pages_left,
            dirty_pages_per_second: round.dirty_pages_per_second(),
            sent_pages_per_second: pace.sent_pages_per_second,
            page_ns: pace.page_ns,
            fixed_ns: ns(STOP + self.round_trip * STOP_ROUND_TRIPS),
        }
    }

    fn note_round(&mut self, round: RoundReport, measured: &Measured) {
        self.request.status.update(|progress| {
            progress.bytes_per_second = round.bytes_per_second();
            progress.dirty_pages_per_second = measured.dirty_pages_per_second;
            progress.expected_downtime = Some(measured.expected_downtime());
        });
        if round.throttle_percent > 0 {
            self.report.throttled_ns += round.took_ns;
        }
        self.report.add_round(round);
    }

    fn note_duplicates(&mut self, pages: &[PageBits]) {
        for (sent, pages) in self.sent_before.iter_mut().zip(pages) {
            let mut again = pages.clone();
            again.intersect(sent);
            self.report.duplicate_pages += again.len();
            sent.union(pages);
        }
    }
}

impl Pace {
    /// What `round` says, in which the streams worked for `busy`, under a limit or not.
    fn note(&mut self, round: &RoundReport, busy: Duration, limited: bool) {
        // Under a limit the round is as long as the limit has it; without one, also what the link takes counts.
        let took_ns = if limited { ns(busy) } else { round.took_ns };
        if let Some(page_ns) = took_ns.checked_div(round.pages.total()) {
            self.page_ns = page_ns;
            self.sent_pages_per_second = round.sent_pages_per_second();
        }
    }
}

fn dirty(vm: &mut dyn SourceVm) -> Result<Vec<PageBits>, Error> {
    vm.dirty().map_err(Error::vm("learn which pages have changed"))
}
