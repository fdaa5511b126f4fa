//! Why a virtio device cannot be made or started, in words a user can act on.

use std::io;
use std::path::PathBuf;

use crate::event_loop::EventLoopError;
use crate::listener::ListenError;

/// Why a virtio device cannot be made or started.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The image cannot be opened as asked.
    #[error("cannot open disk image '{path}' for {access}: {source}{hint}")]
    OpenDisk {
        /// The image.
        path: PathBuf,
        /// `reading` or `reading and writing`.
        access: &'static str,
        /// From the system.
        source: io::Error,
        /// What to do, with its leading punctuation; may be empty.
        hint: &'static str,
    },
    /// Neither a file nor a block device.
    #[error("disk image '{0}' is neither a regular file nor a block device")]
    DiskKind(PathBuf),
    /// Not whole sectors.
    #[error(
        "disk image '{path}' has {size} bytes, which is not a positive multiple of 512; 'truncate --size=%512' rounds a file up"
    )]
    DiskSize {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Somebody has it open.
    #[error("disk image '{path}' is in use by {user}; only read-only disks can be shared")]
    DiskInUse {
        /// The image.
        path: PathBuf,
        /// By whom, as far as that is known.
        user: String,
    },
    /// It was not what it is now when the VM was built.
    #[error("disk image '{path}' had {then} bytes when the VM was built with it, and has {now} now")]
    DiskResized {
        /// The image.
        path: PathBuf,
        /// Its size then.
        then: u64,
        /// And now.
        now: u64,
    },
    /// What was written may be lost.
    #[error("cannot make permanent what was written to disk image '{path}', or let others have it: {source}")]
    DiskNotReleased {
        /// The image.
        path: PathBuf,
        /// From the system.
        source: io::Error,
    },
    /// A snapshot reads the image, or a restore fills it.
    #[error("the image of this disk is being copied by a snapshot or a restore: try again when that has finished")]
    DiskBeingCopied,
    /// What was kept of it would be of another image.
    #[error("the image of this disk cannot be replaced while the VM is protected: end its protection first")]
    DiskProtected,
    /// The disk is not protected, or has gone beyond the cut, or behind it.
    #[error("what this disk had at cut {cut} is not known any more")]
    DiskCutGone {
        /// The cut.
        cut: u64,
    },
    /// The host's disk failed.
    #[error("cannot read what this disk had at cut {cut}, at byte {offset}: {source}")]
    DiskCutUnreadable {
        /// The cut.
        cut: u64,
        /// Where.
        offset: u64,
        /// From the system.
        source: io::Error,
    },
    /// The host's disk failed.
    #[error("cannot take this disk back to cut {cut}: {source}")]
    DiskRollBack {
        /// The cut.
        cut: u64,
        /// From the system.
        source: io::Error,
    },
    /// Too long for the guest to read.
    #[error("disk serial number '{serial}' has {len} bytes; the limit is 20", len = .serial.len())]
    Serial {
        /// The serial number.
        serial: String,
    },
    /// Asked for and not to be had.
    #[error("io_uring is not available for disk image '{path}': {source}; use io=auto or io=threads")]
    IoUring {
        /// The image.
        path: PathBuf,
        /// From the system.
        source: io::Error,
    },
    /// No device node, or no right to open it.
    #[error("cannot open /dev/net/tun: {source}; load the 'tun' module, or run with the right to open it")]
    OpenTun {
        /// From the system.
        source: io::Error,
    },
    /// Against the kernel's rules.
    #[error("'{0}' is not a name for a tap device: it takes 1 to 15 bytes without '/', ':' and spaces")]
    TapName(String),
    /// A tap device has one user, unless it is multi-queue.
    #[error("tap device '{0}' is busy: another process has it open")]
    TapBusy(String),
    /// No right to create or use it.
    #[error(
        "not permitted to use tap device '{0}': create it for this user with 'ip tuntap add mode tap user NAME', or \
         run with CAP_NET_ADMIN"
    )]
    TapNotPermitted(String),
    /// The name belongs to an interface of another kind.
    #[error("network interface '{0}' is not a tap device, or its flags do not allow vnet headers")]
    TapKind(String),
    /// What was inherited is something else.
    #[error("file descriptor {fd} is not a tap device with vnet headers: {reason}")]
    TapFd {
        /// The descriptor.
        fd: i32,
        /// What is wrong with it.
        reason: String,
    },
    /// A request about a tap device failed.
    #[error("cannot {action} tap device '{name}': {source}")]
    Tap {
        /// What was tried.
        action: &'static str,
        /// The device.
        name: String,
        /// From the system.
        source: io::Error,
    },
    /// Too short for IP.
    #[error("an MTU of {mtu} bytes is too small; the least is {min}")]
    Mtu {
        /// What was asked for.
        mtu: u16,
        /// The limit.
        min: u16,
    },
    /// Something the device needs from the system is not to be had.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// From the system.
        source: io::Error,
    },
    /// No device of this kind has the id.
    #[error("there is no {kind} '{id}'; the VM has {}", if .known.is_empty() { "none".to_owned() } else { .known.join(", ") })]
    Unknown {
        /// `disk` or `network interface`.
        kind: &'static str,
        /// What was asked for.
        id: String,
        /// Ids of this kind.
        known: Vec<String>,
    },
    /// Nobody can listen at a socket device's path.
    #[error("vsock: {0}")]
    Listen(#[from] ListenError),
    /// The driver set a queue up wrongly.
    #[error("queue {index} cannot be used: {reason}")]
    QueueSetup {
        /// Which.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// What was saved of a device cannot be the state of the device there is.
    #[error("the saved state of {device} cannot be restored: {reason}")]
    SavedState {
        /// The device.
        device: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The event loop is gone.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
}

impl DeviceError {
    /// For `map_err` on a system call that was to do `action`.
    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            action,
            source: source.into(),
        }
    }
}
