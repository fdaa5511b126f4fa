//! Page faults of real memory, written and read by threads, system calls and tiny guests.

mod arriving;
mod copy_on_write;
pub(crate) mod external;
mod lazy;
mod untouched;

use std::process::{Command, Output};
use std::sync::Arc;

use cutover_devices::{GuestMemory, OnThread};
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::MemorySpec;
use vm_memory::{Bytes, GuestAddress};

use crate::dirty::{Layout, PAGE_SIZE};
use crate::memory;
use crate::seccomp::{self, ThreadKind};

/// Private and shared memory of `mib` MiB.
fn both_kinds(mib: u64) -> [GuestMemory; 2] {
    [false, true].map(|shared| {
        memory::map(&MemorySpec {
            size: ByteSize::from_mib(mib),
            shared,
            hugepages: false,
        })
        .unwrap()
    })
}

/// Where the second slot of [`two_slots`] is.
const SLOT_1: u64 = 0x1000_0000;

/// 300 pages from 0 on, 77 from [`SLOT_1`] on.
fn two_slots() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 300 << 12), (GuestAddress(SLOT_1), 77 << 12)]).unwrap()
}

fn layout(memory: &GuestMemory) -> Arc<Layout> {
    Arc::new(Layout::of(memory))
}

/// All of `memory`, in the order of its pages' numbers.
fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut content = Vec::new();
    for slot in Layout::of(memory).slots() {
        let mut part = vec![0; usize::try_from(slot.pages * PAGE_SIZE).unwrap()];
        memory.read_slice(&mut part, GuestAddress(slot.start)).unwrap();
        content.extend(part);
    }
    content
}

/// Confines threads as those of a VM.
fn confined() -> OnThread {
    Arc::new(|| seccomp::confine_or_abort(ThreadKind::PageFault))
}

/// Set in the process that [`in_another_process`] starts.
const ALONE: &str = "CUTOVER_TEST_ALONE";

/// Runs `test`, which is this test, in a process of its own; None in that process.
fn in_another_process(test: &str) -> Option<Output> {
    if std::env::var_os(ALONE).is_some() {
        return None;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", &format!("page_fault::tests::{test}")])
        .env(ALONE, "1")
        .output();
    Some(output.unwrap())
}

/// Asserts that a process ended for a fault of memory, and said so with all of `words`.
fn assert_ended(output: &Output, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in {text}");
    }
}
