//! A VM made of a snapshot.
//!
//! ```text
//!  open     manifests, state, indices: every checksum but those of pages         │ meanwhile KVM makes a VM
//!  check    the host's CPU, the spec with what is different, the memory's layout │ that has nothing, which is
//!  ─────────────────────── up to here nothing else was created ───────────────────│ mostly waiting
//!  memory   mapped as it is in the file, or filled as the guest touches it       │
//!  machine  devices and vCPUs of the spec, with the saved state
//!  disks    filled behind the devices
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cutover_devices::GuestMemory;
use cutover_snapshot::chain::Chain;
use cutover_snapshot::early::EarlyPages;
use cutover_snapshot::error::Error as SnapshotError;
use cutover_snapshot::manifest::{MEMORY_IMAGE, Manifest, Parent};
use cutover_snapshot::remote::Access;
use cutover_snapshot::section::State as Sections;
use cutover_snapshot::spec::VmSpec;
use cutover_snapshot::state_file;
use cutover_snapshot::verify::verify;

use super::base::Base;
use super::disks::{self, DiskImages, Existing};
use super::filling::{Countdown, Filling};
use super::job::Snapshots;
use super::request::{RestoreRequest, Source, Trust};
use crate::control::Mailbox;
use crate::device_manager::DiskLocks;
use crate::dirty::Baseline;
use crate::driver::Options;
use crate::machine::{Machine, Reserved, confined};
use crate::page_fault::{self, ExternalMemory, LazyMemory};
use crate::seccomp::ThreadKind;
use crate::state::{self, MachineState};
use crate::{Error, bare_vm, memory, overrides};

/// A VM that is complete, but for what is still being filled.
pub struct Restored {
    /// What it is.
    pub spec: VmSpec,
    /// The machine, stopped.
    pub machine: Machine,
    /// Its snapshots.
    pub snapshots: Snapshots,
}

/// A snapshot that may be restored.
struct Opened {
    manifest: Manifest,
    sections: Sections,
    memory: MemorySource,
}

/// Where memory comes from.
enum MemorySource {
    /// From the snapshots of a chain.
    Chain(Chain),
    /// From a file that is memory, byte for byte.
    Raw(File),
    /// From the process that listens at this socket.
    Served(PathBuf),
}

/// Makes a VM of the snapshot of `request`.
///
/// # Errors
/// As [`Vmm::restore`](crate::Vmm::restore).
pub fn restore(request: &RestoreRequest, options: &Options, mailbox: &Arc<Mailbox>) -> Result<Restored, Error> {
    bare_vm::begin();
    let Prepared {
        opened,
        spec,
        state,
        countdown,
        mut filling,
        memory,
        disks,
    } = Prepared::of(request, options)?;
    let disks = disks.map(DiskImages::create).transpose()?;
    // Until they are complete, disks have other names.
    let built = disks.as_ref().map_or_else(|| spec.clone(), |disks| disks.spec(&spec));
    let reserved = Reserved::create(&built, memory, DiskLocks::Taken, options, mailbox)?;
    let machine = reserved.load(&state, state.vm.passed_ns(request.clock))?;
    filling.keep(|| machine.devices.keep_memory());
    machine.renew_generation()?;
    if let Some(disks) = disks {
        let on_thread = confined(options, ThreadKind::Snapshot);
        let disks = disks.fill(&machine.devices, &on_thread, countdown.when_filled())?;
        filling.disks = Some(Arc::new(disks));
    }
    let base = opened.base(&machine, request)?;
    countdown.done();
    Ok(Restored {
        spec,
        machine,
        snapshots: Snapshots::of_restored(&request.source, filling, base),
    })
}

/// What takes no KVM.
struct Prepared {
    opened: Opened,
    spec: VmSpec,
    state: MachineState,
    countdown: Countdown,
    filling: Filling,
    memory: GuestMemory,
    disks: Option<DiskImages>,
}

impl Prepared {
    fn of(request: &RestoreRequest, options: &Options) -> Result<Self, Error> {
        let opened = Opened::open(request)?;
        let spec = spec_of(&opened.manifest, request)?;
        state::check_cpu(&opened.manifest.cpu)?;
        let state = MachineState::read(&spec, &opened.sections)?;
        let disks = opened.disks(&spec, request)?;
        let countdown = Countdown::new(&options.events);
        let mut filling = Filling::default();
        let memory = opened.memory(&spec, request.trust, options, &countdown, &mut filling)?;
        Ok(Self {
            opened,
            spec,
            state,
            countdown,
            filling,
            memory,
            disks,
        })
    }
}

impl Opened {
    /// Opens the snapshot, and verifies what can be verified without reading pages, or all of it if that is asked for.
    fn open(request: &RestoreRequest) -> Result<Self, Error> {
        match &request.source {
            Source::Snapshot(path) => {
                let access = Access {
                    endpoints: request.endpoints.clone(),
                    ..Access::from_env()
                };
                let chain = Chain::open_through(path, &access)?;
                if request.trust == Trust::VerifyFirst
                    && let Some(damage) = verify(&chain, &mut |_| {}).damage.into_iter().next()
                {
                    return Err(damage.into());
                }
                Ok(Self {
                    manifest: chain.newest().sealed.manifest.clone(),
                    sections: chain.state()?,
                    memory: MemorySource::Chain(chain),
                })
            }
            Source::Files { state, memory } => {
                let (manifest, sections) = state_file::read(state)?;
                let file = File::open(memory).map_err(SnapshotError::io("open it", memory))?;
                check_raw(memory, &file, &manifest)?;
                Ok(Self {
                    manifest,
                    sections,
                    memory: MemorySource::Raw(file),
                })
            }
            Source::Served { state, socket } => {
                let (manifest, sections) = state_file::read(state)?;
                Ok(Self {
                    manifest,
                    sections,
                    memory: MemorySource::Served(socket.clone()),
                })
            }
        }
    }

    /// Guest memory with the snapshot's content, now or as it is touched.
    fn memory(
        &self,
        spec: &VmSpec,
        trust: Trust,
        options: &Options,
        countdown: &Countdown,
        filling: &mut Filling,
    ) -> Result<GuestMemory, Error> {
        let on_thread = confined(options, ThreadKind::PageFault);
        let chain = match &self.memory {
            MemorySource::Chain(chain) => chain,
            MemorySource::Raw(file) => return memory::map_flat(&spec.memory, file),
            MemorySource::Served(socket) => {
                let memory = memory::map(&spec.memory)?;
                filling.external = Some(Arc::new(ExternalMemory::start(&memory, socket, on_thread)?));
                return Ok(memory);
            }
        };
        let image = chain.image(MEMORY_IMAGE)?;
        if let (Some(file), Trust::VerifyFirst | Trust::Trusted) = (image.flat_file(), trust)
            && !spec.memory.shared
            && !spec.memory.hugepages
        {
            return memory::map_flat(&spec.memory, file);
        }
        let memory = memory::map(&spec.memory)?;
        match LazyMemory::start(
            &memory,
            image.clone(),
            EarlyPages::of(chain),
            image.useful_readers(),
            on_thread,
            countdown.one_more(),
        ) {
            Ok(lazy) => filling.memory = Some(Arc::new(lazy)),
            Err(Error::PageFaults(why)) => {
                countdown.done();
                tracing::info!(%why, "the guest waits until all of its memory is there");
                page_fault::fill(&memory, &image)?;
            }
            Err(error) => return Err(error),
        }
        Ok(memory)
    }

    /// The disks that are in the snapshot.
    fn disks(&self, spec: &VmSpec, request: &RestoreRequest) -> Result<Option<DiskImages>, Error> {
        let existing = if request.replace_disks {
            Existing::Replaced
        } else {
            Existing::Kept
        };
        match &self.memory {
            MemorySource::Chain(chain) => Ok(Some(DiskImages::open(chain, &self.sections, spec, existing)?)),
            MemorySource::Raw(_) | MemorySource::Served(_) => Ok(None),
        }
    }

    /// What incremental snapshots of the restored VM are built on, if anyone wants them.
    fn base(&self, machine: &Machine, request: &RestoreRequest) -> Result<Option<Base>, Error> {
        if !request.track {
            return Ok(None);
        }
        let base = Base::begin(machine, Baseline::Now)?;
        if let MemorySource::Chain(chain) = &self.memory {
            base.build_on(Parent::from(chain.newest()));
        }
        Ok(Some(base))
    }
}

/// The VM of the snapshot, with what `request` has different.
fn spec_of(saved: &Manifest, request: &RestoreRequest) -> Result<VmSpec, Error> {
    let mut spec = saved.spec.clone();
    spec.name = request.name.clone().or(spec.name);
    spec.serial = request.serial.clone();
    spec.memory.hugepages = request.hugepages.unwrap_or(spec.memory.hugepages);
    overrides::apply_nets(&mut spec, &request.nets)?;
    overrides::apply_vsock(&mut spec, request.vsock.as_deref())?;
    overrides::check_disk_ids(&spec, request.disks.keys())?;
    for (index, disk) in spec.disks.iter_mut().enumerate() {
        let id = disk.id_at(index);
        let in_snapshot = saved.image(&disks::image_name(&id)).is_some();
        disk.path = match (request.disks.get(&id), &request.disks_dir) {
            (Some(path), _) => path.clone(),
            (None, Some(dir)) if in_snapshot => dir.join(format!("{id}.img")),
            (None, None) if in_snapshot => return Err(Error::DiskHasNoPlace { id }),
            (None, _) => continue,
        };
    }
    spec.check()?;
    Ok(spec)
}

/// Refuses a file of memory that is not as long as the memory.
fn check_raw(path: &Path, file: &File, manifest: &Manifest) -> Result<(), Error> {
    let metadata = file.metadata().map_err(SnapshotError::io("examine it", path))?;
    let expected = manifest.spec.memory.size.bytes();
    if metadata.len() != expected {
        return Err(SnapshotError::Invalid {
            path: path.to_owned(),
            reason: format!(
                "has {} bytes, but the snapshot's VM has {expected} of memory",
                metadata.len()
            ),
        }
        .into());
    }
    Ok(())
}
