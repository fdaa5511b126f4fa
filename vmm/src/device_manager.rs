//! The devices of a VM: which there are, at which addresses and interrupt lines, and how they meet KVM.
//!
//! Addresses and lines follow from the order in the spec alone, so that the same spec always gives the same machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cutover_devices::bus::BusDevice;
use cutover_devices::console::Console;
use cutover_devices::event_loop::EventLoopHandle;
use cutover_devices::guest_event::GuestEventSink;
use cutover_devices::i8042::I8042;
use cutover_devices::power::PowerControl;
use cutover_devices::pvpanic::Pvpanic;
use cutover_devices::serial::SerialPort;
use cutover_devices::virtio::VirtioDevice;
use cutover_devices::virtio::block::Block;
use cutover_devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY_OFFSET};
use cutover_devices::virtio::net::Net;
use cutover_devices::virtio::rng::Rng;
use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::spec::{SerialSpec, VmSpec};
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Error;
use crate::acpi::VirtioNode;
use crate::cpu::Buses;
use crate::kvm::KvmVm;
use crate::layout::{
    COM1_GSI, COM1_PORT, COM1_PORTS, EVENT_DEVICE_GSI, I8042_PORT, I8042_PORTS, POWER_PORT, PVPANIC_PORT,
    VIRTIO_GSI_FIRST, VIRTIO_GSI_LAST, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START, VIRTIO_WINDOW,
};

/// Every device of a VM.
pub struct DeviceManager {
    virtio: Vec<Arc<Mutex<MmioTransport>>>,
    nodes: Vec<VirtioNode>,
    power_button: EventFd,
}

impl DeviceManager {
    /// Makes the devices of `spec`, puts them on `buses` and connects them to `vm`. Disk workers call `on_disk_thread`
    /// first.
    ///
    /// # Errors
    /// A file, tap or console of a device cannot be had, or KVM refused a connection.
    pub fn create(
        spec: &VmSpec,
        vm: &KvmVm,
        memory: &GuestMemory,
        buses: &mut Buses,
        event_loop: &EventLoopHandle,
        events: &GuestEventSink,
        on_disk_thread: &OnThread,
    ) -> Result<Self, Error> {
        let power_button = new_interrupt()?;
        vm.connect_interrupt(&power_button, EVENT_DEVICE_GSI)?;
        add_platform_devices(buses, events)?;
        add_serial_port(&spec.serial, vm, buses, event_loop, events)?;
        let mut builder = VirtioBuilder::new(vm, memory, buses, event_loop, events)?;
        for (index, disk) in spec.disks.iter().enumerate() {
            builder.add(format!("virtio-blk{index}"), Block::open(disk, on_disk_thread)?)?;
        }
        for (index, net) in spec.nets.iter().enumerate() {
            builder.add(format!("virtio-net{index}"), Net::open(net)?)?;
        }
        if spec.rng.is_some() {
            builder.add("virtio-rng".to_owned(), Rng::new())?;
        }
        let VirtioBuilder { virtio, nodes, .. } = builder;
        Ok(Self {
            virtio,
            nodes,
            power_button,
        })
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

    /// Stops every virtio device; from then on none touches guest memory. The vCPUs stand still.
    pub fn pause(&self) {
        for mut device in self.transports() {
            device.pause();
        }
    }

    /// Starts every device again that the guest had started.
    pub fn resume(&self) {
        for mut device in self.transports() {
            device.resume();
        }
    }

    fn transports(&self) -> impl Iterator<Item = MutexGuard<'_, MmioTransport>> {
        self.virtio
            .iter()
            .map(|device| device.lock().unwrap_or_else(PoisonError::into_inner))
    }
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
    event_loop: &EventLoopHandle,
    events: &GuestEventSink,
) -> Result<(), Error> {
    let interrupt = new_interrupt()?;
    vm.connect_interrupt(&interrupt, COM1_GSI)?;
    let port = Arc::new(Mutex::new(SerialPort::new(
        interrupt,
        Console::open(spec)?,
        events.clone(),
    )));
    event_loop.add(port.clone())?;
    buses.ports.insert(COM1_PORT.into(), COM1_PORTS.into(), port)?;
    Ok(())
}

fn new_interrupt() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK).map_err(Error::os("create an eventfd"))
}

/// Places virtio devices one after the other.
struct VirtioBuilder<'a> {
    vm: &'a KvmVm,
    memory: &'a GuestMemory,
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
        memory: &'a GuestMemory,
        buses: &'a mut Buses,
        event_loop: &'a EventLoopHandle,
        events: &'a GuestEventSink,
    ) -> Result<Self, Error> {
        let none_left = |_| out_of("MMIO address", "virtio devices");
        let windows = AddressAllocator::new(VIRTIO_MMIO_START, VIRTIO_MMIO_SIZE).map_err(none_left)?;
        let lines = IdAllocator::new(VIRTIO_GSI_FIRST, VIRTIO_GSI_LAST).map_err(none_left)?;
        Ok(Self {
            vm,
            memory,
            buses,
            event_loop,
            events,
            windows,
            lines,
            virtio: Vec::new(),
            nodes: Vec::new(),
        })
    }

    fn add(&mut self, name: String, device: impl VirtioDevice + 'static) -> Result<(), Error> {
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
            device,
            self.memory.clone(),
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
        self.virtio.push(transport);
        self.nodes.push(VirtioNode { address, gsi });
        Ok(())
    }
}

fn out_of(resource: &'static str, device: &str) -> Error {
    Error::OutOfResources {
        resource,
        device: device.to_owned(),
    }
}
