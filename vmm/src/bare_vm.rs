//! What every VM has: what takes longest of making one, begun as early as it is known that one will be needed.
//!
//! It is mostly waiting. Linux 6.1, among others, starts a thread for each VM that it moves to the process's control groups,
//! and for that waits until all CPUs have taken notice (RCU): for some ticks of the host's clock. Creating interrupt
//! controllers and timer waits once more. Meanwhile the process can read command lines, configurations and snapshots.

use std::sync::mpsc;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cutover_devices::THREAD_STACK_SIZE;
use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::signal::block_signal;

use crate::Error;
use crate::host::NEEDED_CAPABILITIES;
use crate::kvm::{open, supported_cpuid};
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::state::Inventory;

/// A VM without memory, vCPUs and devices.
pub struct BareVm {
    /// The VM's file descriptor.
    pub fd: VmFd,
    /// What CPUs may show a guest on this host.
    pub supported_cpuid: CpuId,
    /// Most vCPUs KVM allows.
    pub cpus_max: usize,
    /// Whether the local APIC's timer has the TSC-deadline mode.
    pub tsc_deadline: bool,
    /// What there is of a vCPU's state.
    pub inventory: Inventory,
}

/// What the thread that creates it takes of a processor before it waits.
const HEAD_START: Duration = Duration::from_micros(500);

/// The one that was begun, until somebody takes it.
static BEGUN: Mutex<Option<JoinHandle<Result<BareVm, Error>>>> = Mutex::new(None);

/// Begins to create what KVM has of the VM that this process builds or restores next, if that is not begun yet. If it
/// fails, whoever builds that VM is told.
pub fn begin() {
    let mut begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
    if begun.is_some() {
        return;
    }
    let (end, ended) = mpsc::channel::<()>();
    let create = move || {
        let _end = end;
        // Another thread is to fetch them, once it is known what they mean.
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let _ = block_signal(signal);
        }
        BareVm::create()
    };
    let thread = thread::Builder::new().name("kvm-create".into());
    // Without a thread, it is created when it is needed.
    *begun = thread.stack_size(THREAD_STACK_SIZE).spawn(create).ok();
    drop(begun);
    // Where this thread has the only processor, another does not get to its waiting by itself.
    let _ = ended.recv_timeout(HEAD_START);
}

impl BareVm {
    /// The one that was [begun](begin), or else a new one.
    ///
    /// # Errors
    /// `/dev/kvm` is missing, not permitted, of another version, lacks a capability, or refused something.
    pub fn take() -> Result<Self, Error> {
        let begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner).take();
        match begun {
            Some(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            None => Self::create(),
        }
    }

    fn create() -> Result<Self, Error> {
        let kvm = open()?;
        for (capability, name) in NEEDED_CAPABILITIES {
            if !kvm.check_extension(*capability) {
                return Err(Error::KvmCapability { capability: name });
            }
        }
        let fd = kvm.create_vm().map_err(Error::kvm("create a VM"))?;
        // These two come before the first vCPU; AMD hosts ignore them.
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(Error::kvm("place its identity map page"))?;
        fd.set_tss_address(KVM_TSS)
            .map_err(Error::kvm("place its task state segment"))?;
        fd.create_irq_chip()
            .map_err(Error::kvm("create the interrupt controllers"))?;
        fd.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(Error::kvm("create the interval timer"))?;
        Ok(Self {
            supported_cpuid: supported_cpuid(&kvm)?,
            cpus_max: kvm.get_max_vcpus(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            inventory: Inventory::take(&kvm, &fd)?,
            fd,
        })
    }
}
