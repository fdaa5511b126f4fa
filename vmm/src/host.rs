//! What this machine offers a monitor: plain facts, found by trying. What they mean to a user is for `cutover check`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use cutover_snapshot::size::ByteSize;
use kvm_ioctls::{Cap, Kvm};
use rustix::mm::UserfaultfdFlags;

/// The KVM API this monitor speaks; stable since Linux 2.6.22.
pub const KVM_API_VERSION: i32 = 12;

/// What every VM needs of KVM, with the names of the kernel's documentation.
pub const NEEDED_CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// What was found on this machine.
#[derive(Debug)]
pub struct HostFacts {
    /// `/dev/kvm`, or why it cannot be opened.
    pub kvm: io::Result<KvmFacts>,
    /// The processor's virtualization extension, as the kernel lists it among the CPU's flags, or why that cannot be read.
    pub extension: io::Result<Option<CpuExtension>>,
    /// `/dev/net/tun`, or why it cannot be opened.
    pub tun: io::Result<()>,
    /// Whether an io_uring can be made, or why not.
    pub io_uring: io::Result<()>,
    /// Whether a userfaultfd can be made that also handles the kernel's faults, KVM's among them, or why not.
    pub userfaultfd: io::Result<()>,
    /// Memory that programs can still get without swapping.
    pub memory_available: io::Result<ByteSize>,
}

/// What KVM says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct KvmFacts {
    /// The API version, [`KVM_API_VERSION`] if it is any use.
    pub version: i32,
    /// Names of the [`NEEDED_CAPABILITIES`] that are absent.
    pub missing: Vec<&'static str>,
    /// Most vCPUs of one VM.
    pub cpus_max: usize,
}

/// A processor's virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuExtension {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

/// Looks the machine over. Changes nothing.
pub fn probe() -> HostFacts {
    HostFacts {
        kvm: probe_kvm(),
        extension: cpu_extension(),
        tun: open_device("/dev/net/tun").map(drop),
        io_uring: probe_io_uring(),
        userfaultfd: probe_userfaultfd(),
        memory_available: memory_available(),
    }
}

/// The virtualization extension of this machine's processors, if they have one.
///
/// Without one, `/dev/kvm` may exist all the same (a paravirtual back end that emulates the guest's instructions), but
/// it does not get a stock Linux kernel through its boot.
///
/// # Errors
/// The kernel does not tell, as in a jail.
pub fn cpu_extension() -> io::Result<Option<CpuExtension>> {
    fs::read_to_string("/proc/cpuinfo").map(|cpuinfo| extension_among_flags(&cpuinfo))
}

fn extension_among_flags(cpuinfo: &str) -> Option<CpuExtension> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_ascii_whitespace().find_map(|flag| match flag {
        "vmx" => Some(CpuExtension::Vmx),
        "svm" => Some(CpuExtension::Svm),
        _ => None,
    })
}

fn probe_kvm() -> io::Result<KvmFacts> {
    let kvm = Kvm::new()?;
    let missing = NEEDED_CAPABILITIES
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability));
    Ok(KvmFacts {
        version: kvm.get_api_version(),
        missing: missing.map(|(_, name)| *name).collect(),
        cpus_max: kvm.get_max_vcpus(),
    })
}

fn open_device(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn probe_io_uring() -> io::Result<()> {
    /// Bytes of the kernel's `struct io_uring_params`.
    const PARAMS_SIZE: usize = 120;
    let mut params = [0_u64; PARAMS_SIZE / 8];
    let entries: libc::c_uint = 1;
    // SAFETY: the kernel reads and writes one io_uring_params, for which the array has the size and the alignment.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, params.as_mut_ptr()) };
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call returned a new descriptor that nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

fn probe_userfaultfd() -> io::Result<()> {
    // SAFETY: no memory is registered with the descriptor, which is closed at once.
    match unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC) } {
        Ok(_) => Ok(()),
        // Unprivileged users may get it through the device instead.
        Err(error) => open_device("/dev/userfaultfd").map(drop).map_err(|_| error.into()),
    }
}

/// Memory that programs can still get without swapping.
pub fn memory_available() -> io::Result<ByteSize> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    available_of(&meminfo).ok_or_else(|| io::Error::other("/proc/meminfo has no line MemAvailable"))
}

fn available_of(meminfo: &str) -> Option<ByteSize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).map(ByteSize::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_is_found_among_the_cpu_flags_as_a_whole_word() {
        let with = |flags: &str| format!("processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: svm\n");
        assert_eq!(extension_among_flags(&with("fpu vmx sse")), Some(CpuExtension::Vmx));
        assert_eq!(extension_among_flags(&with("fpu svm")), Some(CpuExtension::Svm));
        assert_eq!(extension_among_flags(&with("fpu svm_lock vmxnet")), None);
        assert_eq!(extension_among_flags(""), None);
    }

    #[test]
    fn available_memory_is_read_in_kib() {
        let meminfo = "MemTotal:        8000 kB\nMemFree:  10 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available_of(meminfo), Some(ByteSize::from_mib(2)));
        assert_eq!(available_of("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn probing_answers_every_question_on_any_machine() {
        let facts = probe();
        assert!(facts.memory_available.expect("Linux tells").bytes() > 0);
    }
}
