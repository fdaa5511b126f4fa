//! Which pages are known to be untouched.

use std::fs::File;

use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::MemorySpec;
use vm_memory::{Bytes, GuestAddress};

use super::super::*;
use super::{both_kinds, layout};
use crate::dirty::PageSet;
use crate::memory;

#[test]
fn memory_nobody_has_touched_is_untouched_whether_private_or_shared() {
    for memory in both_kinds(32) {
        assert!(untouched(&memory).unwrap() == PageSet::full(&layout(&memory)));
    }
}

#[test]
fn a_page_that_was_written_is_not_untouched_and_those_far_from_it_are() {
    for memory in both_kinds(32) {
        let written = [0, 0x5000, 0x80_0000, (32 << 20) - 1];
        for address in written {
            memory.write_obj(1_u8, GuestAddress(address)).unwrap();
        }
        let untouched = untouched(&memory).unwrap();
        for address in written {
            assert!(!untouched.contains(address), "{address:#x}");
        }
        // A huge page may have been taken for each, wherever that begins.
        for address in [0x40_0000, 0xc0_0000, 0x100_0000] {
            assert!(untouched.contains(address), "{address:#x}");
        }
    }
}

#[test]
fn pages_of_a_mapped_file_are_never_taken_for_zero() {
    let spec = MemorySpec {
        size: ByteSize::from_mib(32),
        shared: false,
        hugepages: false,
    };
    let file: File = tempfile::tempfile().unwrap();
    file.set_len(32 << 20).unwrap();
    let memory = memory::map_flat(&spec, &file).unwrap();
    assert!(untouched(&memory).unwrap().is_empty());
}
