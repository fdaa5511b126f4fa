//! What a VM has done so far, in numbers, and how much memory its guest really takes.

use std::io;

use cutover_devices::GuestMemory;
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::Error;
use crate::device_manager::DeviceStats;
use crate::lifecycle::State;
use crate::protection::MemberStatus;

/// Everything that is counted of a VM. Counters begin when the VM is built, and anew when it is built anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmStats {
    /// What it is doing.
    pub state: State,
    /// How often it has been built: 1, and 1 more for each reboot or cycle.
    pub boots: u64,
    /// Time since it first ran, pauses included, in nanoseconds.
    pub uptime_ns: u64,
    /// Its vCPUs, in order.
    pub vcpus: Vec<VcpuStats>,
    /// Its memory.
    pub memory: MemoryStats,
    /// Its devices.
    pub devices: DeviceStats,
    /// How its protection does, if somebody speaks for it in a group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protection: Option<MemberStatus>,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuStats {
    /// Its index.
    pub cpu: u8,
    /// Processor time of its thread, in guest mode or not, in nanoseconds.
    pub cpu_time_ns: u64,
    /// How often it left guest mode for the monitor. What the kernel does by itself, such as halting, interrupts and
    /// doorbells, is not among it.
    pub exits: VcpuExits,
}

/// Reasons for which a vCPU left guest mode, and how often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VcpuExits {
    /// The guest read an I/O port.
    pub io_in: u64,
    /// The guest wrote an I/O port.
    pub io_out: u64,
    /// The guest read the registers of a device in memory.
    pub mmio_read: u64,
    /// The guest wrote the registers of a device in memory.
    pub mmio_write: u64,
    /// A signal interrupted it, such as to pause it.
    pub interrupted: u64,
    /// It could not go on: a triple fault, or KVM failed.
    pub failed: u64,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryStats {
    /// What the guest has, in bytes.
    pub size_bytes: u64,
    /// What of it the host holds in memory, in bytes: pages that were touched and are not swapped out.
    pub resident_bytes: u64,
}

impl MemoryStats {
    /// Looks at every page of `memory`: takes time in proportion to its size.
    ///
    /// # Errors
    /// The operating system refused.
    pub(crate) fn of(memory: &GuestMemory) -> Result<Self, Error> {
        let mut stats = Self {
            size_bytes: 0,
            resident_bytes: 0,
        };
        for region in memory.iter() {
            stats.size_bytes += region.len();
            let resident = resident_bytes(region.as_ptr(), region.size());
            stats.resident_bytes += resident.map_err(Error::os("tell which guest memory is resident"))?;
        }
        Ok(stats)
    }
}

/// Bytes of the mapping at `start` that are in memory, by pages.
fn resident_bytes(start: *mut u8, size: usize) -> io::Result<u64> {
    const PAGE_SIZE: usize = 4 << 10;
    /// Pages that are asked for at once: their answers fit on the stack.
    const PAGES: usize = 16 << 10;
    /// The bit of each answer that tells whether the page is in memory (mincore(2)).
    const RESIDENT: u8 = 1;
    let mut answers = [0_u8; PAGES];
    let mut resident = 0;
    for offset in (0..size).step_by(PAGES * PAGE_SIZE) {
        let len = (size - offset).min(PAGES * PAGE_SIZE);
        // SAFETY: `offset` and `len` stay within the mapping, and there is room for an answer for each of its pages.
        let result = unsafe { libc::mincore(start.add(offset).cast(), len, answers.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let pages = answers[..len.div_ceil(PAGE_SIZE)].iter();
        resident += pages.filter(|&answer| answer & RESIDENT != 0).count() as u64 * PAGE_SIZE as u64;
    }
    Ok(resident)
}

#[cfg(test)]
mod tests {
    use cutover_snapshot::size::ByteSize;
    use cutover_snapshot::spec::MemorySpec;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn memory_becomes_resident_when_it_is_touched() {
        for shared in [false, true] {
            let memory = crate::memory::map(&MemorySpec {
                size: ByteSize::from_mib(4096),
                shared,
                hugepages: false,
            })
            .expect("lazily allocated memory is always to be had");
            let before = MemoryStats::of(&memory).expect("Linux tells");
            assert_eq!((before.size_bytes, before.resident_bytes), (4 << 30, 0));
            // On both sides of the gap, the first and the last page.
            for address in [0, (3 << 30) - 8, 4 << 30, (5 << 30) - 8] {
                memory.write_obj(1_u64, GuestAddress(address)).expect("RAM");
            }
            let touched = MemoryStats::of(&memory).expect("Linux tells").resident_bytes;
            // The kernel may give huge pages.
            assert!((4 * 4096..=4 * (2 << 20)).contains(&touched), "{touched}");
        }
    }
}
