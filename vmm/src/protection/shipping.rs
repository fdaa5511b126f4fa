//! The thread "checkpoint": brings a standby up to date, then sends it cut after cut, behind the running guest.
//!
//! ```text
//!  Seed        rounds: what changed ─► shadow ─► standby, until little changes in a round
//!  Ship(n)     pages of cut n, as what differs from the shadow with the valid cuts before n over it ─► Notice::Holds(n)
//!  Apply(n)    the shadow is what memory was at cut n
//!  RolledBack  the standby forgets later cuts
//! ```
//! Work is done in order. What the standby has is at any time the shadow and the cuts that were shipped.

use std::iter;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use cutover_devices::virtio::net::MacTable;
use cutover_devices::{OnThread, THREAD_STACK_SIZE};
use cutover_migration::epoch::source::Replica;
use cutover_migration::epoch::{Epoch, Part};
use cutover_migration::vm::Image;
use cutover_snapshot::section::{SectionWriter, Sections};

use super::cuts::Cuts;
use super::disks::Disks;
use super::request::Notice;
use super::seeding::Seeding;
use super::taking::Frozen;
use crate::Error;
use crate::control::{JobStep, Mailbox, Reply};
use crate::dirty::Consumer;
use crate::migration::{MOMENT, Moment};

/// The cuts of a VM, which its state driver takes and this thread ships.
#[derive(Clone)]
pub struct SharedCuts(Arc<Mutex<Cuts<Frozen>>>);

impl SharedCuts {
    /// None yet, of a VM whose standby has the content of `shadow`.
    pub fn new(shadow: Arc<dyn Image>) -> Self {
        Self(Arc::new(Mutex::new(Cuts::new(shadow))))
    }

    /// For the moment of a look; while the shadow is brought up to date, for as long as that takes.
    pub fn lock(&self) -> MutexGuard<'_, Cuts<Frozen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread is to do.
pub enum Work {
    /// Bring a standby up to date; the [outcome](SeedingDone) goes to the state driver.
    Seed(Box<Seeding>, Reply<()>),
    /// Send it this cut, which is valid.
    Ship(u64),
    /// Bring the shadow of these to this cut, which is permanent.
    Apply(u64, SharedCuts),
    /// The VM went back to this cut.
    RolledBack(u64),
    /// There is no standby any more.
    Leave,
}

/// What came of seeding a standby, with the way to whoever asked for it.
pub struct SeedingDone {
    /// How the VM is protected from here on.
    pub outcome: Result<Seeded, Error>,
    /// Whoever asked.
    pub reply: Reply<()>,
}

/// A VM whose standby is up to date but for an epoch.
pub struct Seeded {
    /// Tells what changed since the standby has what it has.
    pub changes: Consumer,
    /// No cut yet.
    pub cuts: SharedCuts,
    /// Disks, of which the same holds.
    pub disks: Disks,
    /// Addresses of all members.
    pub group: Arc<MacTable>,
    /// Where the standby is.
    pub to: String,
}

/// The state driver's end of the thread. Dropping it has the thread give up whatever it does, and waits for that.
pub struct Shipping {
    // In the order they are to be dropped.
    work: Option<Sender<Work>>,
    /// Has it give up whatever it says to the standby.
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Bytes sent to standbys.
    sent: Arc<AtomicU64>,
}

impl Shipping {
    /// Starts the thread, which calls `on_thread` first. What it notices goes to `notices`.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(mailbox: &Arc<Mailbox>, notices: Sender<Notice>, on_thread: OnThread) -> Result<Self, Error> {
        let (work, received) = channel();
        let sent = Arc::<AtomicU64>::default();
        let mut thread = Thread {
            driver: mailbox.clone(),
            notices,
            sent: sent.clone(),
            standby: None,
        };
        let thread = thread::Builder::new()
            .name("checkpoint".to_owned())
            .stack_size(THREAD_STACK_SIZE)
            .spawn(move || {
                on_thread();
                thread.serve(&received);
            })
            .map_err(Error::os("create the thread that ships checkpoints"))?;
        Ok(Self {
            work: Some(work),
            cancel: Arc::default(),
            thread: Some(thread),
            sent,
        })
    }

    /// Has the thread do this, after all it was told before.
    pub fn enqueue(&self, work: Work) {
        if let Some(queue) = &self.work {
            // A thread that is gone has panicked, which whoever joins it reports.
            let _ = queue.send(work);
        }
    }

    /// Has it give up what it says to the standby, if anything, and have none any more.
    pub fn leave(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        self.enqueue(Work::Leave);
    }

    /// What makes it give up the next standby.
    pub fn next_standby(&mut self) -> Arc<AtomicBool> {
        self.cancel = Arc::default();
        self.cancel.clone()
    }

    /// Bytes sent to standbys.
    pub fn sent_bytes(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Shipping {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        self.work = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that ships checkpoints panicked");
        }
    }
}

struct Thread {
    driver: Arc<Mailbox>,
    notices: Sender<Notice>,
    sent: Arc<AtomicU64>,
    standby: Option<Standby>,
}

/// A standby that is up to date but for what is still to be shipped.
pub struct Standby {
    /// The way there.
    pub replica: Replica,
    /// What is to be shipped, and what it has.
    pub cuts: SharedCuts,
}

impl Thread {
    fn serve(&mut self, work: &Receiver<Work>) {
        while let Ok(work) = work.recv() {
            let outcome = match work {
                Work::Seed(seeding, reply) => {
                    self.seed(*seeding, reply);
                    Ok(())
                }
                Work::Ship(number) => self.ship(number),
                Work::Apply(number, cuts) => cuts.lock().make_permanent(number),
                Work::RolledBack(cut) => self.tell_rolled_back(cut),
                Work::Leave => {
                    self.standby = None;
                    Ok(())
                }
            };
            if let Err(error) = outcome {
                self.standby = None;
                // What goes wrong with the link is told by it, unless nobody wants it any more.
                if !matches!(error, Error::Migration(_)) {
                    notify(&self.notices, Notice::StandbyLost(in_full(&error)));
                }
            }
        }
    }

    fn seed(&mut self, seeding: Seeding, reply: Reply<()>) {
        self.standby = None;
        let notices = self.notices.clone();
        let lost = Box::new(move |reason| notify(&notices, Notice::StandbyLost(reason)));
        let outcome = seeding.run(&self.sent, lost).map(|(standby, seeded)| {
            self.standby = Some(standby);
            seeded
        });
        self.driver.step(JobStep::Protection(SeedingDone { outcome, reply }));
    }

    /// Sends cut `number`; tells that the standby holds it, unless nobody wants it any more by then.
    fn ship(&mut self, number: u64) -> Result<(), Error> {
        if let Some(standby) = &self.standby
            && let Some(wire_bytes) = standby.ship(number)?
        {
            self.sent.fetch_add(wire_bytes, Ordering::Relaxed);
            notify(&self.notices, Notice::Holds(number));
        }
        Ok(())
    }

    fn tell_rolled_back(&self, cut: u64) -> Result<(), Error> {
        match &self.standby {
            Some(standby) => Ok(standby.replica.roll_back(cut)?),
            None => Ok(()),
        }
    }
}

fn notify(notices: &Sender<Notice>, notice: Notice) {
    // Whoever does not listen any more has dropped the protection, or is about to.
    let _ = notices.send(notice);
}

/// What went wrong, and why.
pub fn in_full(error: &Error) -> String {
    let causes = iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

impl Standby {
    /// Sends cut `number`, if it is wanted yet; returns how many bytes that took, if it still is.
    fn ship(&self, number: u64) -> Result<Option<u64>, Error> {
        let (pages, epoch) = {
            let cuts = self.cuts.lock();
            let Ok((pages, before, frozen)) = cuts.to_ship(number) else {
                // The VM went back before its turn came.
                return Ok(None);
            };
            let state = self.sections(frozen)?;
            let memory = Part {
                pages: pages.numbers().clone(),
                content: pages.clone(),
                base: Some(Arc::new(before)),
            };
            let disks = frozen.disks.iter().map(|disk| Part {
                pages: disk.written(),
                content: disk.clone(),
                base: None,
            });
            let parts = iter::once(memory).chain(disks).collect();
            (pages, Epoch { number, parts, state })
        };
        let sent = self.replica.ship(epoch)?;
        let mut cuts = self.cuts.lock();
        Ok(cuts.wanted(&pages).map(|frozen| {
            // Nobody reads them any more.
            frozen.disks.clear();
            sent.wire_bytes
        }))
    }

    fn sections(&self, frozen: &Frozen) -> Result<Sections, Error> {
        let mut state = Sections::default();
        frozen.state.write(&mut state)?;
        let moment = Moment::since(self.replica.reserved_at(), frozen.at, frozen.ran);
        state.section(MOMENT, &moment)?;
        Ok(state)
    }
}
