//! Whether a back end is exact on this host: found out by a guest of a few instructions, whose writes are known.
//!
//! ```text
//!  write a few pages ─► harvest: these ─► harvest: none ─► the same pages again ─► harvest: these
//!  four times: write more pages than a ring has entries ─► harvest: all of them ─► harvest: none
//! ```
//! It takes a VM of its own, of which it is known that nobody else writes to it. KVMs differ here: one that emulates each
//! instruction stops a vCPU whose ring is full only at the host's next timer tick, in time or not. So it also counts how
//! much of a full ring is used.

use std::sync::Arc;

use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::MemorySpec;
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::back_end::{BackEnd, Unfit};
use super::page_set::{Layout, PAGE_SIZE, PageRange, PageSet};
use super::ring::{RING_ENTRIES, Rings};
use super::{Baseline, Consumer, Tracker};
use crate::kvm::KvmVm;
use crate::{Error, memory};

/// Where the program is.
const PROGRAM: u64 = 0x1000;
/// The first page that it writes.
const FIRST_PAGE: u64 = 1 << 20;
/// What it does to a port when it has written all.
const PORT: u16 = 0x80;
/// Memory of the VM, of which it touches half.
const MEMORY: ByteSize = ByteSize::from_mib(32);

/// Writes a byte to each of `ecx` places, from `edi` on and `edx` bytes apart, then to the port.
const WRITER: &[u8] = &[
    0x88, 0x07, // again:  mov [edi], al
    0x01, 0xd7, //         add edi, edx
    0x49, //               dec ecx
    0x75, 0xf9, //         jnz again
    0xe6, 0x80, //         out PORT, al
];

/// Pages with the same distance from each to the next.
#[derive(Clone, Copy)]
struct Pattern {
    pages: usize,
    distance: u64,
}

/// Few enough for a ring.
const FEW: Pattern = Pattern {
    pages: 300,
    distance: 3 * PAGE_SIZE,
};

/// Entries of a ring that are unused when its vCPU stops because it is full. KVM keeps 64 back for what one exit may write
/// (`KVM_DIRTY_RING_RSVD_ENTRIES`): of one that goes far into these, the next may go beyond.
const SPARE: usize = 48;

/// Too many for a ring.
const MANY: Pattern = Pattern {
    pages: 2 * RING_ENTRIES,
    distance: PAGE_SIZE,
};

/// Tries `back_end`, and returns it if it is exact here.
///
/// # Errors
/// It is not, or it is not to be had; or there can be no VM to try it with.
pub fn probe(back_end: BackEnd) -> Result<BackEnd, Error> {
    Guest::create(back_end, |vm| Tracker::new(vm, back_end))?.try_all()?;
    Ok(back_end)
}

/// The guest that tries it.
struct Guest {
    vcpu: VcpuFd,
    rings: Option<Rings>,
    tracker: Tracker,
    layout: Arc<Layout>,
    back_end: BackEnd,
    _vm: KvmVm,
}

impl Guest {
    /// One whose writes are noticed by the tracker that `track` makes.
    fn create(back_end: BackEnd, track: impl FnOnce(&KvmVm) -> Result<Tracker, Error>) -> Result<Self, Error> {
        let memory = memory::map(&MemorySpec {
            size: MEMORY,
            shared: false,
            hugepages: false,
        })?;
        let load = memory.write_slice(WRITER, GuestAddress(PROGRAM));
        load.map_err(|source| Error::GuestWrite {
            what: "a program that tries a dirty log",
            source,
        })?;
        let vm = KvmVm::create(&memory)?;
        let tracker = track(&vm)?;
        let vcpu = vm.fd.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
        let rings = tracker.add_vcpu(&vcpu)?;
        enter_protected_mode(&vcpu)?;
        Ok(Self {
            vcpu,
            rings,
            tracker,
            layout: Arc::new(Layout::of(&memory)),
            back_end,
            _vm: vm,
        })
    }

    fn try_all(mut self) -> Result<(), Error> {
        let consumer = self.tracker.register(Baseline::Now)?;
        for pattern in [FEW, FEW, MANY, MANY, MANY, MANY] {
            self.write(pattern)?;
            self.expect(&consumer, pattern)?;
            self.expect_nothing(&consumer)?;
        }
        Ok(())
    }

    /// Has the guest write to the pages of `pattern`.
    fn write(&mut self, pattern: Pattern) -> Result<(), Error> {
        let regs = kvm_regs {
            rip: PROGRAM,
            rflags: 2,
            rdi: FIRST_PAGE,
            rcx: pattern.pages as u64,
            rdx: pattern.distance,
            ..Default::default()
        };
        self.vcpu
            .set_regs(&regs)
            .map_err(Error::kvm("set a vCPU's registers"))?;
        loop {
            let reason = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, _)) => return Ok(()),
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    self.drain()?;
                    continue;
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Ok(exit) => format!("it tries --dirty-log {}, and exits with {exit:?}", self.back_end),
                Err(error) => format!("it tries --dirty-log {}, and KVM_RUN failed: {error}", self.back_end),
            };
            return Err(Error::Vcpu { cpu: 0, reason });
        }
    }

    /// Makes room in the ring of a vCPU that stopped because it is full.
    fn drain(&self) -> Result<(), Error> {
        let used = self.rings.as_ref().map_or(Ok(0), Rings::drain)?;
        match used {
            0 => Err(self.unfit(Unfit::Stuck)),
            used if used > RING_ENTRIES - SPARE => Err(self.unfit(Unfit::Late { used })),
            _ => Ok(()),
        }
    }

    /// Fails if a page of `pattern` is not among those that changed.
    fn expect(&self, consumer: &Consumer, pattern: Pattern) -> Result<(), Error> {
        let mut missing = PageSet::empty(&self.layout);
        for page in 0..pattern.pages as u64 {
            missing.insert_range(PageRange::page(FIRST_PAGE + page * pattern.distance));
        }
        let written = missing.len();
        let changed = consumer.take()?;
        missing.subtract(&changed);
        changed.commit();
        match missing.len() {
            0 => Ok(()),
            lost => Err(self.unfit(Unfit::Lost { lost, written })),
        }
    }

    /// Fails if a page has changed.
    fn expect_nothing(&self, consumer: &Consumer) -> Result<(), Error> {
        let changed = consumer.take()?;
        let pages = changed.len();
        changed.commit();
        match pages {
            0 => Ok(()),
            pages => Err(self.unfit(Unfit::Stale { pages })),
        }
    }

    fn unfit(&self, reason: Unfit) -> Error {
        Error::DirtyLog {
            log: self.back_end,
            reason,
        }
    }
}

/// 32-bit mode without paging, where all of memory is at hand.
fn enter_protected_mode(vcpu: &VcpuFd) -> Result<(), Error> {
    const PROTECTED: u64 = 1;
    const CODE: u8 = 11;
    const DATA: u8 = 3;
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read a vCPU's registers"))?;
    sregs.cr0 |= PROTECTED;
    sregs.cs = flat(0x08, CODE);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *segment = flat(0x10, DATA);
    }
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set a vCPU's registers"))
}

#[cfg(test)]
mod tests;
