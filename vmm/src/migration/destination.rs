//! The VM that moves in: built before anything of it is there, then given its memory, its state, and run.
//!
//! ```text
//!  reserve   every reason why it cannot run here, or all of it that takes time: memory, devices, threads
//!  images    its memory, which is written while the guest still runs at the source
//!  restore   the state of vCPUs and devices: the guest stands still now
//!  run       it goes on
//! ```

use std::sync::Arc;
use std::time::Instant;

use cutover_migration::destination::{self, Waiting};
use cutover_migration::pages::PageBits;
use cutover_migration::transport::Listener;
use cutover_migration::vm::{
    ArrivingMemory, Descriptors, DestinationHost, DestinationVm, Image, ImageShape, Reservation, VmError,
};
use cutover_snapshot::section::State as Sections;
use cutover_snapshot::spec::{NetSpec, TapSpec, VmSpec};

use super::MigrationStatus;
use super::disks::NewDisks;
use super::handed;
use super::memory::MemoryImage;
use super::request::ReceiveRequest;
use super::room;
use super::source::{MOMENT, Moment, memory_shape};
use crate::control::Mailbox;
use crate::device_manager::DiskLocks;
use crate::dirty::PAGE_SIZE;
use crate::driver::{Options, Vmm};
use crate::machine::{Machine, Reserved, confined};
use crate::page_fault::{self, Arriving};
use crate::seccomp::ThreadKind;
use crate::snapshot::disks::image_name;
use crate::state::{MachineState, check_cpu};
use crate::{Error, host, memory, overrides};

/// Waits for a VM as `request` says, and takes it in if it can be and `admit` has nothing against it; returns when it runs
/// here. `status` tells how far it has come, and that nobody waits any more.
///
/// # Errors
/// As [`Vmm::receive`].
pub fn receive(
    request: &ReceiveRequest,
    options: &Options,
    status: &MigrationStatus,
    admit: &mut dyn FnMut(&VmSpec) -> Result<(), String>,
) -> Result<Vmm, Error> {
    let security = super::security(request.tls.as_deref())?;
    let listener = Listener::bind(&request.listen, &security)?;
    let waiting = Waiting {
        listener: &listener,
        status,
        on_thread: confined(options, ThreadKind::Migration),
    };
    let mut host = Host {
        request,
        options,
        admit,
    };
    Ok(destination::receive(&waiting, &mut host)?)
}

/// Whoever takes a VM in.
pub struct Host<'a> {
    /// What is asked for.
    pub request: &'a ReceiveRequest,
    /// How it is to run.
    pub options: &'a Options,
    /// Whether whoever asks has what the VM needs besides; asked when nothing else speaks against it.
    pub admit: &'a mut dyn FnMut(&VmSpec) -> Result<(), String>,
}

/// A VM that is on its way here.
pub struct Incoming {
    spec: VmSpec,
    incarnation: u64,
    options: Options,
    mailbox: Arc<Mailbox>,
    /// Its memory, if that moves.
    image: Option<Arc<dyn Image>>,
    /// Its disks that move.
    disks: NewDisks,
    /// When it was asked for.
    asked: Instant,
    stage: Stage,
}

/// How far it has come.
enum Stage {
    /// Its state is still to come.
    Reserved(Box<Reserved>),
    /// It could run.
    Loaded(Loaded),
    /// Its state was none, or was taken.
    Failed,
}

/// A VM that has its state.
struct Loaded {
    machine: Box<Machine>,
    /// Whether it is to run.
    runs: bool,
    /// Its memory, if it runs before all of that is there.
    arriving: Option<Arc<Arriving>>,
}

impl DestinationHost for Host<'_> {
    type Vm = Incoming;

    fn reserve(
        &mut self,
        reservation: &Reservation,
        handed: Descriptors,
        may_follow: bool,
    ) -> Result<Incoming, Vec<String>> {
        let asked = Instant::now();
        let spec = self.check(reservation, &handed, may_follow)?;
        (self.admit)(&spec).map_err(|reason| vec![reason])?;
        self.build(spec, reservation, handed, asked)
            .map_err(|error| vec![error.to_string()])
    }
}

impl Host<'_> {
    /// The VM as it will be here.
    ///
    /// # Errors
    /// All reasons why it cannot be, as far as they are seen before it is tried.
    fn check(&self, reservation: &Reservation, handed: &Descriptors, may_follow: bool) -> Result<VmSpec, Vec<String>> {
        let mut reasons = Reasons::default();
        let mut spec = reservation.spec.clone();
        spec.name = self.request.name.clone().or(spec.name);
        spec.serial = self.request.serial.clone();
        reasons.check(overrides::apply_nets(&mut spec, &self.request.nets));
        reasons.check(overrides::apply_vsock(&mut spec, self.request.vsock.as_deref()));
        reasons.check(overrides::check_disk_ids(&spec, self.request.disks.keys()));
        for (index, disk) in spec.disks.iter_mut().enumerate() {
            let id = disk.id_at(index);
            if let Some(path) = self.request.disks.get(&id) {
                disk.path = path.clone();
            } else if let Some(directory) = &self.request.disks_dir
                && moves(reservation, &id)
            {
                disk.path = directory.join(format!("{id}.img"));
            }
        }
        reasons.check(spec.check().map_err(Error::from));
        reasons.check(check_cpu(&reservation.cpu));
        check_memory(&spec, reservation, handed, &mut reasons);
        if may_follow && let Err(reason) = page_fault::check_arriving(&spec.memory) {
            reasons.add(format!("its memory could not follow it (post-copy): {reason}"));
        }
        for (index, disk) in spec.disks.iter().enumerate() {
            if !moves(reservation, &disk.id_at(index))
                && let Err(error) = std::fs::metadata(&disk.path)
            {
                reasons.add(format!("disk image {}: {error}", disk.path.display()));
            }
        }
        let moving = disks_of(reservation, !handed::has_memory(handed));
        room::lacking(&spec, moving)
            .into_iter()
            .for_each(|reason| reasons.add(reason));
        for net in &handed::with_taps(&spec, handed).nets {
            check_tap(net, &mut reasons);
        }
        if reasons.0.is_empty() { Ok(spec) } else { Err(reasons.0) }
    }

    /// Makes all of the VM of `spec` but its state.
    fn build(
        &self,
        spec: VmSpec,
        reservation: &Reservation,
        mut handed: Descriptors,
        asked: Instant,
    ) -> Result<Incoming, Error> {
        let moves_memory = !handed::has_memory(&handed);
        let memory = handed::map_memory(&spec.memory, &mut handed)?;
        let mailbox = Arc::<Mailbox>::default();
        let image = moves_memory.then(|| Arc::new(MemoryImage::of(&memory)) as Arc<dyn Image>);
        let disks = NewDisks::create(&spec, disks_of(reservation, moves_memory))?;
        // The source has the disks until it hands them over.
        let built = disks.spec(&handed::with_taps(&spec, &handed));
        let reserved = Reserved::create(&built, memory, DiskLocks::Later, self.options, &mailbox)?;
        Ok(Incoming {
            spec,
            incarnation: reservation.generation,
            options: self.options.clone(),
            mailbox,
            image,
            disks,
            asked,
            stage: Stage::Reserved(Box::new(reserved)),
        })
    }
}

/// Why a VM cannot run here.
#[derive(Default)]
struct Reasons(Vec<String>);

impl Reasons {
    fn add(&mut self, reason: String) {
        self.0.push(reason);
    }

    fn check(&mut self, outcome: Result<(), Error>) {
        if let Err(error) = outcome {
            self.add(error.to_string());
        }
    }
}

/// Whether disk `id` moves.
fn moves(reservation: &Reservation, id: &str) -> bool {
    reservation.images.iter().any(|image| image.name == image_name(id))
}

/// What moves besides memory.
fn disks_of(reservation: &Reservation, memory_moves: bool) -> &[ImageShape] {
    reservation.images.get(usize::from(memory_moves)..).unwrap_or_default()
}

/// Whether the memory is as every VM's of this size; if it moves, whether this host has that much.
fn check_memory(spec: &VmSpec, reservation: &Reservation, handed: &Descriptors, reasons: &mut Reasons) {
    let size = spec.memory.size;
    let ranges = memory::ram_ranges(size.bytes());
    let found = reservation.memory.iter().map(|region| (region.start, region.bytes));
    if !found.eq(ranges.iter().map(|range| (range.start, range.size))) {
        reasons.add(format!("its memory of {size} does not lie where this release has it"));
    }
    let memory = memory_shape(size.bytes() / PAGE_SIZE);
    let moves = !handed::has_memory(handed);
    if moves && reservation.images.first() != Some(&memory) {
        let (images, pages) = (&reservation.images, memory.pages);
        reasons.add(format!(
            "what is to move does not begin with its memory of {pages} pages, but is {images:?}"
        ));
    }
    match host::memory_available() {
        Ok(available) if moves && available < size && !spec.memory.hugepages => {
            reasons.add(format!(
                "it has {size} of memory, of which this host has {available} left"
            ));
        }
        Ok(_) => {}
        Err(error) => reasons.add(format!("cannot tell how much memory this host has left: {error}")),
    }
}

/// Whether the tap of `net` can be had. One that is created is there only while somebody has it.
fn check_tap(net: &NetSpec, reasons: &mut Reasons) {
    if let TapSpec::Name(_) = net.tap
        && let Err(error) = cutover_devices::virtio::net::Net::open(net)
    {
        reasons.add(error.to_string());
    }
}

impl DestinationVm for Incoming {
    type Running = Vmm;

    fn images(&self) -> Vec<Arc<dyn Image>> {
        self.image.iter().cloned().chain(self.disks.images()).collect()
    }

    fn restore(
        &mut self,
        state: &Sections,
        missing: Option<PageBits>,
    ) -> Result<Option<Arc<dyn ArrivingMemory>>, VmError> {
        let Stage::Reserved(reserved) = std::mem::replace(&mut self.stage, Stage::Failed) else {
            return Err("the VM has a state already".into());
        };
        let machine_state = MachineState::read(&self.spec, state)?;
        let moment: Moment = state.read(MOMENT)?;
        let since_asked = u64::try_from(self.asked.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // The reservation took a moment to come here, by which the guest's clocks will be late; they never go back.
        let passed_ns = since_asked.saturating_sub(moment.after_ns);
        let machine = reserved.load(&machine_state, passed_ns)?;
        // KVM has touched some pages by now, and nobody does before the guest runs.
        let arriving = missing.map(|missing| Arriving::start(machine.memory(), &missing));
        let arriving = arriving.transpose()?.map(Arc::new);
        if let Some(arriving) = &arriving {
            arriving.keep(machine.devices.keep_memory());
        }
        self.stage = Stage::Loaded(Loaded {
            machine: Box::new(machine),
            runs: moment.runs,
            arriving: arriving.clone(),
        });
        Ok(arriving.map(|memory| memory as Arc<dyn ArrivingMemory>))
    }

    fn run(mut self) -> Result<(Vmm, Instant), VmError> {
        let Loaded {
            machine,
            runs,
            arriving,
        } = self.take_over()?;
        let since = if runs { machine.run() } else { Instant::now() };
        machine.devices.announce();
        let vmm = Vmm::arrived(
            self.spec,
            *machine,
            self.incarnation,
            runs,
            arriving,
            &self.options,
            self.mailbox,
        );
        Ok((vmm, since))
    }
}

impl Incoming {
    /// What it is.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// Has the VM be this host's, at `cut` of its epochs, and stand still.
    ///
    /// # Errors
    /// It has no state, or something that only one of the two may have could not be had.
    pub fn stand_still(mut self, cut: u64) -> Result<Vmm, Error> {
        let Loaded { machine, runs, .. } = self.take_over()?;
        Ok(Vmm::promoted(
            self.spec,
            *machine,
            self.incarnation,
            cut,
            runs,
            &self.options,
            self.mailbox,
        ))
    }

    /// Takes what only one of the two may have: names and locks of disks, the path of its socket device.
    fn take_over(&mut self) -> Result<Loaded, Error> {
        let Stage::Loaded(loaded) = std::mem::replace(&mut self.stage, Stage::Failed) else {
            return Err(Error::Migration(cutover_migration::Error::Vm {
                action: "take the VM over",
                source: "it has no state yet".into(),
            }));
        };
        std::mem::take(&mut self.disks).publish()?;
        loaded.machine.devices.take_over()?;
        Ok(loaded)
    }
}

#[cfg(test)]
mod tests;
