//! Bringing a standby up to date while the guest runs.
//!
//! ```text
//!  what changed ─► guest memory is copied to the shadow ─► the shadow is sent      again, until little changes meanwhile
//! ```
//! What is sent is read from the shadow, not from memory, in which the guest may write: so shadow and standby have the same
//! in every page, whatever it is. What the guest changes from the last round on is in the first cut.

use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cutover_devices::GuestMemory;
use cutover_devices::virtio::net::MacTable;
use cutover_migration::epoch::Part;
use cutover_migration::epoch::source::{Link, Replica};
use cutover_migration::pages::{PAGE_BYTES, PageBits, WORD_PAGES};
use cutover_migration::transport::Security;
use cutover_migration::vm::{Image, Reservation};
use cutover_snapshot::spec::{MacAddr, MemorySpec};

use super::disks::{Disks, taken};
use super::request::StandbyAddress;
use super::shipping::{Seeded, SharedCuts, Standby};
use crate::dirty::{Baseline, Consumer};
use crate::job::Context;
use crate::migration::{MemoryImage, MovingDisks, memory_shape, numbered, reservation, security};
use crate::snapshot::Filling;
use crate::{Error, memory, page_fault};

/// Most rounds. A guest that changes as much in the last as in the first has a large first epoch.
const ROUNDS_MAX: usize = 12;

/// So few pages end them: an epoch may have as many.
const FEW_PAGES: u64 = 2000;

/// A standby to be brought up to date.
pub struct Seeding {
    memory: GuestMemory,
    spec: MemorySpec,
    changes: Consumer,
    disks: MovingDisks,
    reservation: Reservation,
    group: Arc<MacTable>,
    /// What still fills memory, if the VM was restored.
    filling: Filling,
    to: StandbyAddress,
    security: Security,
    /// Whether nobody wants it any more.
    cancel: Arc<AtomicBool>,
}

impl Seeding {
    /// Of the VM of `context`, whose memory is `filling` yet, with a standby at `to`; not any more once `cancel` is set.
    ///
    /// # Errors
    /// KVM does not tell what changes, or this host has no certificate there.
    pub fn of(
        context: &Context<'_>,
        filling: Filling,
        group: &[MacAddr],
        to: &StandbyAddress,
        cancel: Arc<AtomicBool>,
    ) -> Result<Self, Error> {
        let machine = context.machine;
        let image = MemoryImage::of(machine.memory());
        let disks = MovingDisks::of(&machine.devices);
        Ok(Self {
            memory: machine.memory().clone(),
            spec: context.spec.memory.clone(),
            changes: machine.tracker.register(Baseline::Nothing)?,
            reservation: reservation(
                context.spec,
                context.incarnation.saturating_add(1),
                machine.memory(),
                &machine.cpu_needs(),
                iter::once(memory_shape(image.pages())).chain(disks.shapes()).collect(),
            ),
            disks,
            group: Arc::new(group.iter().copied().collect()),
            filling,
            security: security(to.tls.as_deref())?,
            to: to.clone(),
            cancel,
        })
    }

    /// Does it, and counts bytes in `sent`. Returns when all is sent but what changed meanwhile. From its connection on,
    /// `lost` is told if the standby is.
    ///
    /// # Errors
    /// The standby cannot be reached, refuses the VM or is lost, or there is no memory for the shadow.
    pub fn run(self, sent: &AtomicU64, lost: Box<dyn FnOnce(String) + Send>) -> Result<(Standby, Seeded), Error> {
        // Memory that is not there yet cannot be told from what is zero.
        self.filling.wait(&|| !self.cancel.load(Ordering::Relaxed));
        let shadow = memory::map(&MemorySpec {
            shared: false,
            hugepages: false,
            ..self.spec
        })?;
        let shadow: Arc<dyn Image> = Arc::new(MemoryImage::of(&shadow));
        let link = Link {
            to: &self.to.endpoint,
            security: &self.security,
            options: self.to.link.clone(),
            // It is confined as the thread that starts it.
            on_thread: Arc::new(|| {}),
            let_go: self.cancel.clone(),
            lost,
        };
        let replica = Replica::connect(&self.reservation, link)?;
        self.pre_copy(&replica, &shadow, sent)?;
        replica.seeded()?;
        let cuts = SharedCuts::new(shadow);
        let standby = Standby {
            replica,
            cuts: cuts.clone(),
        };
        let seeded = Seeded {
            changes: self.changes,
            cuts,
            disks: Disks::Watched {
                moving: self.disks,
                left: Vec::new(),
            },
            group: self.group,
            to: self.to.endpoint.to_string(),
        };
        Ok((standby, seeded))
    }

    fn pre_copy(&self, replica: &Replica, shadow: &Arc<dyn Image>, sent: &AtomicU64) -> Result<(), Error> {
        let guest = MemoryImage::of(&self.memory);
        for round in 0..ROUNDS_MAX {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(cutover_migration::Error::Cancelled.into());
            }
            let mut pages = take(&self.changes)?;
            if round == 0 && self.filling.external.is_none() {
                // After the take: what is touched from here on is in the next one.
                pages.subtract(&numbered(&page_fault::untouched(&self.memory)?));
            }
            copy(&guest, &**shadow, &pages)?;
            let written = taken(&self.disks, round == 0)?;
            let few = [&pages].into_iter().chain(&written).map(PageBits::len).sum::<u64>() <= FEW_PAGES;
            let disks = written.into_iter().zip(self.disks.images());
            let parts = iter::once((pages, shadow.clone()))
                .chain(disks)
                .map(|(pages, image)| Part {
                    pages,
                    content: Arc::new(image),
                    base: None,
                });
            let parts: Vec<_> = parts.collect();
            sent.fetch_add(replica.round(parts)?.wire_bytes, Ordering::Relaxed);
            if round > 0 && few {
                break;
            }
        }
        Ok(())
    }
}

/// The pages that changed since this was last asked.
///
/// # Errors
/// KVM does not tell.
pub fn take(changes: &Consumer) -> Result<PageBits, Error> {
    let taken = changes.take()?;
    let pages = numbered(&taken);
    taken.commit();
    Ok(pages)
}

/// Has `pages` of `to` contain what they do in `from`.
///
/// # Errors
/// One of them lacks some of the pages.
pub fn copy(from: &dyn Image, to: &dyn Image, pages: &PageBits) -> Result<(), Error> {
    let mut piece = Vec::new();
    for range in pages.ranges() {
        for first in range.clone().step_by(usize::try_from(WORD_PAGES).expect("few pages")) {
            let part = first..range.end.min(first + WORD_PAGES);
            piece.resize(
                usize::try_from(part.end - part.start).expect("few pages") * PAGE_BYTES,
                0,
            );
            let copied = from
                .read(part.clone(), &mut piece)
                .and_then(|()| to.write(part, &piece));
            copied.map_err(Error::os("copy guest memory"))?;
        }
    }
    Ok(())
}
