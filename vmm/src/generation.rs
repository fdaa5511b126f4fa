//! The VM generation id: 16 random bytes in guest memory that are others each time the VM is restored.
//!
//! A guest that goes on from a snapshot must not go on with the random numbers it had then: others may go on from the
//! same one, and would make the same keys. It finds the id through ACPI, is notified when there is a new one, and takes
//! that into its random number generator (Microsoft, "Virtual Machine Generation ID"; Linux drivers/virt/vmgenid.c).

use cutover_devices::GuestMemory;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::layout::VM_GENERATION_ID;

/// Bytes of the id.
const ID_BYTES: usize = 16;

/// Gives the guest of `memory` a new id. One that runs already has to be notified.
///
/// # Errors
/// The operating system has no random numbers, or `memory` is too small.
pub fn renew(memory: &GuestMemory) -> Result<(), Error> {
    let mut id = [0; ID_BYTES];
    // So few bytes come in one piece (getrandom(2)).
    getrandom(&mut id, GetRandomFlags::empty()).map_err(Error::os("make up a VM generation id"))?;
    memory
        .write_slice(&id, GuestAddress(VM_GENERATION_ID))
        .map_err(Error::guest_write("the VM generation id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_id_is_another() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let ids = std::array::from_fn::<u128, 3, _>(|_| {
            renew(&memory).unwrap();
            memory.read_obj(GuestAddress(VM_GENERATION_ID)).unwrap()
        });
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && !ids.contains(&0), "{ids:x?}");
    }
}
