//! Tiny guests for tests: a few instructions of real mode, which every KVM runs, one that emulates them too.

use cutover_devices::GuestMemory;
use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::KvmVm;

/// A write to this port stops the guest.
pub const PORT: u8 = 0x80;

/// See the module.
pub struct TinyGuest {
    pub vm: KvmVm,
    pub vcpu: VcpuFd,
}

impl TinyGuest {
    /// A guest with `memory` that will run `program`, which is put at `address`. None, with a note, where there is no
    /// KVM at all.
    pub fn boot(memory: &GuestMemory, address: u64, program: &[u8]) -> Option<Self> {
        if !std::path::Path::new("/dev/kvm").exists() {
            eprintln!("skipped: this machine has no /dev/kvm");
            return None;
        }
        memory.write_slice(program, GuestAddress(address)).unwrap();
        let vm = KvmVm::create(memory).unwrap();
        let vcpu = vm.fd.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (address, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        Some(Self { vm, vcpu })
    }

    /// Runs until the program writes to [`PORT`].
    pub fn run_to_stop(&mut self) {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT) => return,
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }
}
