//! The state driver: the one thread that owns the VM and makes every lifecycle decision (DESIGN invariant 1).
//!
//! Everyone else, devices, vCPUs, signal handlers, sends it an [`Event`]; what a request may do in which state is
//! decided by [`lifecycle`](crate::lifecycle).

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use cutover_devices::OnThread;
use cutover_devices::event_loop::EventLoop;
use cutover_devices::guest_event::{GuestEvent, GuestEventSink};
use cutover_snapshot::spec::VmSpec;

use crate::cpu::{self, Buses, Vcpu, VcpuHandle};
use crate::device_manager::DeviceManager;
use crate::kvm::KvmVm;
use crate::lifecycle::{Refusal, Request, State};
use crate::seccomp::{self, ThreadKind};
use crate::{Error, acpi, boot, memory};

/// How a VM came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reboot,
    /// The guest's kernel panicked, or a vCPU met a triple fault.
    Panic,
    /// Somebody ended it by force.
    Ended,
}

/// How to run, apart from what the guest sees.
#[derive(Clone, Debug)]
pub struct Options {
    /// Confine every thread to the system calls it needs.
    pub seccomp: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { seccomp: true }
    }
}

/// What reaches the state driver.
pub enum Event {
    /// From the guest, through a device.
    Guest(GuestEvent),
    /// A vCPU can go no further because the guest wrecked its own state.
    TripleFault {
        /// Which.
        cpu: u8,
    },
    /// A vCPU can go no further because KVM cannot.
    VcpuFailed {
        /// Which.
        cpu: u8,
        /// What KVM said.
        reason: String,
    },
    /// From a [`Controller`].
    Request {
        /// What is asked.
        request: Request,
        /// Where the answer goes.
        answer: Sender<Result<(), Refusal>>,
    },
}

/// The way to the state driver, for everyone.
#[derive(Clone)]
pub struct EventSender(Sender<Event>);

impl EventSender {
    /// Sends without waiting.
    pub fn send(&self, event: Event) {
        // After the VM's end nobody listens any more, and nothing is left to be done.
        let _ = self.0.send(event);
    }
}

/// Asks things of a running VM, from any thread.
#[derive(Clone)]
pub struct Controller {
    events: EventSender,
}

impl Controller {
    /// Asks for `request` and waits for the answer.
    ///
    /// # Errors
    /// Refused, with the reason; the VM is as before.
    pub fn request(&self, request: Request) -> Result<(), Refusal> {
        let (answer, decided) = channel();
        self.events.send(Event::Request { request, answer });
        decided.recv().unwrap_or(Err(Refusal::Ended))
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// The guest does not run.
    pub fn press_power_button(&self) -> Result<(), Refusal> {
        self.request(Request::PressPowerButton)
    }

    /// Ends the VM by force.
    ///
    /// # Errors
    /// It has ended already.
    pub fn end(&self) -> Result<(), Refusal> {
        self.request(Request::End)
    }
}

/// A VM, built and owned by whoever will be its state driver.
pub struct Vmm {
    // In the order they are to be dropped: vCPUs, then devices, then what both use.
    vcpus: Vec<VcpuHandle>,
    devices: DeviceManager,
    _event_loop: EventLoop,
    _vm: KvmVm,
    state: State,
    events: Receiver<Event>,
    sender: EventSender,
    options: Options,
}

impl Vmm {
    /// Builds the VM of `spec`: memory, devices, boot image, vCPUs, everything but running it.
    ///
    /// # Errors
    /// The spec is wrong, a file is missing or of the wrong kind, or the host lacks something. Nothing is left behind.
    pub fn build(spec: &VmSpec, options: &Options) -> Result<Self, Error> {
        spec.check()?;
        if options.seccomp {
            seccomp::install_violation_handler()?;
        }
        let memory = memory::map(&spec.memory)?;
        let vm = KvmVm::create(&memory)?;
        if usize::from(spec.cpus) > vm.cpus_max {
            return Err(Error::TooManyCpus {
                asked: spec.cpus,
                most: vm.cpus_max,
            });
        }
        let (sender, events) = channel();
        let sender = EventSender(sender);
        let on_loop_thread = confined(options, ThreadKind::Devices);
        let event_loop = EventLoop::spawn("devices", move || on_loop_thread())?;
        let mut buses = Buses::default();
        let devices = DeviceManager::create(
            spec,
            &vm,
            &memory,
            &mut buses,
            &event_loop.handle(),
            &guest_events(&sender),
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
            .map(|vcpu| vcpu.spawn(buses.clone(), sender.clone(), confined(options, ThreadKind::Vcpu)))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            vcpus,
            devices,
            _event_loop: event_loop,
            _vm: vm,
            state: State::Built,
            events,
            sender,
            options: options.clone(),
        })
    }

    /// A way for other threads to ask things of this VM.
    pub fn controller(&self) -> Controller {
        Controller {
            events: self.sender.clone(),
        }
    }

    /// Runs the VM to its end; the calling thread is its state driver.
    ///
    /// # Errors
    /// The monitor, not the guest, could not go on.
    pub fn run(mut self) -> Result<Exit, Error> {
        if self.options.seccomp {
            seccomp::confine(ThreadKind::StateDriver)?;
        }
        self.enter(State::Running, Request::Resume);
        let exit = self.drive();
        for vcpu in std::mem::take(&mut self.vcpus) {
            vcpu.end();
        }
        exit
    }

    fn drive(&mut self) -> Result<Exit, Error> {
        loop {
            // `self.sender` keeps the channel open.
            let Ok(event) = self.events.recv() else {
                return Ok(Exit::Ended);
            };
            match event {
                Event::Guest(GuestEvent::Shutdown) => return Ok(Exit::Shutdown),
                Event::Guest(GuestEvent::Reset) => return Ok(Exit::Reboot),
                Event::Guest(GuestEvent::Panic) => return Ok(Exit::Panic),
                Event::Guest(GuestEvent::ConsoleQuit) => return Ok(Exit::Ended),
                // The device has logged why; the guest goes on without it.
                Event::Guest(GuestEvent::DeviceFailed { .. }) => {}
                Event::TripleFault { cpu } => {
                    tracing::error!(cpu, "triple fault");
                    return Ok(Exit::Panic);
                }
                Event::VcpuFailed { cpu, reason } => return Err(Error::Vcpu { cpu, reason }),
                Event::Request { request, answer } => {
                    let decision = self.state.after(request).map(|next| self.enter(next, request));
                    // Whoever asked may be gone.
                    let _ = answer.send(decision);
                    if self.state == State::Ended {
                        return Ok(Exit::Ended);
                    }
                }
            }
        }
    }

    /// Does what was accepted.
    fn enter(&mut self, next: State, request: Request) {
        match request {
            Request::Resume => {
                self.devices.resume();
                self.vcpus.iter().for_each(VcpuHandle::run);
            }
            Request::Pause => {
                // All are told before the first is waited for, so that they stop together.
                let answers: Vec<_> = self.vcpus.iter().map(VcpuHandle::pause).collect();
                for answer in answers {
                    // A vCPU thread that is gone will not run again either.
                    let _ = answer.recv();
                }
                self.devices.pause();
            }
            Request::PressPowerButton => self.devices.press_power_button(),
            Request::End => {}
        }
        self.state = next;
    }
}

fn guest_events(sender: &EventSender) -> GuestEventSink {
    let sender = sender.clone();
    Arc::new(move |event| sender.send(Event::Guest(event)))
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
