//! The KVM side of a VM: `/dev/kvm`, the VM's file descriptor, memory slots, the in-kernel interrupt controllers.

use std::sync::Arc;

use cutover_devices::GuestMemory;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::Error;
use crate::bare_vm::BareVm;
use crate::host::KVM_API_VERSION;
use crate::state::Inventory;

/// A VM as KVM knows it, without vCPUs.
pub struct KvmVm {
    /// The VM's file descriptor.
    pub fd: Arc<VmFd>,
    /// The guest's RAM, kept mapped for as long as KVM may access it.
    pub memory_slots: MemorySlots,
    /// What CPUs may show a guest on this host.
    pub supported_cpuid: CpuId,
    /// Most vCPUs KVM allows.
    pub cpus_max: usize,
    /// Whether the local APIC's timer has the TSC-deadline mode.
    pub tsc_deadline: bool,
    /// What there is of a vCPU's state.
    pub inventory: Arc<Inventory>,
}

/// A guest's RAM as KVM knows it: one memory slot per region, numbered in the order of their addresses.
#[derive(Clone)]
pub struct MemorySlots {
    /// The VM's file descriptor.
    pub vm: Arc<VmFd>,
    /// What the slots map.
    pub memory: GuestMemory,
}

impl KvmVm {
    /// A VM with RAM, interrupt controllers and timer.
    ///
    /// # Errors
    /// As [`BareVm::take`], or KVM refused something.
    pub fn create(memory: &GuestMemory) -> Result<Self, Error> {
        let BareVm {
            fd,
            supported_cpuid,
            cpus_max,
            tsc_deadline,
            inventory,
        } = BareVm::take()?;
        let fd = Arc::new(fd);
        Ok(Self {
            memory_slots: MemorySlots::map(fd.clone(), memory.clone())?,
            fd,
            supported_cpuid,
            cpus_max,
            tsc_deadline,
            inventory: Arc::new(inventory),
        })
    }

    /// Lets a write of `event` raise interrupt line `gsi`.
    ///
    /// # Errors
    /// KVM refused.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(Error::kvm("connect a device's interrupt"))
    }

    /// Lets a guest's 32-bit write of `value` at `address` signal `event` without leaving the kernel.
    ///
    /// # Errors
    /// KVM refused.
    pub fn connect_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(Error::kvm("connect a device's doorbell"))
    }
}

impl MemorySlots {
    /// Makes `memory` the RAM of the guest of `vm`, which had none.
    fn map(vm: Arc<VmFd>, memory: GuestMemory) -> Result<Self, Error> {
        let slots = Self { vm, memory };
        slots.set_flags(0)?;
        Ok(slots)
    }

    /// Gives every slot `flags`, which are `KVM_MEM_…`, instead of those it has.
    ///
    /// # Errors
    /// KVM refused; some slots may have the new flags.
    pub fn set_flags(&self, flags: u32) -> Result<(), Error> {
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is mapped for as long as `self.memory` lives, of which the `KvmVm` keeps a clone; the
            // regions of one GuestMemory do not overlap.
            unsafe { self.vm.set_user_memory_region(slot) }.map_err(Error::kvm("map guest memory"))?;
        }
        Ok(())
    }
}

/// What CPUs may show a guest on this host.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("list the CPU features it supports"))
}

/// Opens `/dev/kvm` and checks its version.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| Error::OpenKvm { source: error.into() })?;
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        found => Err(Error::KvmVersion { found }),
    }
}
