//! A VM that has been built: vCPUs, devices and what both use, started, stopped and torn down as one. Decides nothing.

use std::sync::Arc;
use std::time::Instant;

use cutover_devices::event_loop::EventLoop;
use cutover_devices::guest_event::{GuestEvent, GuestEventSink};
use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::manifest::CpuNeeds;
use cutover_snapshot::spec::VmSpec;
use kvm_bindings::CpuId;

use crate::control::{Ending, Mailbox};
use crate::cpu::{self, BareVcpu, Buses, Throttle, Vcpu, VcpuHandle};
use crate::device_manager::{DeviceManager, DiskLocks, HostSide};
use crate::dirty::Tracker;
use crate::driver::Options;
use crate::events::{EventKind, EventLog};
use crate::kvm::KvmVm;
use crate::lifecycle::GuestEnd;
use crate::seccomp::{self, ThreadKind};
use crate::state::{MachineState, VmState};
use crate::stats::{MemoryStats, VcpuStats};
use crate::{Error, acpi, boot, generation, memory, state};

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
    /// What its vCPUs were shown.
    cpuid: CpuId,
}

impl Machine {
    /// Builds the VM of `spec`, of which the guest's end is reported to `driver`.
    ///
    /// # Errors
    /// The spec is wrong, a file is missing or of the wrong kind, or the host lacks something. Nothing is left behind.
    pub fn build(spec: &VmSpec, options: &Options, driver: &Arc<Mailbox>) -> Result<Self, Error> {
        spec.check()?;
        let memory = memory::map(&spec.memory)?;
        Reserved::create(spec, memory, DiskLocks::Taken, options, driver)?.boot(spec)
    }

    /// Has the guest know that it is no longer the only one of its past: another may have been restored from the same
    /// state.
    ///
    /// # Errors
    /// There is no randomness to be had.
    pub fn renew_generation(&self) -> Result<(), Error> {
        generation::renew(&self.memory)?;
        self.devices.announce_generation();
        Ok(())
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

    /// What its guest needs of a host's CPU.
    pub fn cpu_needs(&self) -> CpuNeeds {
        state::cpu_needs(self.cpuid.as_slice())
    }

    /// Its RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Lets devices and vCPUs run, for the first time or after [`stop`](Self::stop). Returns when vCPUs were told to: they
    /// may have taken the processor since.
    pub fn run(&self) -> Instant {
        self.devices.resume();
        let at = Instant::now();
        self.vcpus.iter().for_each(VcpuHandle::run);
        at
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

    /// What slows its guest down; at full speed for now.
    pub fn throttle(&self) -> Throttle {
        Throttle::of(self.vcpus.iter().map(VcpuHandle::throttled).collect())
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

/// A machine that is complete but for the state of vCPUs and devices: memory, threads and all that takes time is there.
/// Dropping it gives everything back.
pub struct Reserved {
    // In the order they are to be dropped, as those of the machine.
    threads: Vec<VcpuHandle>,
    vcpus: Vec<BareVcpu>,
    devices: DeviceManager,
    event_loop: EventLoop,
    vm: KvmVm,
    tracker: Tracker,
    memory: GuestMemory,
}

impl Reserved {
    /// Makes all there is to the VM of `spec` before it has a state, with this `memory`. The guest's end will be reported
    /// to `driver`.
    ///
    /// # Errors
    /// As [`Machine::build`], but for those of boot files.
    pub fn create(
        spec: &VmSpec,
        memory: GuestMemory,
        disk_locks: DiskLocks,
        options: &Options,
        driver: &Arc<Mailbox>,
    ) -> Result<Self, Error> {
        spec.check()?;
        // What takes no VM comes first: one that was begun may not be there yet.
        let kind = match spec.vsock {
            Some(_) => ThreadKind::DevicesWithVsock,
            None => ThreadKind::Devices,
        };
        let on_loop_thread = confined(options, kind);
        let event_loop = EventLoop::spawn("devices", move || on_loop_thread())?;
        let on_disk_thread = confined(options, ThreadKind::Disk);
        let on_vcpu_thread = confined(options, ThreadKind::Vcpu);
        let vm = KvmVm::create(&memory)?;
        if usize::from(spec.cpus) > vm.cpus_max {
            return Err(Error::TooManyCpus {
                asked: spec.cpus,
                most: vm.cpus_max,
            });
        }
        let tracker = Tracker::new(&vm, options.dirty_log.settle(&options.events)?)?;
        let mut buses = Buses::default();
        let devices = DeviceManager::create(
            spec,
            disk_locks,
            &vm,
            &mut buses,
            &HostSide {
                event_loop: &event_loop.handle(),
                events: &guest_events(driver.clone(), options.events.clone()),
                on_disk_thread: &on_disk_thread,
                metadata: &options.metadata,
            },
        )?;
        cpu::install_kick_handler()?;
        let vcpus = (0..spec.cpus)
            .map(|cpu| BareVcpu::create(&vm, cpu, &tracker))
            .collect::<Result<Vec<_>, _>>()?;
        let threads = vcpus
            .iter()
            .map(|vcpu| vcpu.spawn_thread(&vm, buses.clone(), driver.clone(), on_vcpu_thread.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            threads,
            vcpus,
            devices,
            event_loop,
            vm,
            tracker,
            memory,
        })
    }

    /// What changes in its memory.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Makes it a machine that boots what `spec` says.
    fn boot(mut self, spec: &VmSpec) -> Result<Machine, Error> {
        let entry = boot::load(&spec.boot, &self.memory)?;
        acpi::write_tables(&self.memory, spec.cpus, self.devices.virtio_nodes())?;
        generation::renew(&self.memory)?;
        let vcpus = std::mem::take(&mut self.vcpus)
            .into_iter()
            .map(|vcpu| vcpu.reset(&self.vm, spec.cpus))
            .collect::<Result<Vec<_>, _>>()?;
        vcpus[0].set_boot_state(&self.memory, entry)?;
        self.complete(vcpus)
    }

    /// Makes it a machine in the state in which `state` was [saved](Machine::save), with the memory as it was then. The
    /// guest's clocks go on as if so much time had [passed](VmState::passed_ns).
    ///
    /// KVM reads and writes some pages of memory here, such as that of the guest's kvmclock: memory that is filled page
    /// by page has to be so already.
    ///
    /// # Errors
    /// This host's CPU lacks what the guest uses, or `state` is not one that this VM can be in.
    pub fn load(mut self, state: &MachineState, passed_ns: u64) -> Result<Machine, Error> {
        state.check(self.vcpus.len(), &self.vm)?;
        self.devices.load(&state.devices)?;
        let vcpus = std::mem::take(&mut self.vcpus)
            .into_iter()
            .zip(&state.vcpus)
            .map(|(vcpu, state)| vcpu.load(&self.vm, state, passed_ns))
            .collect::<Result<Vec<_>, _>>()?;
        state.vm.restore(&self.vm.fd, passed_ns)?;
        self.complete(vcpus)
    }

    /// Gives each thread its vCPU, paused, and the serial port its console.
    fn complete(self, vcpus: Vec<Vcpu>) -> Result<Machine, Error> {
        let cpuid = vcpus[0].cpuid().clone();
        for (thread, vcpu) in self.threads.iter().zip(vcpus) {
            thread.install(vcpu);
        }
        self.devices.open_console()?;
        Ok(Machine {
            vcpus: self.threads,
            devices: self.devices,
            _event_loop: self.event_loop,
            vm: self.vm,
            tracker: self.tracker,
            memory: self.memory,
            cpuid,
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

/// What threads of this kind call first.
pub fn confined(options: &Options, kind: ThreadKind) -> OnThread {
    let filter = options.seccomp.then(|| seccomp::Filter::of(kind));
    Arc::new(move || {
        if let Some(filter) = &filter {
            filter.confine_or_abort();
        }
    })
}

#[cfg(test)]
mod tests;
