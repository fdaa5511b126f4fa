//! The two VMs of a migration, as this crate sees them: what the `vmm` crate implements, and tests make up.
//!
//! ```text
//!  source                                              destination
//!  SourceVm ── reservation ──────────────────────────► DestinationHost::reserve ─► DestinationVm
//!     ├─ images ─► Image ── read ══ streams ══ write ─► Image ◄─ images ─┤
//!     ├─ dirty, throttle                                                 │
//!     ├─ stop ──── Stopped{dirty, state} ───────────────────── restore ──┤
//!     ├─ hand_over            ════ Handoff ════                          │
//!     └─ gone ◄────────────────── Running ──────────────────────── run ──┘
//! ```
//! What moves is a list of images: arrays of pages, of which guest memory is one and each disk that moves another.
//! Memory that is handed over by descriptor is none of them, for it does not move.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cutover_snapshot::manifest::{CpuNeeds, MemoryRegion};
use cutover_snapshot::section::{Sections, State};
use cutover_snapshot::spec::VmSpec;
use serde::{Deserialize, Serialize};

use crate::pages::PageBits;

/// What went wrong in the VM or its host; its message says in full what and where.
pub type VmError = Box<dyn StdError + Send + Sync>;

/// Descriptors that are handed over within one host, by what they are of, such as `memory` or `net0`.
pub type Descriptors = BTreeMap<String, OwnedFd>;

/// Name of the image of guest memory; those of disks have the disks' ids with `disk-` before.
pub const MEMORY_IMAGE: &str = cutover_snapshot::manifest::MEMORY_IMAGE;

/// An array of pages of [`PAGE_BYTES`](crate::pages::PAGE_BYTES) each: guest memory, or a disk that moves with the VM.
///
/// Pages of memory are numbered as in a snapshot: the regions one after the other, without gaps. Several threads use an
/// image at a time, each other pages of it.
pub trait Image: Send + Sync {
    /// How many pages it has.
    fn pages(&self) -> u64;

    /// Copies `pages` to `into`, which is as long as they are. What the guest writes meanwhile may be there in part: then
    /// these pages are dirty.
    ///
    /// # Errors
    /// The image lacks some of the pages, or could not be read.
    fn read(&self, pages: Range<u64>, into: &mut [u8]) -> io::Result<()>;

    /// Has `pages` contain `content`, which is as long as they are.
    ///
    /// # Errors
    /// The image lacks some of the pages, or could not be written.
    fn write(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()>;

    /// Has `pages` be zero; pages that were never touched stay so.
    ///
    /// # Errors
    /// The image lacks some of the pages, or could not be written.
    fn zero(&self, pages: Range<u64>) -> io::Result<()>;

    /// Whether all of it was zero when it was made: pages that nobody writes are so still. If not, it is an older copy.
    fn starts_empty(&self) -> bool;

    /// Has what was written be permanent, if it is something that lasts.
    ///
    /// # Errors
    /// It could not be written.
    fn settle(&self) -> io::Result<()>;
}

/// What a host has to have for the VM to run there. Nothing of it is trusted: the host checks all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Which incarnation of the VM the destination will be: one more than the source is. Handoff names it again.
    pub generation: u64,
    /// Which program the source is.
    pub monitor: String,
    /// The VM.
    pub spec: VmSpec,
    /// Where guest memory lies, in order of addresses.
    pub memory: Vec<MemoryRegion>,
    /// What the guest has seen of its CPU.
    pub cpu: CpuNeeds,
    /// What moves, in the order of [`SourceVm::images`].
    pub images: Vec<ImageShape>,
}

/// An image that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageShape {
    /// [`MEMORY_IMAGE`], or `disk-` and the disk's id; unique.
    pub name: String,
    /// Pages it has.
    pub pages: u64,
    /// Bytes it has; of a disk the last page may have some that the disk has not.
    pub bytes: u64,
    /// How many of them may not be zero, as far as the source can tell: what a disk needs room for.
    pub data: u64,
}

/// The VM that moves away. All calls come from one thread.
pub trait SourceVm {
    /// What the destination has to have.
    fn reservation(&self) -> Reservation;

    /// What is handed over by descriptor, if the destination is on this host; empty if nothing can be.
    ///
    /// # Errors
    /// A descriptor could not be had.
    fn descriptors(&self) -> Result<Descriptors, VmError>;

    /// What moves; the same at each call. Memory, if it is there, is the first.
    fn images(&self) -> Vec<Arc<dyn Image>>;

    /// For each image the pages that changed since the last call; the first time, all that may not be zero. What is
    /// written from here on is in the next answer.
    ///
    /// # Errors
    /// KVM does not tell what changed.
    fn dirty(&mut self) -> Result<Vec<PageBits>, VmError>;

    /// Has each vCPU stand still for `percent` (0 to 99) of the time; 0 undoes it.
    ///
    /// # Errors
    /// Not to be had.
    fn throttle(&mut self, percent: u8) -> Result<(), VmError>;

    /// Stops the guest: from here on nothing changes.
    ///
    /// # Errors
    /// The state could not be saved.
    fn stop(&mut self) -> Result<Stopped, VmError>;

    /// Nothing came of it: the guest goes on as if nothing had been, at full speed, if it ran before. Pages that were
    /// dirty are so again for whoever migrates it next. Called at most once, before anything was handed over, or after
    /// the destination has said that it does not run the VM.
    fn resume(&mut self);

    /// Lets go of what only one of the two may have (locks of disks). From here on the VM does not go on by itself.
    ///
    /// # Errors
    /// It could not; then the VM goes on here.
    fn hand_over(&mut self) -> Result<(), VmError>;

    /// This VM does not go on by itself.
    fn gone(&mut self, outcome: &Outcome);
}

/// A guest that was stopped to be moved.
#[derive(Debug)]
pub struct Stopped {
    /// For each image the pages that changed since the last [`dirty`](SourceVm::dirty).
    pub dirty: Vec<PageBits>,
    /// Everything else.
    pub state: Sections,
    /// When the vCPUs stopped: the downtime counts from here.
    pub at: Instant,
}

/// What became of a VM that was handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs at the destination.
    RunsThere,
    /// The answer never came: it runs at the destination, or nowhere. Somebody has to look, and say so here.
    Unknown {
        /// What happened to the link.
        reason: String,
    },
    /// It ran at the destination before all of its memory was there, and that cannot be had any more.
    Lost {
        /// What happened.
        reason: String,
    },
}

/// A host that takes in a VM.
pub trait DestinationHost {
    /// What it makes of a reservation.
    type Vm: DestinationVm;

    /// Builds the VM, stopped and empty. Nothing is visible from outside before it runs. Its memory `may_follow` when it
    /// runs already (post-copy).
    ///
    /// # Errors
    /// All reasons why it cannot run here; nothing is left behind.
    fn reserve(
        &mut self,
        reservation: &Reservation,
        handed: Descriptors,
        may_follow: bool,
    ) -> Result<Self::Vm, Vec<String>>;
}

/// A VM that moves in. Dropped, it leaves nothing behind.
pub trait DestinationVm {
    /// What a VM that runs is to its owner.
    type Running;

    /// What moves in, in the order of the reservation.
    fn images(&self) -> Vec<Arc<dyn Image>>;

    /// Takes over the state. From here on `missing` pages of memory are those that will come while the guest runs: the
    /// answer is where they go. (Without any, nothing comes any more, and the answer is none.)
    ///
    /// # Errors
    /// The state is not that of this VM, or this host cannot take it.
    fn restore(&mut self, state: &State, missing: Option<PageBits>)
    -> Result<Option<Arc<dyn ArrivingMemory>>, VmError>;

    /// Runs it: it was handed over. Tells also when its vCPUs were told to.
    ///
    /// # Errors
    /// Something that only one of the two may have could not be had. No guest instruction was executed, and none ever
    /// will be.
    fn run(self) -> Result<(Self::Running, Instant), VmError>;
}

/// Memory of a guest that runs though not all of it is there (post-copy).
pub trait ArrivingMemory: Send + Sync {
    /// Pages that the guest waits for and nobody was told of yet; waits for one until `patience` is over.
    fn wanted(&self, patience: Duration) -> Vec<u64>;

    /// `pages` contain `content`; those that are there already keep what they have.
    ///
    /// # Errors
    /// The kernel refused.
    fn arrive(&self, pages: Range<u64>, content: &[u8]) -> io::Result<()>;

    /// `pages` are zero; those that are there already keep what they have.
    ///
    /// # Errors
    /// The kernel refused.
    fn arrive_zero(&self, pages: Range<u64>) -> io::Result<()>;

    /// Everything is there.
    fn complete(&self);

    /// Nothing will come any more: the guest cannot go on.
    fn lost(&self, reason: &str);
}
