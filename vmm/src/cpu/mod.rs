//! vCPUs: what one is made of, and the thread that runs it.
//!
//! ```text
//!            Install              Run                     guest ended itself, KVM failed
//!  Reserved ─────────► Paused ──────────► Running ──────────────────────────► Parked
//!                        ▲    Pause(ack)     │                                  │
//!                        └───────────────────┘           End: the thread ends from every state
//! ```
//! Making a thread and confining it takes longer than anything else, so that is done before the vCPU has a state: whoever
//! waits for one that comes from elsewhere has the threads ready. A state is set before the vCPU is
//! [installed](VcpuHandle::install) on its thread, and saved there while it is paused.
//! Commands come over a channel; a running vCPU is kicked so that it looks there.

mod counters;
mod cpuid;
mod kick;
mod registers;
mod throttle;

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use cutover_devices::bus::Bus;
use cutover_devices::{GuestMemory, OnThread, THREAD_STACK_SIZE};
use kvm_bindings::{CpuId, KVM_EXIT_DIRTY_RING_FULL};
use kvm_ioctls::{VcpuExit, VcpuFd};

use self::counters::{ExitCounters, ExitKind};
use self::cpuid::Topology;
use self::kick::{ImmediateExit, Kicker};
use self::throttle::{Rest, Throttled};
use crate::Error;
use crate::boot::Entry;
use crate::control::{Ending, Mailbox};
use crate::dirty::{Rings, Tracker};
use crate::kvm::KvmVm;
use crate::lifecycle::GuestEnd;
use crate::state::{Inventory, VcpuState};
use crate::stats::VcpuStats;

pub use self::cpuid::shown_here;
pub use self::kick::install_handler as install_kick_handler;
pub use self::throttle::Throttle;

/// The two buses a vCPU's exits lead to.
#[derive(Clone, Default)]
pub struct Buses {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// What the state driver tells a vCPU thread.
enum Command {
    /// Of a thread that has no vCPU yet.
    Install(Box<Vcpu>),
    Run,
    Pause(Sender<()>),
    /// Of a vCPU that is paused.
    Save(Sender<Result<VcpuState, Error>>),
    End,
}

/// The state driver's end of a vCPU thread; dropping it ends the thread.
pub struct VcpuHandle {
    cpu: u8,
    commands: Sender<Command>,
    kicker: Arc<Kicker>,
    rest: Arc<Rest>,
    exits: Arc<ExitCounters>,
    /// Until it is joined.
    thread: Option<JoinHandle<()>>,
}

/// A vCPU that KVM has just made: it has neither a CPUID nor a state.
pub struct BareVcpu {
    cpu: u8,
    fd: VcpuFd,
    rings: Option<Rings>,
}

/// A vCPU, owned by its thread once it is installed there.
pub struct Vcpu {
    cpu: u8,
    fd: VcpuFd,
    /// What it was shown.
    cpuid: CpuId,
    inventory: Arc<Inventory>,
    /// Its dirty ring and those of the others, if KVM keeps such.
    rings: Option<Rings>,
}

impl BareVcpu {
    /// Makes vCPU number `cpu`, of which `tracker` notices what it writes.
    ///
    /// # Errors
    /// KVM refused it.
    pub fn create(vm: &KvmVm, cpu: u8, tracker: &Tracker) -> Result<Self, Error> {
        let fd = vm.fd.create_vcpu(u64::from(cpu)).map_err(Error::kvm("create a vCPU"))?;
        let rings = tracker.add_vcpu(&fd)?;
        Ok(Self { cpu, fd, rings })
    }

    /// Makes a thread for the vCPU, which calls `on_thread` first and waits for it.
    ///
    /// # Errors
    /// The thread could not be created.
    pub fn spawn_thread(
        &self,
        vm: &KvmVm,
        buses: Buses,
        driver: Arc<Mailbox>,
        on_thread: OnThread,
    ) -> Result<VcpuHandle, Error> {
        let (commands, received) = channel();
        let cpu = self.cpu;
        let kicker = Arc::new(Kicker::new(ImmediateExit::map(&self.fd, vm.fd.run_size())?));
        let (exits, rest) = (Arc::<ExitCounters>::default(), Arc::<Rest>::default());
        let (counters, kicked, rests) = (exits.clone(), kicker.clone(), rest.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{cpu}"))
            .stack_size(THREAD_STACK_SIZE)
            .spawn(move || {
                on_thread();
                kicked.is_for_this_thread();
                // Without a vCPU there is nothing but the end.
                if let Ok(Command::Install(vcpu)) = received.recv() {
                    VcpuThread {
                        vcpu: *vcpu,
                        buses,
                        driver,
                        kicker: kicked,
                        rest: rests,
                        exits: counters,
                        commands: received,
                    }
                    .serve();
                }
            })
            .map_err(Error::os("create a vCPU thread"))?;
        Ok(VcpuHandle {
            cpu,
            commands,
            kicker,
            rest,
            exits,
            thread: Some(thread),
        })
    }

    /// Makes this one of `cpus` vCPUs as they are after a reset.
    ///
    /// # Errors
    /// KVM refused.
    pub fn reset(self, vm: &KvmVm, cpus: u8) -> Result<Vcpu, Error> {
        let tsc_khz = self
            .fd
            .get_tsc_khz()
            .map_err(Error::kvm("tell a vCPU's TSC frequency"))?;
        let topology = Topology {
            cpu: self.cpu,
            cpus,
            tsc_khz,
            tsc_deadline: vm.tsc_deadline,
        };
        let cpuid = cpuid::for_vcpu(&vm.supported_cpuid, topology)?;
        let vcpu = self.with_cpuid(vm, cpuid)?;
        registers::set_msrs(&vcpu.fd)?;
        set_lapic_lines(&vcpu.fd)?;
        Ok(vcpu)
    }

    /// Makes this the vCPU that was in `state`, after `passed_ns` of the guest's time.
    ///
    /// # Errors
    /// KVM refused its state.
    pub fn load(self, vm: &KvmVm, state: &VcpuState, passed_ns: u64) -> Result<Vcpu, Error> {
        let vcpu = self.with_cpuid(vm, state.cpuid()?)?;
        state.restore(&vcpu.fd, &vm.inventory, passed_ns)?;
        Ok(vcpu)
    }

    fn with_cpuid(self, vm: &KvmVm, cpuid: CpuId) -> Result<Vcpu, Error> {
        self.fd.set_cpuid2(&cpuid).map_err(Error::kvm("set a vCPU's CPUID"))?;
        Ok(Vcpu {
            cpu: self.cpu,
            fd: self.fd,
            cpuid,
            inventory: vm.inventory.clone(),
            rings: self.rings,
        })
    }
}

impl Vcpu {
    /// What it was shown.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Makes this the vCPU that boots.
    ///
    /// # Errors
    /// KVM refused, or the boot structures do not fit in `memory`.
    pub fn set_boot_state(&self, memory: &GuestMemory, entry: Entry) -> Result<(), Error> {
        registers::set_boot_state(&self.fd, memory, entry)
    }
}

/// Connects the 8259 and NMI lines to the local APIC as firmware leaves them (Intel MultiProcessor Specification 3.6.2).
fn set_lapic_lines(fd: &VcpuFd) -> Result<(), Error> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const MODE_EXTINT: u32 = 0b111 << 8;
    const MODE_NMI: u32 = 0b100 << 8;
    let mut lapic = fd.get_lapic().map_err(Error::kvm("read a vCPU's local APIC"))?;
    for (register, mode) in [(LINT0, MODE_EXTINT), (LINT1, MODE_NMI)] {
        for (slot, byte) in lapic.regs[register..].iter_mut().zip(mode.to_le_bytes()) {
            *slot = byte.cast_signed();
        }
    }
    fd.set_lapic(&lapic).map_err(Error::kvm("set a vCPU's local APIC"))
}

impl VcpuHandle {
    /// Gives the thread its vCPU, paused. Comes before everything else.
    pub fn install(&self, vcpu: Vcpu) {
        // A thread that is gone has panicked, which whoever joins it reports.
        let _ = self.commands.send(Command::Install(Box::new(vcpu)));
    }

    /// Lets the vCPU run.
    pub fn run(&self) {
        // A thread that is gone has said why through the event channel.
        let _ = self.commands.send(Command::Run);
    }

    /// Asks the vCPU to stop; the answer arrives on the returned channel, with all I/O of the vCPU complete.
    pub fn pause(&self) -> Receiver<()> {
        let (done, answer) = channel();
        let _ = self.commands.send(Command::Pause(done));
        self.kicker.kick();
        answer
    }

    /// Asks the vCPU, which is paused, for its state; the answer arrives on the returned channel.
    pub fn save(&self) -> Receiver<Result<VcpuState, Error>> {
        let (saved, answer) = channel();
        let _ = self.commands.send(Command::Save(saved));
        answer
    }

    /// What a [`Throttle`] needs of it.
    pub fn throttled(&self) -> Throttled {
        Throttled {
            kicker: self.kicker.clone(),
            rest: self.rest.clone(),
        }
    }

    /// What it has done so far.
    pub fn stats(&self) -> VcpuStats {
        VcpuStats {
            cpu: self.cpu,
            cpu_time_ns: self.thread.as_ref().map_or(0, cpu_time_ns),
            exits: self.exits.read(),
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::End);
        self.kicker.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(cpu = self.cpu, "vCPU thread panicked");
        }
    }
}

/// Processor time of a thread, 0 if it has ended.
fn cpu_time_ns(thread: &JoinHandle<()>) -> u64 {
    let mut clock = 0;
    // SAFETY: the thread has not been joined, so its handle is valid; `clock` is a valid place for the result.
    if unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) } != 0 {
        return 0;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return 0;
    }
    let time = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    let (Ok(seconds), Ok(nanoseconds)) = time else { return 0 };
    u64::try_from(Duration::new(seconds, nanoseconds).as_nanos()).unwrap_or(u64::MAX)
}

/// Why [`VcpuThread::run_guest`] came back.
enum Stopped {
    /// Somebody wants something.
    Kicked,
    /// This vCPU can run no further; the state driver has been told.
    ForGood,
}

struct VcpuThread {
    vcpu: Vcpu,
    buses: Buses,
    driver: Arc<Mailbox>,
    kicker: Arc<Kicker>,
    rest: Arc<Rest>,
    exits: Arc<ExitCounters>,
    commands: Receiver<Command>,
}

impl VcpuThread {
    fn serve(mut self) {
        let mut running = false;
        loop {
            let command = if running {
                self.next_command()
            } else {
                self.commands.recv().ok()
            };
            match command {
                Some(Command::Run) => {
                    self.excuse_pause();
                    running = true;
                }
                Some(Command::Pause(done)) => {
                    self.complete_pending_io();
                    running = false;
                    // The state driver may have given up waiting because it is ending.
                    let _ = done.send(());
                }
                Some(Command::Save(saved)) => {
                    let vcpu = &self.vcpu;
                    let _ = saved.send(VcpuState::save(&vcpu.fd, &vcpu.inventory, &vcpu.cpuid));
                }
                // It has one already.
                Some(Command::Install(_)) => {}
                Some(Command::End) => return,
                None if running => running = matches!(self.run_guest(), Stopped::Kicked),
                None => return,
            }
        }
    }

    /// A command to the running vCPU, if there is one. If it is slowed down, it stands still here.
    fn next_command(&self) -> Option<Command> {
        match self.rest.left() {
            Some(left) => self.commands.recv_timeout(left).ok(),
            None => self.commands.try_recv().ok(),
        }
    }

    /// Runs the guest until a kick, or until it cannot go on.
    fn run_guest(&mut self) -> Stopped {
        let exits = &self.exits;
        let ending = loop {
            let reason = match self.vcpu.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    exits.count(ExitKind::IoIn);
                    if !self.buses.ports.read(port.into(), data) {
                        data.fill(0xff);
                    }
                    continue;
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    exits.count(ExitKind::IoOut);
                    self.buses.ports.write(port.into(), data);
                    continue;
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    exits.count(ExitKind::MmioRead);
                    if !self.buses.mmio.read(address, data) {
                        data.fill(0xff);
                    }
                    continue;
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    exits.count(ExitKind::MmioWrite);
                    self.buses.mmio.write(address, data);
                    continue;
                }
                Ok(VcpuExit::Intr) => return self.kicked(),
                Err(error) if error.errno() == libc::EINTR => return self.kicked(),
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Ok(VcpuExit::Shutdown) => {
                    tracing::error!(cpu = self.vcpu.cpu, "triple fault");
                    break Ending::Guest(GuestEnd::Panic);
                }
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => match self.drain_rings() {
                    Ok(()) => continue,
                    Err(error) => format!("its dirty ring is full: {error}"),
                },
                Ok(VcpuExit::FailEntry(reason, _)) => format!("the hardware refused its state, reason {reason:#x}"),
                Ok(VcpuExit::InternalError) => self.internal_error(),
                Ok(other) => format!("unexpected exit {other:?}"),
                Err(error) => format!("KVM_RUN failed: {error}"),
            };
            break Ending::VcpuFailed {
                cpu: self.vcpu.cpu,
                reason,
            };
        };
        self.exits.count(ExitKind::Failed);
        self.driver.report(ending);
        Stopped::ForGood
    }

    /// Has KVM tell the guest, before it runs again, that it stood still, so that its watchdogs do not take the pause for
    /// a lockup. A guest without kvmclock, or that has not set it up yet, cannot be told.
    fn excuse_pause(&self) {
        if let Err(error) = self.vcpu.fd.kvmclock_ctrl()
            && error.errno() != libc::EINVAL
        {
            tracing::warn!(cpu = self.vcpu.cpu, %error, "cannot tell the guest that it was paused");
        }
    }

    /// Makes room in the vCPU's dirty ring.
    fn drain_rings(&self) -> Result<(), Error> {
        self.vcpu.rings.iter().try_for_each(|rings| rings.drain().map(drop))
    }

    fn kicked(&self) -> Stopped {
        self.exits.count(ExitKind::Interrupted);
        self.kicker.immediate_exit.clear();
        Stopped::Kicked
    }

    /// KVM finishes an access whose answer we gave only at the next `KVM_RUN`; state read before that is half done.
    fn complete_pending_io(&mut self) {
        self.kicker.immediate_exit.set();
        let outcome = self.vcpu.fd.run().map(|exit| format!("{exit:?}"));
        self.kicker.immediate_exit.clear();
        match outcome {
            Err(error) if error.errno() == libc::EINTR => {}
            other => tracing::warn!(cpu = self.vcpu.cpu, ?other, "vCPU did not stop at once"),
        }
    }

    /// What KVM could not do for the guest, such as emulating an instruction.
    fn internal_error(&mut self) -> String {
        const EMULATION: u32 = 1;
        let run = self.vcpu.fd.get_kvm_run();
        // SAFETY: KVM filled this member of the union for the exit KVM_EXIT_INTERNAL_ERROR that just happened.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let at = self.vcpu.fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
        if suberror == EMULATION {
            format!(
                "KVM cannot emulate the instruction at {at:#x} (is this KVM without vmx or svm? see `cutover check`)"
            )
        } else {
            format!("KVM internal error {suberror} at {at:#x}")
        }
    }
}
