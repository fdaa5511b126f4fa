//! Making a snapshot, up to the moment it is of: what is done while the guest still runs, and what while it stands.
//!
//! ```text
//!  prepare    take what changed ─► leave out what was never touched ─► write-protect       the guest runs
//!  freeze     stop ─► take the rest ─► write-protect that ─► save state ─► hold disks ─► run
//!             └───────────────────────── the pause ─────────────────────────────────┘
//! ```
//! Where pages cannot be write-protected, memory is copied before the guest runs again.

use std::sync::Arc;
use std::time::Instant;

use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::image::PageSource;
use cutover_snapshot::manifest::CpuNeeds;
use cutover_snapshot::spec::VmSpec;
use cutover_snapshot::writer::Draft;
use jiff::Timestamp;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::at_cut::Chain;
use super::base::Base;
use super::disks::HeldDisks;
use super::filling::Filling;
use super::job::Status;
use super::memory::{self, StillMemory};
use super::output::Output;
use super::request::{Disks, Kind, Method, SnapshotRequest};
use crate::Error;
use crate::dirty::{PAGE_SIZE, PageSet, Taken};
use crate::machine::Machine;
use crate::page_fault::{self, CopyOnWrite, Unavailable};
use crate::reclaim::Kept;
use crate::state::MachineState;

/// Most rounds of protecting, while the guest runs, what it wrote during the round before.
const ROUNDS_MAX: usize = 4;

/// So few pages end these rounds: at the pause, protecting them takes a fraction of a millisecond.
const FEW_PAGES: u64 = 64;

/// What a snapshot begins with.
pub struct Inputs {
    /// What is asked for.
    pub request: SnapshotRequest,
    /// The VM.
    pub spec: VmSpec,
    /// Its memory.
    pub memory: GuestMemory,
    /// What it is built on, or what the next one is.
    pub base: Arc<Base>,
    /// The chain it continues or begins, if that decides what `request` leaves open.
    pub chain: Option<Chain>,
    /// What still fills memory and disks, if the VM was restored.
    pub filling: Filling,
    /// Has nothing of memory be discarded.
    pub kept: Kept,
    /// What the page-fault thread calls first.
    pub on_fault_thread: OnThread,
    /// What threads that copy call first.
    pub on_copy_thread: OnThread,
    /// When it was asked for.
    pub started: Instant,
}

/// A snapshot of a guest that may be stopped now.
pub struct Prepared {
    inputs: Inputs,
    output: Output,
    /// What changed up to the preparation.
    taken: Vec<Taken>,
    /// What is to be saved, as far as that is known.
    pages: PageSet,
    protection: Result<CopyOnWrite, Unavailable>,
}

/// All that a snapshot has, of a guest that may go on.
pub struct Frozen {
    /// What it began with.
    pub inputs: Inputs,
    /// Where it goes.
    pub output: Output,
    /// To be committed when it is permanent.
    pub taken: Vec<Taken>,
    /// Memory that is not written yet.
    pub memory: Option<Box<dyn PageSource + Send>>,
    /// Bytes of memory, written or not.
    pub memory_bytes: u64,
    /// Disks.
    pub disks: HeldDisks,
    /// Everything else.
    pub state: MachineState,
    /// How memory is copied, and why not behind the running guest.
    pub method: (Method, Option<String>),
    /// How long the guest stood still, in ns.
    pub pause_ns: u64,
}

impl Inputs {
    /// Does what can be done while the guest runs.
    ///
    /// # Errors
    /// The snapshot cannot be written where it should, or KVM does not tell what changed.
    pub fn prepare(mut self, status: &Status) -> Result<Prepared, Error> {
        // Memory that is not there yet cannot be told from what is zero; disks cannot be copied, or referred to, before they
        // are complete and have their names.
        self.filling.wait(&|| status.check().is_ok());
        status.check()?;
        if let Some(chain) = &self.chain {
            self.request.kind = chain.kind_of_next(&self.base)?;
        }
        let output = Output::begin(&self.request, self.draft()?)?;
        if self.request.disks == Disks::Copied {
            self.base.disks.settle(|id| output.takes_whole_disk(id));
        }
        let protection = CopyOnWrite::arm(&self.memory, self.on_fault_thread.clone());
        let protection = protection.map(|protection| protection.keeping(self.kept.clone()));
        let first = self.base.memory.take()?;
        let mut pages = (*first).clone();
        if self.request.kind == Kind::Full {
            pages.fill();
            // What another process has yet to fill is untouched, and not zero.
            if self.filling.external.is_none() {
                // After the take: what is touched from here on is in the next one.
                pages.subtract(&page_fault::untouched(&self.memory)?);
            }
        }
        let mut taken = vec![first];
        if let Ok(protection) = &protection {
            protection.protect(&pages)?;
            self.protect_again(protection, &mut pages, &mut taken)?;
        }
        Ok(Prepared {
            inputs: self,
            output,
            taken,
            pages,
            protection,
        })
    }

    /// Protects what the guest wrote while the rest was protected, so that the pause finds little of that; adds it to
    /// `pages` and to what was `taken`.
    fn protect_again(
        &self,
        protection: &CopyOnWrite,
        pages: &mut PageSet,
        taken: &mut Vec<Taken>,
    ) -> Result<(), Error> {
        for _ in 0..ROUNDS_MAX {
            let written = self.base.memory.take()?;
            protection.protect(&written)?;
            pages.union(&written);
            let count = written.len();
            taken.push(written);
            if count <= FEW_PAGES {
                break;
            }
        }
        Ok(())
    }

    fn draft(&self) -> Result<Draft, Error> {
        let parent = self.base.parent(self.request.kind, &self.request.target)?;
        Ok(Draft {
            created: Timestamp::now(),
            parent,
            spec: self.spec.clone(),
            memory: memory::regions(&self.memory),
            cpu: CpuNeeds::default(),
        })
    }

    /// Pages of the whole memory.
    fn pages_total(&self) -> u64 {
        let bytes: u64 = self.memory.iter().map(|region| region.len()).sum();
        bytes / PAGE_SIZE
    }
}

impl Prepared {
    /// Stops the guest of `machine` if it `runs`, keeps what it is at that moment, and lets it go on. Also if that fails.
    ///
    /// # Errors
    /// KVM does not tell what changed or does not give its state, or memory had to be copied and could not be written.
    pub fn freeze(self, machine: &Machine, runs: bool) -> Result<Frozen, Error> {
        let stopped = Instant::now();
        if runs {
            machine.stop();
        }
        let frozen = machine.save().and_then(|state| self.keep(machine, state));
        if runs {
            machine.run();
        }
        let pause = if runs { stopped.elapsed().as_nanos() } else { 0 };
        Ok(Frozen {
            pause_ns: u64::try_from(pause).unwrap_or(u64::MAX),
            ..frozen?
        })
    }

    /// Whether memory is copied behind the running guest.
    ///
    /// # Errors
    /// The guest would stand still until all is copied.
    pub fn check_behind(&self) -> Result<(), Error> {
        match &self.protection {
            Ok(_) => Ok(()),
            Err(why) => Err(Error::OnlyWhilePaused(why.to_string())),
        }
    }

    /// Protects what the guest wrote since it was prepared, while it still runs: the pause has less to do then.
    ///
    /// # Errors
    /// KVM does not tell what changed, or pages cannot be protected.
    pub fn catch_up(&mut self) -> Result<(), Error> {
        match &self.protection {
            Ok(protection) => self.inputs.protect_again(protection, &mut self.pages, &mut self.taken),
            Err(_) => Ok(()),
        }
    }

    /// Keeps what the stopped `machine` is, of which vCPUs and devices have this `state`.
    ///
    /// # Errors
    /// As of [`freeze`](Self::freeze).
    pub fn keep(self, machine: &Machine, mut state: MachineState) -> Result<Frozen, Error> {
        // Clones have metadata of their own, or none: what is told to one VM, such as its credentials, is not for another.
        state.devices.metadata = None;
        let Self {
            inputs,
            mut output,
            mut taken,
            mut pages,
            protection,
        } = self;
        let at = Timestamp::now();
        let last = inputs.base.memory.take()?;
        pages.union(&last);
        taken.push(last);
        let memory_bytes = memory::bytes_of(&pages);
        output.stopped(at, state.cpu_needs());
        let disks = match inputs.request.disks {
            Disks::Copied => {
                let whole = |id: &str| output.takes_whole_disk(id);
                inputs.base.disks.hold(&machine.devices, whole)?
            }
            Disks::Referenced => HeldDisks::default(),
        };
        let (source, method) = match protection {
            Ok(protection) => {
                protection.freeze(pages)?;
                let source: Box<dyn PageSource + Send> = Box::new(protection.into_source());
                (Some(source), (Method::CopyOnWrite, None))
            }
            Err(why) => {
                let SnapshotRequest { kind, compress, .. } = inputs.request;
                let mut source = StillMemory::new(&inputs.memory, &pages);
                output.memory(kind, compress, inputs.pages_total(), &mut source)?;
                (None, (Method::Paused, Some(why.to_string())))
            }
        };
        Ok(Frozen {
            inputs,
            output,
            taken,
            memory: source,
            memory_bytes,
            disks,
            state,
            method,
            pause_ns: 0,
        })
    }
}

impl Frozen {
    /// Pages of the whole memory.
    pub fn pages_total(&self) -> u64 {
        self.inputs.pages_total()
    }
}
