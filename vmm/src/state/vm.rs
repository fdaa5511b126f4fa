//! The state of a VM that no vCPU owns: interrupt controllers, interval timer, KVM's clock.
//!
//! The clock is what a guest's kvmclock counts from: nanoseconds since the VM began. It goes on while the VM is paused,
//! and after a restore either as if the VM had been paused all the time, or from where it stopped; back it goes never.

use std::time::{SystemTime, UNIX_EPOCH};

use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, Section};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::snapshot::ClockPolicy;

/// The interrupt controllers, in the order of [`VmState::irqchips`].
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The state of a VM without its vCPUs, as it is saved. Not to be trusted when it is read back: KVM checks what it is
/// given.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    irqchips: [kvm_irqchip; 3],
    pub(super) pit: kvm_pit_state2,
    /// KVM's clock in ns.
    pub(super) clock_ns: u64,
    /// The host's wall clock at that moment, in ns since 1970.
    pub(super) saved_at_ns: u64,
}

impl Section for VmState {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl VmState {
    /// Reads the state of `vm`, whose vCPUs stand still.
    ///
    /// # Errors
    /// KVM refused.
    pub fn save(vm: &VmFd) -> Result<Self, Error> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (irqchip, id) in irqchips.iter_mut().zip(IRQCHIPS) {
            irqchip.chip_id = id;
            vm.get_irqchip(irqchip)
                .map_err(Error::kvm("read an interrupt controller"))?;
        }
        let clock = vm.get_clock().map_err(Error::kvm("read its clock"))?;
        Ok(Self {
            irqchips,
            pit: vm.get_pit2().map_err(Error::kvm("read the interval timer"))?,
            clock_ns: clock.clock,
            saved_at_ns: wall_clock_ns(),
        })
    }

    /// How much of the time since it was saved has passed for the guest, in ns. None where the host's clock is behind.
    pub fn passed_ns(&self, policy: ClockPolicy) -> u64 {
        match policy {
            ClockPolicy::Corrected => wall_clock_ns().saturating_sub(self.saved_at_ns),
            ClockPolicy::Stopped => 0,
        }
    }

    /// Puts `vm` into this state, after `passed_ns` of the guest's time. Its vCPUs have theirs already: what waits in
    /// the IOAPIC goes on to their local APICs, and the clock is reckoned from their TSCs.
    ///
    /// # Errors
    /// KVM refused.
    pub fn restore(&self, vm: &VmFd, passed_ns: u64) -> Result<(), Error> {
        for (irqchip, id) in self.irqchips.iter().zip(IRQCHIPS) {
            let mut irqchip = *irqchip;
            irqchip.chip_id = id;
            vm.set_irqchip(&irqchip)
                .map_err(Error::kvm("set an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(Error::kvm("set the interval timer"))?;
        let clock = kvm_clock_data {
            clock: self.clock_ns.saturating_add(passed_ns),
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(Error::kvm("set its clock"))
    }
}

/// The host's wall clock in ns since 1970.
fn wall_clock_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}
