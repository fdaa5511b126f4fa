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
use crate::snapshot::ClockPolicy;
use crate::state::{DevicesState, MachineState, VmState};
use crate::stats::{MemoryStats, VcpuStats};
use crate::{Error, acpi, boot, generation, memory};

/// See the module. Dropping it ends its threads and gives everything back.
pub struct Machine {
    // In the order they are to be dropped: vCPUs, then devices, then what both use.
    vcpus: Vec<VcpuHandle>,
    /// Its devices.
    pub devices: DeviceManager,
    _event_loop: EventLoop,
    vm: KvmVm,
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
        let frame = Frame::create(spec, memory::map(&spec.memory)?, options, driver, None)?;
        let entry = boot::load(&spec.boot, &frame.memory)?;
        acpi::write_tables(&frame.memory, spec.cpus, frame.devices.virtio_nodes())?;
        generation::renew(&frame.memory)?;
        let vcpus = (0..spec.cpus)
            .map(|cpu| Vcpu::create(&frame.vm, cpu, spec.cpus))
            .collect::<Result<Vec<_>, _>>()?;
        vcpus[0].set_boot_state(&frame.memory, entry)?;
        frame.complete(vcpus, options, driver)
    }

    /// Builds the VM of `spec` in the state that it was in when `state` was [saved](Self::save), with the `memory` that
    /// it had then, stopped. The guest's clocks go on as `clock` says.
    ///
    /// KVM reads and writes some pages of `memory` here, such as that of the guest's kvmclock: memory that is filled
    /// page by page has to be so already.
    ///
    /// # Errors
    /// As [`build`](Self::build); or this host's CPU lacks what the guest uses, or `state` is not one that a VM of
    /// `spec` can be in.
    pub fn restore(
        spec: &VmSpec,
        memory: GuestMemory,
        state: &MachineState,
        clock: ClockPolicy,
        options: &Options,
        driver: &Arc<Mailbox>,
    ) -> Result<Self, Error> {
        spec.check()?;
        let frame = Frame::create(spec, memory, options, driver, Some(&state.devices))?;
        state.check(spec.cpus, &frame.vm)?;
        let passed_ns = state.vm.passed_ns(clock);
        let vcpus = (0..spec.cpus)
            .zip(&state.vcpus)
            .map(|(cpu, state)| Vcpu::restore(&frame.vm, cpu, state, passed_ns))
            .collect::<Result<Vec<_>, _>>()?;
        state.vm.restore(&frame.vm.fd, passed_ns)?;
        generation::renew(&frame.memory)?;
        frame.devices.announce_generation();
        frame.complete(vcpus, options, driver)
    }

    /// The state of the machine, which is [stopped](Self::stop), without the contents of memory and disks. Changes
    /// nothing.
    ///
    /// # Errors
    /// KVM refused to tell, or a vCPU's thread is gone.
    pub fn save(&self) -> Result<MachineState, Error> {
        // All are asked before the first answers, so that they save at the same time.
        let answers: Vec<_> = self.vcpus.iter().map(VcpuHandle::save).collect();
        let vcpus = (0..).zip(answers).map(|(cpu, answer)| {
            answer.recv().map_err(|_| Error::Vcpu {
                cpu,
                reason: "its thread is gone".to_owned(),
            })?
        });
        Ok(MachineState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: VmState::save(&self.vm.fd)?,
            devices: self.devices.save(),
        })
    }

    /// Its RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
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

/// A machine without vCPUs.
struct Frame {
    devices: DeviceManager,
    event_loop: EventLoop,
    buses: Buses,
    vm: KvmVm,
    tracker: Tracker,
    memory: GuestMemory,
}

impl Frame {
    /// Makes all that comes before the vCPUs, devices new or as they were `saved`.
    fn create(
        spec: &VmSpec,
        memory: GuestMemory,
        options: &Options,
        driver: &Arc<Mailbox>,
        saved: Option<&DevicesState>,
    ) -> Result<Self, Error> {
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
            &mut buses,
            &event_loop.handle(),
            &guest_events(driver.clone(), options.events.clone()),
            &confined(options, ThreadKind::Disk),
            saved,
        )?;
        Ok(Self {
            devices,
            event_loop,
            buses,
            vm,
            tracker,
            memory,
        })
    }

    /// Adds the vCPUs and gives each a thread, on which it is paused.
    fn complete(self, vcpus: Vec<Vcpu>, options: &Options, driver: &Arc<Mailbox>) -> Result<Machine, Error> {
        cpu::install_kick_handler()?;
        let vcpus = vcpus
            .into_iter()
            .map(|vcpu| vcpu.spawn(self.buses.clone(), driver.clone(), confined(options, ThreadKind::Vcpu)))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Machine {
            vcpus,
            devices: self.devices,
            _event_loop: self.event_loop,
            vm: self.vm,
            tracker: self.tracker,
            memory: self.memory,
        })
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
pub fn confined(options: &Options, kind: ThreadKind) -> OnThread {
    let confine = options.seccomp;
    Arc::new(move || {
        if confine {
            seccomp::confine_or_abort(kind);
        }
    })
}

#[cfg(test)]
mod tests;
