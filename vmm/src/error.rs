//! Why a VM could not be built, could not do as asked, or had to end.

use std::io;
use std::path::PathBuf;

use cutover_devices::bus::BusError;
use cutover_devices::console::ConsoleError;
use cutover_devices::event_loop::EventLoopError;
use cutover_devices::virtio::DeviceError;
use cutover_snapshot::size::ByteSize;
use cutover_snapshot::spec::SpecError;

use crate::dirty::{BackEnd, Unfit};
use crate::host::KVM_API_VERSION;
use crate::lifecycle::Refusal;
use crate::page_fault::Unavailable;

/// Everything that can go wrong in the monitor; texts name the file, device or limit, and what to do where that is known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was asked cannot be done in the VM's present state; nothing has changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The spec describes no VM.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {source}{}", open_advice(.source))]
    OpenKvm {
        /// Why.
        source: io::Error,
    },
    /// The kernel's KVM speaks another API.
    #[error("/dev/kvm speaks API version {found}, {KVM_API_VERSION} is needed")]
    KvmVersion {
        /// What `KVM_GET_API_VERSION` answered.
        found: i32,
    },
    /// KVM lacks something every VM needs.
    #[error("this host's KVM lacks {capability}; `cutover check` says what is missing")]
    KvmCapability {
        /// Name of the KVM capability.
        capability: &'static str,
    },
    /// A KVM call failed.
    #[error("KVM cannot {action}: {source}")]
    Kvm {
        /// What was asked of KVM.
        action: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// More vCPUs than KVM allows.
    #[error("{asked} vCPUs asked for, this host's KVM allows {most}")]
    TooManyCpus {
        /// vCPUs in the spec.
        asked: u8,
        /// KVM's limit.
        most: usize,
    },
    /// Guest memory cannot be had.
    #[error("cannot map {size} of guest memory{}: {source}", if *.hugepages { " in 2 MiB huge pages (see /proc/sys/vm/nr_hugepages)" } else { "" })]
    Memory {
        /// How much.
        size: ByteSize,
        /// Whether hugetlb pages were asked for.
        hugepages: bool,
        /// Why not.
        source: io::Error,
    },
    /// A boot file cannot be read.
    #[error("cannot read {what} {}: {source}", .path.display())]
    BootFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel file is neither a bzImage nor an ELF image for x86-64.
    #[error("{} is not a kernel: an x86-64 bzImage or ELF vmlinux is needed ({reason})", .path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What was wrong with it.
        reason: String,
    },
    /// Something does not fit in guest memory.
    #[error("{what} needs {needed} of guest memory, of which {available} is there: give the VM more memory")]
    DoesNotFit {
        /// What.
        what: &'static str,
        /// Bytes it needs.
        needed: ByteSize,
        /// Bytes there are.
        available: ByteSize,
    },
    /// Guest memory refused a read: a fault of the memory layout.
    #[error("cannot read {what} from guest memory: {source}")]
    GuestRead {
        /// What was read.
        what: &'static str,
        /// Why not.
        source: vm_memory::GuestMemoryError,
    },
    /// Guest memory refused a write of boot data: a fault of the memory layout.
    #[error("cannot write {what} into guest memory: {source}")]
    GuestWrite {
        /// What was written.
        what: &'static str,
        /// Why not.
        source: vm_memory::GuestMemoryError,
    },
    /// No interrupt line or address left.
    #[error("no {resource} left for {device}")]
    OutOfResources {
        /// `interrupt line` or `MMIO address`.
        resource: &'static str,
        /// The device that needed it.
        device: String,
    },
    /// A device cannot be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Nobody wants the snapshot any more.
    #[error("the snapshot was given up before it was complete")]
    SnapshotCancelled,
    /// A protected VM never was there, can be there no more, or is not sure to have been.
    #[error("there is no cut {cut} of the VM that was taken by all, and not followed by another")]
    NoSuchCut {
        /// Its number.
        cut: u64,
    },
    /// The VM has something that protection does not reach.
    #[error("the VM cannot be protected: {0}")]
    CannotProtect(String),
    /// The VM did not become another monitor's, or this one's.
    #[error(transparent)]
    Migration(#[from] cutover_migration::Error),
    /// A disk that is being saved cannot be read.
    #[error("cannot read disk '{id}' at byte {offset} to save it: {source}")]
    ReadDisk {
        /// The disk.
        id: String,
        /// Where.
        offset: u64,
        /// Why not.
        source: io::Error,
    },
    /// What a snapshot has of a disk does not fit the VM.
    #[error("{}: disk '{id}' cannot be restored: {reason}", .snapshot.display())]
    SavedDisk {
        /// The snapshot.
        snapshot: PathBuf,
        /// The disk.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// There is something where a disk is to be restored to.
    #[error(
        "disk '{id}' cannot be restored to {}, which {}",
        .path.display(),
        if *.replaceable {
            "exists: give the disk another path, or allow files to be replaced"
        } else {
            "is not a regular file: give the disk another path"
        }
    )]
    DiskExists {
        /// The disk.
        id: String,
        /// Where it was to be.
        path: PathBuf,
        /// Whether it is a file, which could be replaced.
        replaceable: bool,
    },
    /// A file that a disk is restored to.
    #[error("disk '{id}': cannot {action} {}: {source}", .path.display())]
    DiskFile {
        /// The disk.
        id: String,
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The console cannot be opened.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The device event loop failed.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// An operating system call failed.
    #[error("cannot {action}: {source}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// An incremental snapshot has nothing to be built on.
    #[error("this VM has no snapshot yet that an incremental one can be built on: make a full one first")]
    NoBase,
    /// A cut must not take as long as copying memory does.
    #[error("its memory can only be copied while the guest stands still: {0}")]
    OnlyWhilePaused(String),
    /// Two files hold state and memory.
    #[error("a snapshot in two files has no place for disks: have them referenced")]
    NoPlaceForDisks,
    /// The snapshot has a disk, and nobody said where that is to be.
    #[error(
        "disk '{id}' is in the snapshot: say which file to create for it, or in which directory (--disk {id}=FILE or --disks DIR)"
    )]
    DiskHasNoPlace {
        /// Id of the disk.
        id: String,
    },
    /// Something was to be different about a device that the VM does not have.
    #[error("the VM has no {kind} '{id}'{}", only(.known))]
    NoSuchDevice {
        /// What kind of device.
        kind: &'static str,
        /// The id that was given.
        id: String,
        /// Ids there are.
        known: Vec<String>,
    },
    /// The same of a socket device.
    #[error("the VM has no vsock device that could have the socket '{}'", .0.display())]
    NoVsock(PathBuf),
    /// Asked about a balloon that there is none of.
    #[error("the VM has no balloon device")]
    NoBalloon,
    /// Whether there are statistics is settled when the VM is built.
    #[error("balloon: statistics cannot be switched on or off any more: they are taken every {0} s, 0 being never")]
    BalloonStatistics(u16),
    /// Saved state cannot be written or read.
    #[error(transparent)]
    Snapshot(#[from] cutover_snapshot::Error),
    /// What a snapshot says of the machine cannot be.
    #[error("the saved state cannot be restored: {0}")]
    SavedState(String),
    /// The snapshot is from another manufacturer's CPU.
    #[error("the guest was saved on a CPU by {needed:?}, and cannot go on with one by {found:?}")]
    CpuVendor {
        /// CPUID's vendor string where it was saved.
        needed: String,
        /// And here.
        found: String,
    },
    /// The guest was shown CPU features that this host lacks.
    #[error("this host's CPU, or its KVM, lacks features that the guest uses: {features}")]
    CpuFeatures {
        /// Them, as the manufacturers' manuals write them.
        features: String,
    },
    /// The time stamp counter cannot be had at the frequency the guest knows.
    #[error(
        "the guest's TSC counts at {guest_khz} kHz, this host's at {host_khz} kHz, and its KVM cannot scale it \
         (KVM_CAP_TSC_CONTROL): restore on a host of the same frequency, or on one that can"
    )]
    TscFrequency {
        /// What the guest was told.
        guest_khz: u32,
        /// What there is.
        host_khz: u32,
    },
    /// A model-specific register cannot be set.
    #[error("this host's KVM refuses the value {value:#x} of MSR {index:#x} that the guest had")]
    Msr {
        /// Which.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// A guest's writes cannot be noticed as asked for.
    #[error("--dirty-log {log} cannot be used here: {reason}")]
    DirtyLog {
        /// What was asked for.
        log: BackEnd,
        /// Why not.
        reason: Unfit,
    },
    /// Page faults of guest memory stay with the kernel.
    #[error(transparent)]
    PageFaults(#[from] Unavailable),
    /// A snapshot's memory is not that of the VM.
    #[error("the snapshot has {image} of memory, the VM {memory}")]
    MemoryImage {
        /// In the snapshot.
        image: ByteSize,
        /// In the VM.
        memory: ByteSize,
    },
    /// The process that is to fill the memory cannot be reached.
    #[error("cannot hand the VM's memory to the page-fault handler at {}: {source}", .path.display())]
    PageFaultHandler {
        /// Its socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call filter cannot be built or installed.
    #[error("cannot confine the {thread} thread with seccomp: {reason}")]
    Seccomp {
        /// Which thread.
        thread: &'static str,
        /// Why not.
        reason: String,
    },
    /// KVM could not go on running a vCPU.
    #[error("vCPU {cpu} cannot run: {reason}")]
    Vcpu {
        /// Its index.
        cpu: u8,
        /// What KVM said.
        reason: String,
    },
}

impl Error {
    /// For `map_err`: KVM refused `action`.
    pub(crate) fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { action, source }
    }

    /// For `map_err`: guest memory refused `what`.
    pub(crate) fn guest_write(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self {
        move |source| Self::GuestWrite { what, source }
    }

    /// For `map_err`: guest memory refused to tell `what`.
    pub(crate) fn guest_read(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self {
        move |source| Self::GuestRead { what, source }
    }

    /// For `map_err`: the operating system refused `action`.
    pub(crate) fn os<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Os {
            action,
            source: source.into(),
        }
    }
}

fn only(ids: &[String]) -> String {
    match ids {
        [] => ", nor any other".to_owned(),
        ids => format!(", only {}", ids.join(", ")),
    }
}

fn open_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (load the kvm_intel or kvm_amd module; in a VM, enable nested virtualization)",
        io::ErrorKind::PermissionDenied => " (add your user to the group that owns it, usually kvm)",
        _ => "",
    }
}
