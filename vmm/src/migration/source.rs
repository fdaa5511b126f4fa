//! The VM that moves away, as the thread "migration" sees it: what changes in its memory it finds out itself, for what
//! only the state driver may do it asks that.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use cutover_devices::GuestMemory;
use cutover_migration::pages::PageBits;
use cutover_migration::vm::{
    Descriptors, Image, ImageShape, MEMORY_IMAGE, Outcome, Reservation, SourceVm, Stopped, VmError,
};
use cutover_snapshot::error::SectionError;
use cutover_snapshot::manifest::CpuNeeds;
use cutover_snapshot::section::{Payload, Section, SectionWriter, Sections};
use cutover_snapshot::spec::VmSpec;
use serde::{Deserialize, Serialize};

use super::disks::MovingDisks;
use super::handed;
use super::job::{Answer, Step};
use super::memory::{MemoryImage, numbered};
use super::request::{MigrateRequest, MigratedDisks};
use crate::Error;
use crate::control::{JobStep, Mailbox};
use crate::cpu::Throttle;
use crate::device_manager::DiskFlusher;
use crate::dirty::{Baseline, Consumer, Layout, PAGE_SIZE};
use crate::job::Context;
use crate::page_fault;
use crate::snapshot;
use crate::state::MachineState;

/// Name of the section of [`Moment`].
pub const MOMENT: &str = "migration";

/// What a migration has besides the state of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Whether the guest ran; if not, it is paused, and stays so.
    pub runs: bool,
    /// How long after the reservation was asked for the guest's clocks were read, in ns. The destination knows how long
    /// ago it was asked by its own clock, and with that the time that has passed since: the hosts' clocks need not agree.
    pub after_ns: u64,
}

impl Moment {
    /// That of a guest whose clocks were read `at` a time, and which `runs` or does not; the destination was asked for a
    /// reservation when it was `reserved`.
    pub fn since(reserved: Instant, at: Instant, runs: bool) -> Self {
        let after = at.saturating_duration_since(reserved);
        Self {
            runs,
            after_ns: u64::try_from(after.as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

impl Section for Moment {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

/// A guest that stands still to be handed over.
pub struct Still {
    /// Its state, but for memory and disks.
    pub state: MachineState,
    /// Whether it ran before.
    pub ran: bool,
    /// When its vCPUs were stopped.
    pub at: Instant,
}

/// What the VM is that is to move.
pub struct Subject {
    /// Its spec.
    pub spec: VmSpec,
    /// Which incarnation it will be.
    pub incarnation: u64,
    /// Its memory.
    pub memory: GuestMemory,
    /// What the guest has seen of its CPU.
    pub cpu: CpuNeeds,
    /// What is handed over by descriptor.
    pub handed: Descriptors,
    /// Tells what changes in its memory, unless that is handed over; has told nothing yet.
    pub changes: Option<Consumer>,
    /// Slows the guest down, until this is dropped.
    pub throttle: Throttle,
    /// Its disks, if another host is to see them.
    pub disks: Option<DiskFlusher>,
    /// Disks that move with it.
    pub moving: MovingDisks,
    /// Whether another process fills its memory: then untouched pages may not be zero.
    pub filled_from_outside: bool,
}

impl Subject {
    /// The VM of `context`, which is to move as `request` says.
    ///
    /// # Errors
    /// KVM does not tell what changes, or there are no descriptors left.
    pub fn of(context: &Context<'_>, request: &MigrateRequest, filled_from_outside: bool) -> Result<Self, Error> {
        let (machine, to) = (context.machine, &request.to);
        let handed = handed::descriptors(machine, to, filled_from_outside)?;
        let changes = match handed::has_memory(&handed) {
            true => None,
            false => Some(machine.tracker.register(Baseline::Nothing)?),
        };
        Ok(Self {
            spec: context.spec.clone(),
            incarnation: context.incarnation.saturating_add(1),
            memory: machine.memory().clone(),
            cpu: machine.cpu_needs(),
            handed,
            changes,
            throttle: machine.throttle(),
            disks: (!to.is_on_this_host()).then(|| machine.devices.disk_flusher()),
            moving: match request.disks {
                MigratedDisks::Shared => MovingDisks::default(),
                MigratedDisks::Moved => MovingDisks::of(&machine.devices),
            },
            filled_from_outside,
        })
    }
}

/// See the module.
pub struct Source<'a> {
    subject: Subject,
    /// Memory, if it moves.
    image: Option<Arc<dyn Image>>,
    driver: &'a Mailbox,
    answers: Receiver<Answer>,
    /// When the destination was asked for a reservation.
    reserved: Cell<Instant>,
    /// Whether nobody has asked for changes yet.
    first: bool,
}

impl<'a> Source<'a> {
    /// The VM `subject`, whose state driver reads `driver` and sends `answers`.
    pub fn new(subject: Subject, driver: &'a Mailbox, answers: Receiver<Answer>) -> Self {
        Self {
            image: image_of(&subject),
            subject,
            driver,
            answers,
            reserved: Cell::new(Instant::now()),
            first: true,
        }
    }

    /// Has the state driver do something, and waits for it.
    fn ask(&self, step: Step) -> Answer {
        self.driver.step(JobStep::Migration(step));
        // Without an answer, there is no machine any more.
        self.answers
            .recv()
            .map_err(|_| Error::from(cutover_migration::Error::Cancelled))?
    }

    /// Of memory, if it moves, the pages that changed since this was last asked. The next migration begins with all of
    /// them again.
    fn take_memory(&mut self) -> Result<Option<PageBits>, Error> {
        let Some(changes) = &self.subject.changes else {
            return Ok(None);
        };
        let taken = changes.take()?;
        let pages = numbered(&taken);
        taken.commit();
        Ok(Some(pages))
    }
}

fn image_of(subject: &Subject) -> Option<Arc<dyn Image>> {
    let moves = subject.changes.is_some();
    moves.then(|| Arc::new(MemoryImage::of(&subject.memory)) as Arc<dyn Image>)
}

/// What memory of so many pages is to the destination.
pub fn memory_shape(pages: u64) -> ImageShape {
    ImageShape {
        name: MEMORY_IMAGE.to_owned(),
        pages,
        bytes: pages * PAGE_SIZE,
        data: pages * PAGE_SIZE,
    }
}

/// What another monitor has to have for incarnation `generation` of the VM of `spec`, with `images` that move.
pub fn reservation(
    spec: &VmSpec,
    generation: u64,
    memory: &GuestMemory,
    cpu: &CpuNeeds,
    images: Vec<ImageShape>,
) -> Reservation {
    Reservation {
        generation,
        monitor: concat!("cutover ", env!("CARGO_PKG_VERSION")).to_owned(),
        spec: spec.clone(),
        memory: snapshot::regions(memory),
        cpu: cpu.clone(),
        images,
    }
}

impl SourceVm for Source<'_> {
    fn reservation(&self) -> Reservation {
        let Subject {
            spec,
            incarnation,
            memory,
            cpu,
            moving,
            ..
        } = &self.subject;
        let image = self.image.iter().map(|image| memory_shape(image.pages()));
        reservation(spec, *incarnation, memory, cpu, image.chain(moving.shapes()).collect())
    }

    /// The last that is asked for before the destination is asked.
    fn descriptors(&self) -> Result<Descriptors, VmError> {
        self.reserved.set(Instant::now());
        Ok(handed::duplicate(&self.subject.handed)?)
    }

    fn images(&self) -> Vec<Arc<dyn Image>> {
        self.image.iter().cloned().chain(self.subject.moving.images()).collect()
    }

    fn dirty(&mut self) -> Result<Vec<PageBits>, VmError> {
        // Again and again, so that little is left to be flushed while the guest stands still.
        if let Some(disks) = &self.subject.disks {
            disks.flush()?;
        }
        let first = std::mem::take(&mut self.first);
        let mut memory = self.take_memory()?;
        if let Some(memory) = &mut memory
            && first
            && !self.subject.filled_from_outside
        {
            // After the take: what is touched from here on is in the next one.
            memory.subtract(&numbered(&page_fault::untouched(&self.subject.memory)?));
        }
        Ok(memory.into_iter().chain(self.subject.moving.take(first)?).collect())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmError> {
        Ok(self.subject.throttle.set(percent)?)
    }

    fn stop(&mut self) -> Result<Stopped, VmError> {
        let still = self.ask(Step::Stop)?.ok_or("the guest was not stopped")?;
        let mut memory = self.take_memory()?;
        if let Some(memory) = &mut memory {
            let layout = Layout::of(&self.subject.memory);
            // KVM would wait for them at the destination before the guest runs.
            still
                .state
                .pages_of_kvm()
                .filter_map(|address| layout.number(address))
                .for_each(|page| memory.insert(page));
        }
        let mut state = Sections::default();
        still.state.write(&mut state)?;
        let moment = Moment::since(self.reserved.get(), still.at, still.ran);
        state.section(MOMENT, &moment)?;
        Ok(Stopped {
            dirty: memory.into_iter().chain(self.subject.moving.take(false)?).collect(),
            state,
            at: still.at,
        })
    }

    fn resume(&mut self) {
        self.subject.throttle.undo();
        // Whatever it says: a VM that is gone does not go on.
        let _ = self.ask(Step::Resume);
    }

    fn hand_over(&mut self) -> Result<(), VmError> {
        self.ask(Step::HandOver)?;
        Ok(())
    }

    /// What comes of that is in what the thread reports last.
    fn gone(&mut self, _outcome: &Outcome) {}
}
