//! The devices of a VM: which there are, at which addresses and interrupt lines, and how they meet KVM.
//!
//! Addresses and lines follow from the order in the spec alone, so that the same spec always gives the same machine.

mod balloon;
pub mod epochs;
mod hand_over;
mod output;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cutover_devices::OnThread;
use cutover_devices::bus::BusDevice;
use cutover_devices::console::Console;
use cutover_devices::event_loop::EventLoopHandle;
use cutover_devices::guest_event::GuestEventSink;
use cutover_devices::i8042::I8042;
use cutover_devices::mmds::{self, Metadata};
use cutover_devices::power::PowerControl;
use cutover_devices::pvpanic::Pvpanic;
use cutover_devices::serial::SerialPort;
use cutover_devices::stats::{
    BalloonCounters, BalloonCounts, DiskCounters, DiskStats, MmdsStats, NetCounters, NetStats, RngCounters, RngStats,
    SerialStats, VsockCounters, VsockStats,
};
use cutover_devices::virtio::balloon::Balloon;
use cutover_devices::virtio::block::Block;
use cutover_devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY_OFFSET};
use cutover_devices::virtio::net::Net;
use cutover_devices::virtio::rng::Rng;
use cutover_devices::virtio::vsock::Vsock;
use cutover_devices::virtio::{DeviceError, VirtioDevice};
use cutover_snapshot::spec::{RateLimiterSpec, SerialSpec, VmSpec};
use serde::Serialize;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Error;
use crate::acpi::VirtioNode;
use crate::cpu::Buses;
use crate::kvm::KvmVm;
use crate::layout::{
    COM1_GSI, COM1_PORT, COM1_PORTS, I8042_PORT, I8042_PORTS, NEW_GENERATION_GSI, POWER_BUTTON_GSI, POWER_PORT,
    PVPANIC_PORT, VIRTIO_GSI_FIRST, VIRTIO_GSI_LAST, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START, VIRTIO_WINDOW,
};
use crate::reclaim::Reclaim;
use crate::state::{self, DevicesState};

pub use self::balloon::BalloonUpdate;
pub use self::epochs::DiskCuts;
pub use self::hand_over::DiskFlusher;

/// Every device of a VM.
pub struct DeviceManager {
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
    disks: Vec<Placed<Block, DiskCounters>>,
    nets: Vec<Placed<Net, NetCounters>>,
    rng: Option<Arc<RngCounters>>,
    vsock: Option<(Arc<Mutex<Vsock>>, Arc<VsockCounters>)>,
    mmds: Option<Arc<mmds::Service>>,
    balloon: Option<Placed<Balloon, BalloonCounters>>,
    reclaim: Reclaim,
    serial: Arc<Mutex<SerialPort>>,
    event_loop: EventLoopHandle,
    nodes: Vec<VirtioNode>,
    power_button: EventFd,
    new_generation: EventFd,
}

/// A virtio device with its id, and how to reach it.
struct Placed<D, C> {
    id: String,
    device: Arc<Mutex<D>>,
    transport: Arc<Mutex<MmioTransport>>,
    counters: Arc<C>,
}

/// What is to be changed about a disk; what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskUpdate {
    /// Another image, or the same one to be measured anew.
    pub path: Option<PathBuf>,
    /// Limits: each bucket that is given replaces the one there is.
    pub rate_limiter: Option<RateLimiterSpec>,
}

/// What is to be changed about a network interface; what is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetUpdate {
    /// Limits of what the guest receives, as those of a disk.
    pub rx_rate_limiter: Option<RateLimiterSpec>,
    /// Limits of what it sends.
    pub tx_rate_limiter: Option<RateLimiterSpec>,
}

/// When disks are locked against other users, and the path of a socket device is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskLocks {
    /// As they are opened.
    Taken,
    /// By [`DeviceManager::take_over`], before the machine runs: another monitor still uses them.
    Later,
}

/// What devices have to do with beside their VM.
pub struct HostSide<'a> {
    /// Where they serve their queues.
    pub event_loop: &'a EventLoopHandle,
    /// Where they tell what the guest tells.
    pub events: &'a GuestEventSink,
    /// What disk workers call first.
    pub on_disk_thread: &'a OnThread,
    /// What the metadata service tells, if there is one.
    pub metadata: &'a Arc<Metadata>,
}

/// What the devices have done since the VM was built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceStats {
    /// Disks, in the order the guest sees them.
    pub disks: Vec<DiskStats>,
    /// Network interfaces, in the order the guest sees them.
    pub nets: Vec<NetStats>,
    /// The entropy device, if there is one.
    pub rng: Option<RngStats>,
    /// The socket device, if there is one.
    pub vsock: Option<VsockStats>,
    /// The metadata service, if there is one.
    pub mmds: Option<MmdsStats>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonCounts>,
    /// The serial port.
    pub serial: SerialStats,
}

impl DeviceManager {
    /// Makes the devices of `spec`, puts them on `buses` and connects them to `vm`. They are new; the serial port has no
    /// [console](Self::open_console) yet. Disks are locked as `disk_locks` says.
    ///
    /// # Errors
    /// A file, tap or console of a device cannot be had, or KVM refused a connection.
    pub fn create(
        spec: &VmSpec,
        disk_locks: DiskLocks,
        vm: &KvmVm,
        buses: &mut Buses,
        host: &HostSide<'_>,
    ) -> Result<Self, Error> {
        let HostSide { event_loop, events, .. } = *host;
        let (power_button, new_generation) = (new_interrupt()?, new_interrupt()?);
        vm.connect_interrupt(&power_button, POWER_BUTTON_GSI)?;
        vm.connect_interrupt(&new_generation, NEW_GENERATION_GSI)?;
        add_platform_devices(buses, events)?;
        let serial = add_serial_port(&spec.serial, vm, buses, events)?;
        let mut builder = VirtioBuilder::new(vm, buses, event_loop, events)?;
        let mut disks = Vec::new();
        for (index, disk) in spec.disks.iter().enumerate() {
            let block = match disk_locks {
                DiskLocks::Taken => Block::open(disk, host.on_disk_thread)?,
                DiskLocks::Later => Block::open_unlocked(disk, host.on_disk_thread)?,
            };
            let counters = block.counters().clone();
            let (device, transport) = builder.add(format!("virtio-blk{index}"), block)?;
            disks.push(Placed {
                id: disk.id_at(index),
                device,
                transport,
                counters,
            });
        }
        let mmds = spec.mmds.as_ref();
        let mmds = mmds.map(|mmds| Arc::new(mmds::Service::new(mmds, host.metadata.clone())));
        let nets = add_nets(spec, mmds.as_ref(), &mut builder)?;
        let mut rng = None;
        if let Some(spec) = &spec.rng {
            let device = Rng::new(spec)?;
            rng = Some(device.counters().clone());
            builder.add("virtio-rng".to_owned(), device)?;
        }
        let mut vsock = None;
        if let Some(spec) = &spec.vsock {
            let mut device = Vsock::new(spec);
            if disk_locks == DiskLocks::Taken {
                device.listen()?;
            }
            let counters = device.counters().clone();
            let (device, _) = builder.add("virtio-vsock".to_owned(), device)?;
            vsock = Some((device, counters));
        }
        let reclaim = Reclaim::of(&vm.memory_slots.memory);
        let balloon = match &spec.balloon {
            Some(spec) => Some(builder.add_balloon(spec, &reclaim)?),
            None => None,
        };
        let VirtioBuilder { virtio, nodes, .. } = builder;
        Ok(Self {
            virtio,
            disks,
            nets,
            rng,
            vsock,
            mmds,
            balloon,
            reclaim,
            serial,
            event_loop: event_loop.clone(),
            nodes,
            power_button,
            new_generation,
        })
    }

    /// Puts the devices, which are new, into the state that was [saved](Self::save), paused.
    ///
    /// # Errors
    /// It cannot be the state of these devices.
    pub fn load(&self, saved: &DevicesState) -> Result<(), Error> {
        let (found, expected) = (saved.virtio.len(), self.virtio.len());
        if found != expected {
            return Err(Error::SavedState(format!(
                "it has {found} devices, the VM has {expected}"
            )));
        }
        lock(&self.serial).restore(&saved.serial)?;
        for (mut device, (_, state)) in self.transports().zip(&saved.virtio) {
            device.restore(state)?;
        }
        for (net, (_, addresses)) in self.nets.iter().zip(&saved.addresses) {
            lock(&net.device).recall(addresses);
        }
        if let (Some(mmds), Some(metadata)) = (&self.mmds, &saved.metadata) {
            let adopted = mmds.metadata().adopt(metadata);
            adopted.map_err(|error| Error::SavedState(format!("its metadata are no JSON: {error}")))?;
        }
        Ok(())
    }

    /// Has the serial port take what is typed. Until then it is as its guest has left it.
    ///
    /// # Errors
    /// The event loop refused.
    pub fn open_console(&self) -> Result<(), Error> {
        self.event_loop.add(self.serial.clone())?;
        Ok(())
    }

    /// What the ACPI tables say of the virtio devices.
    pub fn virtio_nodes(&self) -> &[VirtioNode] {
        &self.nodes
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) {
        if let Err(error) = self.power_button.write(1) {
            tracing::error!(%error, "cannot press the power button");
        }
    }

    /// Notifies the guest that the VM has a new generation id.
    pub fn announce_generation(&self) {
        if let Err(error) = self.new_generation.write(1) {
            tracing::error!(%error, "cannot notify the guest of its new generation id");
        }
    }

    /// Changes the disk called `id` while its guest uses it, or while the VM is paused.
    ///
    /// Another image takes the old one's place between two requests; those under way are finished on the old one. A
    /// guest that has set the disk up is told if the size differs. Whether the disk can be written does not change.
    ///
    /// # Errors
    /// There is no such disk, a snapshot or a restore copies its image, or the other image cannot be used, for the
    /// reasons for which [`create`](Self::create) refuses one. Nothing is changed then.
    pub fn update_disk(&self, id: &str, update: &DiskUpdate) -> Result<(), Error> {
        let disk = find(&self.disks, "disk", id)?;
        // Opened here, where a slow file system holds up nobody but this thread; so is the old image closed.
        let current = lock(&disk.device).disk().clone();
        let successor = update.path.as_ref().map(|path| current.successor(path)).transpose()?;
        let resized = successor
            .as_ref()
            .is_some_and(|disk| disk.sectors() != current.sectors());
        let (device, limits) = (disk.device.clone(), update.rate_limiter);
        let _replaced = self.event_loop.call(move |_| {
            let mut block = lock(&device);
            let replaced = successor.map(|successor| block.replace(successor)).transpose()?;
            if let Some(limits) = limits {
                block.limit(&limits);
            }
            Ok::<_, DeviceError>(replaced)
        })??;
        if resized {
            lock(&disk.transport).config_changed();
        }
        Ok(())
    }

    /// The disks with their ids, in the order the guest sees them.
    pub fn disks(&self) -> impl Iterator<Item = (&str, MutexGuard<'_, Block>)> {
        self.disks.iter().map(|disk| (disk.id.as_str(), lock(&disk.device)))
    }

    /// Changes the network interface called `id` while its guest uses it, or while the VM is paused.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn update_net(&self, id: &str, update: &NetUpdate) -> Result<(), Error> {
        let device = find(&self.nets, "network interface", id)?.device.clone();
        let (rx, tx) = (update.rx_rate_limiter, update.tx_rate_limiter);
        self.event_loop
            .call(move |_| lock(&device).limit(&rx.unwrap_or_default(), &tx.unwrap_or_default()))?;
        Ok(())
    }

    /// What the devices have done. Waits for none of them.
    pub fn stats(&self) -> DeviceStats {
        DeviceStats {
            disks: self
                .disks
                .iter()
                .map(|disk| disk.counters.read(disk.id.clone()))
                .collect(),
            nets: self.nets.iter().map(|net| net.counters.read(net.id.clone())).collect(),
            rng: self.rng.as_ref().map(|rng| rng.read()),
            vsock: self.vsock.as_ref().map(|(_, counters)| counters.read()),
            mmds: self.mmds.as_ref().map(|mmds| mmds.counters().read()),
            balloon: self.balloon.as_ref().map(|balloon| balloon.counters.read()),
            serial: lock(&self.serial).counters().read(),
        }
    }

    /// The state of the devices, which are paused.
    pub fn save(&self) -> DevicesState {
        let disks = self.disks.iter().map(|disk| disk.id.clone());
        let nets = self.nets.iter().map(|net| net.id.clone());
        let single = state::SingleDevices {
            rng: self.rng.is_some(),
            vsock: self.vsock.is_some(),
            balloon: self.balloon.is_some(),
        };
        let names = state::device_sections(disks, nets, single);
        DevicesState {
            serial: lock(&self.serial).save(),
            virtio: names
                .zip(self.transports())
                .map(|(name, device)| (name, device.save()))
                .collect(),
            addresses: self
                .nets
                .iter()
                .map(|net| (state::addresses_section(&net.id), lock(&net.device).addresses()))
                .collect(),
            metadata: self.mmds.as_ref().and_then(|mmds| mmds.metadata().save()),
        }
    }

    /// Stops every virtio device; from then on none touches guest memory. The vCPUs stand still.
    pub fn pause(&self) {
        for mut device in self.transports() {
            device.pause();
        }
    }

    /// Starts every device again that the guest had started.
    pub fn resume(&self) {
        lock(&self.serial).raise_again();
        for mut device in self.transports() {
            device.resume();
        }
    }

    fn transports(&self) -> impl Iterator<Item = MutexGuard<'_, MmioTransport>> {
        self.virtio.iter().map(|device| lock(device))
    }
}

fn find<'a, D, C>(devices: &'a [Placed<D, C>], kind: &'static str, id: &str) -> Result<&'a Placed<D, C>, DeviceError> {
    devices
        .iter()
        .find(|device| device.id == id)
        .ok_or_else(|| DeviceError::Unknown {
            kind,
            id: id.to_owned(),
            known: devices.iter().map(|device| device.id.clone()).collect(),
        })
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for DeviceManager {
    fn drop(&mut self) {
        self.pause();
    }
}

fn add_platform_devices(buses: &mut Buses, events: &GuestEventSink) -> Result<(), Error> {
    let mut add =
        |port: u16, count: u8, device: Arc<Mutex<dyn BusDevice>>| buses.ports.insert(port.into(), count.into(), device);
    add(
        I8042_PORT,
        I8042_PORTS,
        Arc::new(Mutex::new(I8042::new(events.clone()))),
    )?;
    add(POWER_PORT, 1, Arc::new(Mutex::new(PowerControl::new(events.clone()))))?;
    add(PVPANIC_PORT, 1, Arc::new(Mutex::new(Pvpanic::new(events.clone()))))?;
    Ok(())
}

fn add_serial_port(
    spec: &SerialSpec,
    vm: &KvmVm,
    buses: &mut Buses,
    events: &GuestEventSink,
) -> Result<Arc<Mutex<SerialPort>>, Error> {
    let interrupt = new_interrupt()?;
    vm.connect_interrupt(&interrupt, COM1_GSI)?;
    let port = SerialPort::new(interrupt, Console::open(spec)?, events.clone());
    let port = Arc::new(Mutex::new(port));
    buses.ports.insert(COM1_PORT.into(), COM1_PORTS.into(), port.clone())?;
    Ok(port)
}

/// Adds the network interfaces, the metadata service at those where it is to be.
fn add_nets(
    spec: &VmSpec,
    service: Option<&Arc<mmds::Service>>,
    builder: &mut VirtioBuilder<'_>,
) -> Result<Vec<Placed<Net, NetCounters>>, Error> {
    let nets = spec.nets.iter().enumerate().map(|(index, net)| {
        let id = net.id_at(index);
        let mut device = Net::open(net)?;
        if let (Some(mmds), Some(service)) = (&spec.mmds, service)
            && mmds.is_at(&id)
        {
            device.serve_metadata(service.clone(), mmds.address, net.mtu)?;
        }
        let counters = device.counters().clone();
        let (device, transport) = builder.add(format!("virtio-net{index}"), device)?;
        Ok(Placed {
            id,
            device,
            transport,
            counters,
        })
    });
    nets.collect()
}

fn new_interrupt() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK).map_err(Error::os("create an eventfd"))
}

/// A device and its transport.
type Connected<D> = (Arc<Mutex<D>>, Arc<Mutex<MmioTransport>>);

/// Places virtio devices one after the other.
struct VirtioBuilder<'a> {
    vm: &'a KvmVm,
    buses: &'a mut Buses,
    event_loop: &'a EventLoopHandle,
    events: &'a GuestEventSink,
    windows: AddressAllocator,
    lines: IdAllocator,
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
    nodes: Vec<VirtioNode>,
}

impl<'a> VirtioBuilder<'a> {
    fn new(
        vm: &'a KvmVm,
        buses: &'a mut Buses,
        event_loop: &'a EventLoopHandle,
        events: &'a GuestEventSink,
    ) -> Result<Self, Error> {
        let none_left = |_| out_of("MMIO address", "virtio devices");
        let windows = AddressAllocator::new(VIRTIO_MMIO_START, VIRTIO_MMIO_SIZE).map_err(none_left)?;
        let lines = IdAllocator::new(VIRTIO_GSI_FIRST, VIRTIO_GSI_LAST).map_err(none_left)?;
        Ok(Self {
            vm,
            buses,
            event_loop,
            events,
            windows,
            lines,
            virtio: Vec::new(),
            nodes: Vec::new(),
        })
    }

    /// Places `device`, which is called `name` in messages, behind its transport.
    fn add<D: VirtioDevice + 'static>(&mut self, name: String, device: D) -> Result<Connected<D>, Error> {
        let size = u64::from(VIRTIO_WINDOW);
        let window = self
            .windows
            .allocate(size, size, AllocPolicy::FirstMatch)
            .map_err(|_| out_of("MMIO address", &name))?;
        let gsi = self.lines.allocate_id().map_err(|_| out_of("interrupt line", &name))?;
        let address = u32::try_from(window.start()).map_err(|_| out_of("MMIO address below 4 GiB", &name))?;
        let device = Arc::new(Mutex::new(device));
        let transport = MmioTransport::new(
            name,
            device.clone(),
            self.vm.memory_slots.memory.clone(),
            self.event_loop.clone(),
            self.events.clone(),
        )?;
        self.vm.connect_interrupt(transport.interrupt(), gsi)?;
        for (queue, doorbell) in (0..).zip(transport.doorbells()) {
            self.vm
                .connect_doorbell(doorbell, window.start() + QUEUE_NOTIFY_OFFSET, queue)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.buses.mmio.insert(window.start(), size, transport.clone())?;
        self.virtio.push(transport.clone());
        self.nodes.push(VirtioNode { address, gsi });
        Ok((device, transport))
    }
}

fn out_of(resource: &'static str, device: &str) -> Error {
    Error::OutOfResources {
        resource,
        device: device.to_owned(),
    }
}
