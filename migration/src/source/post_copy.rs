//! The rest of a guest's memory, which follows while the guest runs at the destination.
//!
//! ```text
//!  thread "migration"        push: what is left ═══ stream 0 ════════════════════════════►
//!                                     │ left │            (within the bandwidth limit)
//!  thread "migration-pull"   answer: what is wanted, at once ═══ a stream of its own ════►
//! ```
//! What is wanted is sent even if it was pushed: it may wait in that stream behind a lot that nobody waits for. It can be
//! wanted before the destination says that it runs the VM: to run it may take some of its memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::missing::Missing;
use super::{Session, ns};
use crate::error::Error;
use crate::link::SourceLink;
use crate::message::{PULL_ROUND, ToSource, WANTED_MAX};
use crate::options::Options;
use crate::pages::PageBits;
use crate::report::RoundReport;
use crate::status::{Phase, Status};
use crate::streams::{OnThread, Outgoing, Sent};
use crate::transport::Connection;

/// How long nothing may be wanted: longer than any memory takes to be pushed.
const WANT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the destination may take to put the last pages in place.
const COMPLETE_MAX: Duration = Duration::from_secs(60);
/// Pages that are pushed at a time.
const PUSH_PAGES: u64 = 64;

/// Answers what the destination wants, on a thread of its own. Ends when nothing more is wanted, or it is dropped.
pub(super) struct Answers {
    left: Arc<Mutex<Missing>>,
    broken: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Answered, Error>>>,
}

/// What is known of a VM of which the destination has not said that it has all of it.
pub(super) enum Failure {
    /// It has not, and will not.
    Lost(Error),
    /// All was sent.
    Unknown(Error),
}

/// What was wanted.
#[derive(Clone, Copy, Debug, Default)]
struct Answered {
    pages: u64,
    wire_bytes: u64,
    longest: Duration,
}

impl Answers {
    /// Begins to answer what is asked on `pull`; `missing` is what the destination lacks, of the first image that
    /// `outgoing` has.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn begin(
        mut pull: Connection,
        mut outgoing: Outgoing,
        missing: PageBits,
        on_thread: OnThread,
    ) -> Result<Self, Error> {
        let left = Arc::new(Mutex::new(Missing::new(missing)));
        let broken = Arc::new(AtomicBool::new(false));
        pull.watch_nothing();
        pull.watch(Arc::clone(&broken));
        outgoing.stop_deltas();
        let (shared, flag) = (Arc::clone(&left), Arc::clone(&broken));
        let body = move || {
            on_thread();
            let answered = answer_all(SourceLink::new(pull), outgoing, &shared);
            if answered.is_err() {
                flag.store(true, Ordering::Relaxed);
            }
            answered
        };
        let thread = thread::Builder::new().name("migration-pull".to_owned()).spawn(body);
        Ok(Self {
            left,
            broken,
            thread: Some(thread.map_err(Error::Thread)?),
        })
    }

    fn join(&mut self) -> Result<Answered, Error> {
        let thread = self.thread.take().expect("it is joined once");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.broken.store(true, Ordering::Relaxed);
            // It was not wanted: whatever came of it.
            drop(self.join());
        }
    }
}

impl Session<'_> {
    /// Sends the rest of memory. From here on the VM is lost if either side is.
    pub(super) fn post_copy(&mut self, mut answers: Answers) -> Result<(), Failure> {
        let began = Instant::now();
        let left = lock(&answers.left).len();
        self.request.status.step(|progress| {
            progress.phase = Phase::PostCopy;
            progress.pages_left = left;
        });
        self.outgoing.stop_deltas();
        self.outgoing.limit_again(self.request.options);
        self.link.connection().watch(Arc::clone(&answers.broken));
        let pushed = self.push(&answers.left);
        let completed = pushed.as_ref().map_or(Ok(()), |_| self.complete());
        if pushed.is_err() || completed.is_err() {
            answers.broken.store(true, Ordering::Relaxed);
        }
        // What ended one has ended the other: the first error is that of whoever was not told to end.
        let (sent, answered) = match (pushed, answers.join()) {
            (Ok(sent), Ok(answered)) => (sent, answered),
            (Ok(_), Err(Error::Cancelled)) => return Err(Failure::Lost(completed.err().unwrap_or(Error::Cancelled))),
            (Err(Error::Cancelled) | Ok(_), Err(error)) | (Err(error), _) => return Err(Failure::Lost(error)),
        };
        // The destination has asked for the last time, and was answered.
        completed.map_err(Failure::Unknown)?;
        self.report.wire_bytes += answered.wire_bytes;
        self.report.pages_pulled = answered.pages;
        self.report.pull_ns_max = ns(answered.longest);
        self.report.add_round(RoundReport {
            took_ns: ns(began.elapsed()),
            pages: sent.pages,
            wire_bytes: sent.wire_bytes + answered.wire_bytes,
            ..RoundReport::default()
        });
        Ok(())
    }

    /// Waits until the destination has everything, also what it has asked for.
    fn complete(&mut self) -> Result<(), Error> {
        match self.link.receive("Complete", COMPLETE_MAX)? {
            ToSource::Complete => Ok(()),
            other => Err(Error::unexpected("Complete", &other)),
        }
    }

    /// Pushes what is left, until nothing is.
    fn push(&mut self, left: &Mutex<Missing>) -> Result<Sent, Error> {
        let number = self.round + 1;
        let status = self.request.status;
        let most = PUSH_PAGES.min(self.outgoing.pages_at_once());
        let link = self.link.connection();
        let mut sent = Sent::default();
        loop {
            let ranges = lock(left).take(most);
            if ranges.is_empty() {
                break;
            }
            sent += self.outgoing.send_ranges(link, number, &ranges, status)?;
        }
        sent += self.outgoing.end_round(link, number, status)?;
        Ok(sent)
    }
}

fn answer_all(mut link: SourceLink, mut outgoing: Outgoing, left: &Mutex<Missing>) -> Result<Answered, Error> {
    let status = Status::default();
    let mut answered = Answered::default();
    loop {
        let pages = match link.receive("Want", WANT_MAX)? {
            ToSource::Want { pages } => pages,
            other => return Err(Error::unexpected("Want", &other)),
        };
        let asked = Instant::now();
        if pages.is_empty() {
            outgoing.end_round(link.connection(), PULL_ROUND, &status)?;
            return Ok(answered);
        }
        let wanted = wanted(pages, lock(left).image_pages())?;
        lock(left).want(&wanted);
        let ranges: Vec<Range<u64>> = wanted.ranges().collect();
        let sent = outgoing.send_ranges(link.connection(), PULL_ROUND, &ranges, &status)?;
        answered.pages += sent.pages.total();
        answered.wire_bytes += sent.wire_bytes;
        answered.longest = answered.longest.max(asked.elapsed());
    }
}

/// The pages that are wanted of a memory of `total`, each once.
fn wanted(pages: Vec<u64>, total: u64) -> Result<PageBits, Error> {
    let invalid = |reason: String| Error::Invalid { what: "Want", reason };
    if pages.len() > WANTED_MAX {
        return Err(invalid(format!("{} pages are more than {WANTED_MAX}", pages.len())));
    }
    let mut set = PageBits::empty(total);
    for page in pages {
        if page >= total {
            return Err(invalid(format!("page {page} of {total}")));
        }
        set.insert(page);
    }
    Ok(set)
}

fn lock(left: &Mutex<Missing>) -> MutexGuard<'_, Missing> {
    left.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the stream for what is wanted is: one, and without a limit.
pub(super) fn pull_options(options: &Options) -> Options {
    Options {
        streams: 1,
        bandwidth: None,
        ..options.clone()
    }
}
