//! The state of a stopped machine: everything about it but the contents of memory and disks.
//!
//! ```text
//!  Machine::save ─► MachineState ─┬─ vm         interrupt controllers, timer, clock          ─► "vm"
//!                                 ├─ vcpus      each read on its own thread                  ─► "vcpu/0", …
//!                                 └─ devices    transports and the serial port               ─► "disk/ID", "serial", …
//!                                                                                             sections of a snapshot
//!  Reserved::load   ◄──── checked against the spec, by KVM, and by the devices  ◄─────────────┘
//! ```
//!
//! A section has a version of its own. Structures of KVM are in it as the kernel's ABI has them, which never changes.

mod cpu_needs;
mod devices;
#[cfg(test)]
mod golden;
mod ioctl;
mod msrs;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use cutover_snapshot::manifest::CpuNeeds;
use cutover_snapshot::section::{SectionWriter, State};
use cutover_snapshot::spec::VmSpec;

use crate::Error;
use crate::kvm::KvmVm;

pub use self::cpu_needs::{check as check_cpu, of as cpu_needs};
pub use self::devices::{DevicesState, SingleDevices, addresses_section, sections as device_sections};
pub use self::vcpu::{Inventory, VcpuState};
pub use self::vm::VmState;

/// See the module.
#[derive(Clone, Debug)]
pub struct MachineState {
    /// What no vCPU owns.
    pub vm: VmState,
    /// One for each vCPU, in order.
    pub vcpus: Vec<VcpuState>,
    /// Devices.
    pub devices: DevicesState,
}

impl MachineState {
    /// Adds its sections.
    ///
    /// # Errors
    /// They have no encoding.
    pub fn write(&self, to: &mut impl SectionWriter) -> Result<(), Error> {
        to.section("vm", &self.vm)?;
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            to.section(&vcpu_section(index), vcpu)?;
        }
        self.devices.write(to)
    }

    /// Reads it back for the VM of `spec`.
    ///
    /// # Errors
    /// A section is missing, unreadable, or says what cannot be.
    pub fn read(spec: &VmSpec, sections: &State) -> Result<Self, Error> {
        let vcpus = (0..usize::from(spec.cpus)).map(|index| {
            let vcpu: VcpuState = sections.read(&vcpu_section(index))?;
            vcpu.check()?;
            Ok(vcpu)
        });
        Ok(Self {
            vm: sections.read("vm")?,
            vcpus: vcpus.collect::<Result<_, Error>>()?,
            devices: DevicesState::read(spec, sections)?,
        })
    }

    /// Whether `vm` can be put into this state, as far as can be said before it is tried.
    ///
    /// # Errors
    /// It is of another number of vCPUs than `cpus`, or the host's CPU lacks what the guest uses.
    pub fn check(&self, cpus: usize, vm: &KvmVm) -> Result<(), Error> {
        let saved = self.vcpus.len();
        if saved != cpus {
            return Err(Error::SavedState(format!("it has {saved} vCPUs, the VM has {cpus}")));
        }
        cpu_needs::check_against(&self.cpu_needs(), &vm.supported_cpuid, vm.tsc_deadline)
    }

    /// Guest addresses of the pages that KVM reads or writes as it is put into this state: what waits for their content
    /// would wait for ever if that came later.
    pub fn pages_of_kvm(&self) -> impl Iterator<Item = u64> {
        self.vcpus.iter().flat_map(VcpuState::pages_of_kvm)
    }

    /// What the guest needs of a host's CPU: what its first vCPU was shown, as were the others.
    pub fn cpu_needs(&self) -> CpuNeeds {
        cpu_needs::of(self.vcpus.first().map_or(&[], |vcpu| &vcpu.cpuid))
    }
}

fn vcpu_section(index: usize) -> String {
    format!("vcpu/{index}")
}
