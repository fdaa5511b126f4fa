//! The state of one vCPU: read on its own thread while it stands still, set before it has a thread.
//!
//! The order of the calls follows from what they do in KVM (Documentation/virt/kvm/api.rst, arch/x86/kvm/x86.c):
//!
//! ```text
//!  save     MP state      first: it takes in a pending INIT or start-up IPI, which changes registers
//!           events        before the registers: delivers the payload of a pending exception into CR2 and DR6
//!           registers, x87 and vectors, local APIC, MSRs
//!  restore  CPUID, TSC frequency                    decide what the rest may be
//!           system registers                        have the APIC base, without which the local APIC is not set
//!           MSRs ─ local APIC ─ TSC deadline        see `msrs`
//!           debug registers, events, MP state       last: setting registers drops pending exceptions
//! ```

use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, Section};
use kvm_bindings::*;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::ioctl::{self, XSAVE_BYTES};
use super::msrs::{self, Msr};
use crate::Error;

/// Most bytes of extended state that are read back; AMX, the largest so far, takes 11 KiB.
const XSAVE_BYTES_MAX: usize = 64 << 10;
/// Most MSRs that are read back; KVM lists about 100.
const MSRS_MAX: usize = 1024;
/// How far a TSC may be from what the guest was told where it cannot be scaled: what KVM itself, and NTP, can even out.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Local APIC register of the timer, its mode and mask (Intel SDM volume 3, 11.5.1).
const LVT_TIMER: usize = 0x320;
const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE: u32 = 0b11 << 17;
const LVT_TSC_DEADLINE: u32 = 0b10 << 17;

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;
/// The page of the page directory pointers in CR3, which has 32 bits then.
const CR3_PAE_PAGE: u64 = 0xffff_f000;

/// What there is of a vCPU's state on this host.
#[derive(Debug)]
pub struct Inventory {
    msrs: Vec<u32>,
    xsave_bytes: usize,
    sregs2: bool,
    /// The TSC can be scaled to any frequency.
    tsc_control: bool,
}

/// The state of a vCPU, as it is saved. Not to be trusted when it is read back: KVM checks what it is given.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// As it was set, without what changes in it when the guest runs.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) tsc_khz: u32,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    registers: kvm_regs,
    system: kvm_sregs,
    /// Page directory pointers of PAE paging, where KVM tells them. Where not, KVM reads them from guest memory.
    pdptrs: Option<[u64; 4]>,
    debug: kvm_debugregs,
    xcrs: kvm_xcrs,
    pub(super) xsave: Vec<u8>,
    lapic: kvm_lapic_state,
    pub(super) msrs: Vec<Msr>,
}

impl Section for VcpuState {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl Inventory {
    /// What `vm` offers.
    ///
    /// # Errors
    /// KVM does not list its MSRs.
    pub fn take(kvm: &Kvm, vm: &VmFd) -> Result<Self, Error> {
        let listed = kvm.get_msr_index_list().map_err(Error::kvm("list its MSRs"))?;
        // An error is no size.
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            msrs: msrs::to_save(listed.as_slice()),
            xsave_bytes: xsave_bytes.max(XSAVE_BYTES),
            sregs2: vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0,
            tsc_control: vm.check_extension(Cap::TscControl),
        })
    }
}

impl VcpuState {
    /// Reads the state of `vcpu`, which stands still, with no access of its half done, and was shown `cpuid`.
    ///
    /// # Errors
    /// KVM refused.
    pub fn save(vcpu: &VcpuFd, inventory: &Inventory, cpuid: &CpuId) -> Result<Self, Error> {
        let mp_state = vcpu.get_mp_state().map_err(Error::kvm("read a vCPU's MP state"))?;
        let events = vcpu.get_vcpu_events().map_err(Error::kvm("read a vCPU's events"))?;
        let registers = vcpu.get_regs().map_err(Error::kvm("read a vCPU's registers"))?;
        let system = vcpu.get_sregs().map_err(Error::kvm("read a vCPU's system registers"))?;
        let pdptrs = pdptrs(vcpu, inventory)?;
        let debug = vcpu
            .get_debug_regs()
            .map_err(Error::kvm("read a vCPU's debug registers"))?;
        let xcrs = vcpu
            .get_xcrs()
            .map_err(Error::kvm("read a vCPU's extended control registers"))?;
        let mut xsave = vec![0; inventory.xsave_bytes];
        // SAFETY: that is the size KVM told for this VM.
        unsafe { ioctl::get_xsave(vcpu, &mut xsave) }.map_err(Error::kvm("read a vCPU's extended state"))?;
        let lapic = vcpu.get_lapic().map_err(Error::kvm("read a vCPU's local APIC"))?;
        let mut msrs = msrs::read(vcpu, &inventory.msrs)?;
        keep_expired_timer(&lapic, &mut msrs);
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().map_err(Error::kvm("tell a vCPU's TSC frequency"))?,
            mp_state,
            events,
            registers,
            system,
            pdptrs,
            debug,
            xcrs,
            xsave,
            lapic,
            msrs,
        })
    }

    /// The CPUID it was shown.
    ///
    /// # Errors
    /// More entries than KVM takes.
    pub fn cpuid(&self) -> Result<CpuId, Error> {
        CpuId::from_entries(&self.cpuid)
            .map_err(|_| Error::SavedState(format!("{} CPUID entries are too many", self.cpuid.len())))
    }

    /// Guest addresses of pages that KVM reads or writes when a vCPU is put into this state: those it shares with the
    /// guest, and that of the page directory pointers (Intel SDM volume 3, 4.4.1) where KVM reads them itself.
    pub fn pages_of_kvm(&self) -> impl Iterator<Item = u64> {
        let pae = self.system.cr0 & CR0_PG != 0 && self.system.cr4 & CR4_PAE != 0 && self.system.efer & EFER_LMA == 0;
        let pointers = (pae && self.pdptrs.is_none()).then_some(self.system.cr3 & CR3_PAE_PAGE);
        msrs::pages_of_kvm(&self.msrs).chain(pointers)
    }

    /// What can be said against the state without KVM.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.cpuid()?;
        if self.msrs.len() > MSRS_MAX {
            return Err(Error::SavedState(format!("{} MSRs are too many", self.msrs.len())));
        }
        if !(XSAVE_BYTES..=XSAVE_BYTES_MAX).contains(&self.xsave.len()) {
            let length = self.xsave.len();
            return Err(Error::SavedState(format!(
                "{length} bytes are no extended state of a vCPU"
            )));
        }
        if self.tsc_khz == 0 {
            return Err(Error::SavedState("a TSC does not stand still".to_owned()));
        }
        Ok(())
    }

    /// Puts `vcpu`, which is new and knows its [`cpuid`](Self::cpuid), into this state, after `passed_ns` of the
    /// guest's time have passed for its TSC.
    ///
    /// # Errors
    /// KVM refused, or the host's TSC cannot be made to count as fast as the guest expects.
    pub fn restore(&self, vcpu: &VcpuFd, inventory: &Inventory, passed_ns: u64) -> Result<(), Error> {
        self.set_tsc_frequency(vcpu, inventory)?;
        self.set_system_registers(vcpu, inventory)?;
        vcpu.set_regs(&self.registers)
            .map_err(Error::kvm("set a vCPU's registers"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(Error::kvm("set a vCPU's extended control registers"))?;
        let mut xsave = self.xsave.clone();
        xsave.resize(xsave.len().max(inventory.xsave_bytes), 0);
        // SAFETY: it has at least the size KVM told for this VM.
        unsafe { ioctl::set_xsave(vcpu, &xsave) }.map_err(Error::kvm("set a vCPU's extended state"))?;
        let (deadline, others): (Vec<Msr>, Vec<Msr>) = self
            .msrs_after(passed_ns)
            .partition(|msr| msr.index == msrs::TSC_DEADLINE);
        msrs::write(vcpu, &others)?;
        vcpu.set_lapic(&self.lapic)
            .map_err(Error::kvm("set a vCPU's local APIC"))?;
        msrs::write(vcpu, &deadline)?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(Error::kvm("set a vCPU's debug registers"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(Error::kvm("set a vCPU's events"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(Error::kvm("set a vCPU's MP state"))
    }

    /// The MSRs with a TSC that has gone on for `passed_ns`.
    pub(super) fn msrs_after(&self, passed_ns: u64) -> impl Iterator<Item = Msr> {
        let ticks = u128::from(passed_ns) * u128::from(self.tsc_khz) / 1_000_000;
        let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
        self.msrs.iter().map(move |&msr| match msr.index {
            msrs::TSC => Msr {
                value: msr.value.wrapping_add(ticks),
                ..msr
            },
            _ => msr,
        })
    }

    fn set_tsc_frequency(&self, vcpu: &VcpuFd, inventory: &Inventory) -> Result<(), Error> {
        let host = vcpu.get_tsc_khz().map_err(Error::kvm("tell a vCPU's TSC frequency"))?;
        if host == self.tsc_khz {
            return Ok(());
        }
        let apart = u64::from(host.abs_diff(self.tsc_khz)) * 1_000_000;
        if !inventory.tsc_control && apart > u64::from(host) * TSC_TOLERANCE_PPM {
            return Err(Error::TscFrequency {
                guest_khz: self.tsc_khz,
                host_khz: host,
            });
        }
        vcpu.set_tsc_khz(self.tsc_khz)
            .map_err(Error::kvm("set a vCPU's TSC frequency"))
    }

    fn set_system_registers(&self, vcpu: &VcpuFd, inventory: &Inventory) -> Result<(), Error> {
        let set = match self.pdptrs {
            Some(pdptrs) if inventory.sregs2 => ioctl::set_sregs2(vcpu, &with_pdptrs(&self.system, pdptrs)),
            _ => vcpu.set_sregs(&self.system),
        };
        set.map_err(Error::kvm("set a vCPU's system registers"))
    }
}

/// A timer that has rung, but whose interrupt KVM has not passed on, is lost to the saved local APIC, and a guest that
/// sleeps would not wake again. Rather than that it rings once too often.
fn keep_expired_timer(lapic: &kvm_lapic_state, msrs: &mut [Msr]) {
    let bytes: [i8; 4] = std::array::from_fn(|index| lapic.regs[LVT_TIMER + index]);
    let timer = u32::from_le_bytes(bytes.map(i8::cast_unsigned));
    let Some(now) = msrs.iter().find(|msr| msr.index == msrs::TSC).map(|msr| msr.value) else {
        return;
    };
    if timer & (LVT_MODE | LVT_MASKED) == LVT_TSC_DEADLINE {
        for deadline in msrs.iter_mut().filter(|msr| msr.index == msrs::TSC_DEADLINE) {
            if deadline.value == 0 {
                deadline.value = now;
            }
        }
    }
}

/// The page directory pointers, if KVM tells them and the guest uses them.
fn pdptrs(vcpu: &VcpuFd, inventory: &Inventory) -> Result<Option<[u64; 4]>, Error> {
    if !inventory.sregs2 {
        return Ok(None);
    }
    let system = ioctl::get_sregs2(vcpu).map_err(Error::kvm("read a vCPU's page directory pointers"))?;
    let valid = system.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    Ok(valid.then_some(system.pdptrs))
}

/// The newer structure. It lacks a pending interrupt, which is among the events.
fn with_pdptrs(sregs: &kvm_sregs, pdptrs: [u64; 4]) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: KVM_SREGS2_FLAGS_PDPTRS_VALID.into(),
        pdptrs,
    }
}
