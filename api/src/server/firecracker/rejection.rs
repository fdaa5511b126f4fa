//! Why a request is refused before it reaches a VM.

use cutover_migration::transport::{Endpoint, NotAnEndpoint};
use cutover_snapshot::spec::{CMDLINE_MAX, MEMORY_MAX, MEMORY_MIN, SpecError};

use crate::server::v1::types::{COMPRESSION_MAX, POWER_TIMEOUT_MAX_MS};

/// Why a request is refused; the configuration is as before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// There is a VM already.
    #[error("the VM has been started: {0} cannot be configured any more")]
    Started(&'static str),
    /// InstanceStart, a second time.
    #[error("the VM has been started already")]
    StartedAlready,
    /// Another client's InstanceStart is being carried out.
    #[error("the VM is being started")]
    Starting,
    /// It belongs to one group at a time.
    #[error("the VM is a member of group {0}")]
    MemberAlready(String),
    /// Not what a coordinator calls a group.
    #[error("'{0}' is not a group's UUID")]
    NotAGroup(String),
    /// There is no VM yet.
    #[error("the VM has not been started: that is possible after InstanceStart")]
    NotStarted,
    /// Nothing to boot.
    #[error("there is no kernel to boot: PUT /boot-source first")]
    NoBootSource,
    /// Part of Firecracker's API, but not of this one.
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    /// Beyond what a VM can have.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Beyond what a VM can have, before it is converted to bytes.
    #[error("mem_size_mib: {0} is out of range: a VM has {MEMORY_MIN} to {MEMORY_MAX} of memory")]
    MemorySize(u64),
    /// The two ids of a request have to be the same.
    #[error("the path is that of {path:?}, but the body is about {body:?}")]
    IdMismatch {
        /// The id in the path.
        path: String,
        /// The id in the body.
        body: String,
    },
    /// A PATCH that changes nothing.
    #[error("there is nothing to change: the body has no field that can be changed")]
    EmptyPatch,
    /// A field that this kind of device needs.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A kernel can have one root device.
    #[error("drive {0:?} is the root device already")]
    RootTaken(String),
    /// It would break the command line.
    #[error("partuuid: {0:?} cannot be used: it has 1 to 64 letters, digits, '-', '/' and '='")]
    PartUuid(String),
    /// The arguments are too long once the root device is added.
    #[error("boot_args: {0} bytes with the root device are too long: a kernel takes at most {CMDLINE_MAX}")]
    BootArgs(usize),
    /// Two interfaces with one address.
    #[error("guest_mac: {mac} is that of interface {other:?} already")]
    MacTaken {
        /// The address.
        mac: String,
        /// Whose it is.
        other: String,
    },
    /// No such drive.
    #[error("there is no drive {0:?}")]
    NoDrive(String),
    /// No such interface.
    #[error("there is no network interface {0:?}")]
    NoInterface(String),
    /// No balloon.
    #[error("the VM has no balloon")]
    NoBalloon,
    /// The guest tells nothing.
    #[error(
        "there are no statistics: the balloon has stats_polling_interval_s 0, which cannot be changed after the start"
    )]
    NoBalloonStatistics,
    /// Exactly one of the two says where the memory is.
    #[error("exactly one of mem_backend and mem_file_path is needed")]
    MemoryBackend,
    /// Two taps for one interface.
    #[error("network_overrides: interface {0:?} is there twice")]
    OverrideTwice(String),
    /// A file that is mapped has pages of the usual size.
    #[error("huge_pages: 2M takes memory that another process serves: mem_backend with backend_type Uffd")]
    HugePagesOfFile,
    /// Firecracker's snapshots are of VMs that stand still.
    #[error("the VM has to be paused for that: PATCH /vm first, or POST /v1/snapshots, which does not take a pause")]
    NotPaused,
    /// A snapshot, or a VM that arrives, says what it consists of.
    #[error("{0} is configured already: that takes a process in which only log, metrics and console are")]
    Configured(&'static str),
    /// Not a level of zstd's.
    #[error("compress: {0} is out of range: levels are 1 to {COMPRESSION_MAX}")]
    Compression(i32),
    /// Not an endpoint of migrations.
    #[error(transparent)]
    Endpoint(#[from] NotAnEndpoint),
    /// Nobody is authenticated there.
    #[error("{0}: anyone on the way can read and change what is sent there: use tls://, or set insecure")]
    Insecure(Endpoint),
    /// Beyond what a migration takes.
    #[error("{field}: {given} is out of range: it is {min} to {max}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// What it was given.
        given: u64,
        /// The least it takes.
        min: u64,
        /// The most.
        max: u64,
    },
    /// The metrics of a process go to one place.
    #[error("metrics are configured already")]
    MetricsTaken,
    /// There is nowhere to write them.
    #[error("there is no metrics file: PUT /metrics before the start")]
    NoMetrics,
    /// Longer than anyone waits.
    #[error("timeout_ms: {0} is too long: a guest gets at most {POWER_TIMEOUT_MAX_MS}")]
    PowerTimeout(u64),
    /// Force takes no time.
    #[error("timeout_ms: only shutdown and reboot take one")]
    NoPowerTimeout,
}
