//! Tiny guests for tests: a few instructions, which every KVM runs, one that emulates them too.

use std::io::Write;
use std::path::Path;

use cutover_devices::GuestMemory;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::{BootProtocol, BootSpec, MemorySpec, SerialSpec, VmSpec};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use crate::dirty::{Rings, Tracker};
use crate::kvm::KvmVm;

/// A write to this port stops the guest.
pub const PORT: u8 = 0x80;

/// Writes 256 words all over the first megabyte, to addresses from a congruential generator, then 256 more and so on.
pub const SCATTER: &[u8] = &[
    0x89, 0xd8, //             again:  mov ax, bx
    0xba, 0x55, 0x62, //               mov dx, 25173
    0xf7, 0xe2, //                     mul dx
    0x05, 0x19, 0x36, //               add ax, 13849
    0x89, 0xc3, //                     mov bx, ax
    0x8e, 0xc0, //                     mov es, ax
    0x26, 0x89, 0x36, 0x00, 0x00, //   mov [es:0], si
    0x46, //                           inc si
    0x49, //                           dec cx
    0x75, 0xe9, //                     jnz again
    0xe6, PORT, //                     out PORT, al
    0xb9, 0x00, 0x01, //               mov cx, 256
    0xeb, 0xe2, //                     jmp again
];

/// Writes a byte to `es:di`, over and over, with a stop after each.
pub const POKE: &[u8] = &[
    0x26, 0x88, 0x05, // again:  mov [es:di], al
    0xe6, PORT, //               out PORT, al
    0xeb, 0xf9, //               jmp again
];

/// A guest without a kernel, in real mode.
pub struct TinyGuest {
    pub vm: KvmVm,
    pub vcpu: VcpuFd,
    /// Its dirty ring, if it has one.
    pub rings: Option<Rings>,
}

impl TinyGuest {
    /// A guest with `memory` that will run `program`, which is put at `address`. None, with a note, where there is no
    /// KVM at all.
    pub fn boot(memory: &GuestMemory, address: u64, program: &[u8]) -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        Some(Self::of(KvmVm::create(memory).unwrap(), None, address, program))
    }

    /// As [`boot`](Self::boot), of a VM that has no vCPU yet, and of which a tracker notices what is written.
    pub fn of(vm: KvmVm, tracker: Option<&Tracker>, address: u64, program: &[u8]) -> Self {
        let memory = &vm.memory_slots.memory;
        memory.write_slice(program, GuestAddress(address)).unwrap();
        let vcpu = vm.fd.create_vcpu(0).unwrap();
        let rings = tracker.and_then(|tracker| tracker.add_vcpu(&vcpu).unwrap());
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (address, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        Self { vm, vcpu, rings }
    }

    /// Finishes what the guest stopped at: KVM does so only when it is to run again.
    pub fn settle(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        assert_eq!(self.vcpu.run().unwrap_err().errno(), libc::EINTR);
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Runs until the program writes to [`PORT`].
    pub fn run_to_stop(&mut self) {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT) => return,
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    let rings = self.rings.as_ref().expect("a ring that is full is there");
                    rings.drain().unwrap();
                }
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }
}

/// Whether there is a KVM; says so where there is none.
pub fn has_kvm() -> bool {
    let exists = Path::new("/dev/kvm").exists();
    if !exists {
        eprintln!("skipped: this machine has no /dev/kvm");
    }
    exists
}

/// A VM with `kernel`, two vCPUs, and no devices but those that every VM has.
pub fn tiny_spec(kernel: &Path) -> VmSpec {
    VmSpec {
        name: None,
        cpus: 2,
        memory: MemorySpec {
            size: ByteSize::from_mib(32),
            shared: false,
            hugepages: false,
        },
        boot: BootSpec {
            kernel: kernel.to_owned(),
            initrd: None,
            protocol: BootProtocol::Linux,
            cmdline: String::new(),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        rng: None,
        vsock: None,
        mmds: None,
        balloon: None,
        serial: SerialSpec::Null,
    }
}

/// An ELF kernel that is nothing but `program`.
pub fn kernel(program: &[u8]) -> NamedTempFile {
    const ENTRY: u64 = 0x100_0000;
    const HEADERS_SIZE: u64 = 64 + 56;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend([ENTRY, 64, 0].map(u64::to_le_bytes).concat());
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    image.extend([1, 5].map(u32::to_le_bytes).concat());
    let size = program.len() as u64;
    image.extend(
        [HEADERS_SIZE, ENTRY, ENTRY, size, size, 4]
            .map(u64::to_le_bytes)
            .concat(),
    );
    image.extend(program);
    let mut file = NamedTempFile::new().expect("temporary file");
    file.write_all(&image).expect("temporary file");
    file
}
