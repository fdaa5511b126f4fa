//! The one piece of firmware there is: nine bytes at the processor's reset vector that reset the machine.
//!
//! A kernel that finds hardware-reduced ACPI expects EFI to reset it, and where there is none jumps to the BIOS's reset
//! vector in real mode (Linux arch/x86/kernel/reboot.c, `efi_reboot_required` and `BOOT_BIOS`) without ever trying the
//! ACPI reset register. So that register is what the reset vector leads to.

use cutover_devices::GuestMemory;
use cutover_devices::power::RESET_VALUE;
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::layout::{POWER_PORT, RESET_VECTOR};

/// Writes the code.
pub fn write(memory: &GuestMemory) -> Result<(), Error> {
    let [port_low, port_high] = POWER_PORT.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xb0, RESET_VALUE,         //        mov al, RESET_VALUE
        0xba, port_low, port_high, //        mov dx, POWER_PORT
        0xee,                      //        out dx, al
        0xf4,                      // again: hlt
        0xeb, 0xfd,                //        jmp again
    ];
    memory
        .write_slice(&code, GuestAddress(RESET_VECTOR))
        .map_err(Error::guest_write("the reset vector"))
}
