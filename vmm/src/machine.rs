//! A VM that has been built: vCPUs, devices and what both use, started, stopped and torn down as one. Decides nothing.

use std::sync::Arc;

use cutover_devices::event_loop::EventLoop;
use cutover_devices::guest_event::{GuestEvent, GuestEventSink};
use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::spec::VmSpec;

use crate::control::{Ending, Mailbox};
use crate::cpu::{self, Buses, Vcpu, VcpuHandle};
use crate::device_manager::DeviceManager;
use crate::dirty::Tracker;
use crate::driver::Options;
use crate::events::{EventKind, EventLog};
use crate::kvm::KvmVm;
use crate::lifecycle::GuestEnd;
use crate::seccomp::{self, ThreadKind};
use crate::stats::{MemoryStats, VcpuStats};
use crate::{Error, acpi, boot, memory};

/// See the module. Dropping it ends its threads and gives everything back.
pub struct Machine {
    // In the order they are to be dropped: vCPUs, then devices, then what both use.
    vcpus: Vec<VcpuHandle>,
    /// Its devices.
    pub devices: DeviceManager,
    _event_loop: EventLoop,
    _vm: KvmVm,
    /// What changes in its memory.
    pub tracker: Tracker,
    memory: GuestMemory,
}

impl Machine {
    /// Builds the VM of `spec`, of which the guest's end is reported to `driver`.
    ///
    /// # Errors
    /// The spec is wrong, a file is missing or of the wrong kind, or the host lacks something. Nothing is left behind.
    pub fn build(spec: &VmSpec, options: &Options, driver: &Arc<Mailbox>) -> Result<Self, Error> {
        spec.check()?;
        let memory = memory::map(&spec.memory)?;
        let vm = KvmVm::create(&memory)?;
        if usize::from(spec.cpus) > vm.cpus_max {
            return Err(Error::TooManyCpus {
                asked: spec.cpus,
                most: vm.cpus_max,
            });
        }
        let tracker = Tracker::new(&vm)?;
        let on_loop_thread = confined(options, ThreadKind::Devices);
        let event_loop = EventLoop::spawn("devices", move || on_loop_thread())?;
        let mut buses = Buses::default();
        let devices = DeviceManager::create(
            spec,
            &vm,
            &memory,
            &mut buses,
            &event_loop.handle(),
            &guest_events(driver.clone(), options.events.clone()),
            &confined(options, ThreadKind::Disk),
        )?;
        let entry = boot::load(&spec.boot, &memory)?;
        acpi::write_tables(&memory, spec.cpus, devices.virtio_nodes())?;
        cpu::install_kick_handler()?;
        let vcpus = (0..spec.cpus)
            .map(|cpu| Vcpu::create(&vm, cpu, spec.cpus))
            .collect::<Result<Vec<_>, _>>()?;
        vcpus[0].set_boot_state(&memory, entry)?;
        let vcpus = vcpus
            .into_iter()
            .map(|vcpu| vcpu.spawn(buses.clone(), driver.clone(), confined(options, ThreadKind::Vcpu)))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            vcpus,
            devices,
            _event_loop: event_loop,
            _vm: vm,
            tracker,
            memory,
        })
    }

    /// Lets devices and vCPUs run, for the first time or after [`stop`](Self::stop).
    pub fn run(&self) {
        self.devices.resume();
        self.vcpus.iter().for_each(VcpuHandle::run);
    }

    /// Stops vCPUs, then devices; on return nothing writes guest memory.
    ///
    /// The guest's clocks go on: kvmclock counts the host's time, so that after a pause of any length the guest's wall
    /// clock is right and its monotonic clock has not gone back. Its watchdogs are told of the pause when it runs again.
    pub fn stop(&self) {
        // All are told before the first is waited for, so that they stop together.
        let answers: Vec<_> = self.vcpus.iter().map(VcpuHandle::pause).collect();
        for answer in answers {
            // A vCPU thread that is gone will not run again either.
            let _ = answer.recv();
        }
        self.devices.pause();
    }

    /// What each vCPU has done so far.
    pub fn vcpu_stats(&self) -> Vec<VcpuStats> {
        self.vcpus.iter().map(VcpuHandle::stats).collect()
    }

    /// What the guest's memory takes.
    ///
    /// # Errors
    /// The operating system refused.
    pub fn memory_stats(&self) -> Result<MemoryStats, Error> {
        MemoryStats::of(&self.memory)
    }
}

/// Where devices send what the guest tells: its end to the state driver, the rest to the log.
fn guest_events(driver: Arc<Mailbox>, log: EventLog) -> GuestEventSink {
    Arc::new(move |event| {
        let end = match event {
            GuestEvent::Shutdown => GuestEnd::Shutdown,
            GuestEvent::Reset => GuestEnd::Reset,
            GuestEvent::Panic => GuestEnd::Panic,
            GuestEvent::ConsoleQuit => GuestEnd::ConsoleQuit,
            GuestEvent::DeviceFailed { device, reason } => {
                log.push(EventKind::DeviceFailed { device, reason });
                return;
            }
        };
        driver.report(Ending::Guest(end));
    })
}

/// What a thread of this kind calls first.
fn confined(options: &Options, kind: ThreadKind) -> OnThread {
    let confine = options.seccomp;
    Arc::new(move || {
        if confine {
            seccomp::confine_or_abort(kind);
        }
    })
}
