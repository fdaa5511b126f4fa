//! [`VmSpec`]: everything a VM is built from, as the command line, a configuration file or a peer describes it.
//!
//! A spec is untrusted data. [`VmSpec::check`] answers whether it describes a VM at all (limits, names, duplicates);
//! whether this host can build it is for the `vmm` crate to find out.

use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::size::ByteSize;

mod check;
mod rate_limiter;
mod rng;

pub use rate_limiter::{RateLimiterSpec, TokenBucketSpec};
pub use rng::RngSpec;

/// Most vCPUs a VM may have.
pub const CPUS_MAX: u8 = 32;
/// Least guest memory: a stock kernel and its initial RAM disk do not unpack in less.
pub const MEMORY_MIN: ByteSize = ByteSize::from_mib(32);
/// Most guest memory: half of what one KVM memory slot holds (2³¹ − 1 pages), so that two slots always do.
pub const MEMORY_MAX: ByteSize = ByteSize::from_mib(4 << 20);
/// Most bytes of a kernel command line, without its final NUL (`COMMAND_LINE_SIZE` of Linux on x86).
pub const CMDLINE_MAX: usize = 2047;
/// Most virtio devices: each has an interrupt line of its own, of which the I/O APIC's 24 leave as many beside the PC's.
pub const DEVICES_MAX: usize = 16;
/// Most bytes of a disk's serial number (`VIRTIO_BLK_ID_BYTES`, virtio 1.2 §5.2.6).
pub const DISK_SERIAL_MAX: usize = 20;
/// Most bytes of a host network interface's name (`IFNAMSIZ` of Linux without its NUL).
pub const TAP_NAME_MAX: usize = 15;
/// Least MTU of a network interface (virtio 1.2 §5.1.4.1).
pub const MTU_MIN: u16 = 68;
/// Least address of a guest on its socket device: those below are the host's or reserved (virtio 1.2 §5.10.4).
pub const CID_MIN: u32 = 3;
/// Greatest: the one above means any (`VMADDR_CID_ANY` of Linux).
pub const CID_MAX: u32 = u32::MAX - 1;
/// Most bytes of a socket device's path: what `sockaddr_un` of Linux takes, less `_4294967295` and a NUL.
pub const UDS_PATH_MAX: usize = 108 - 11 - 1;
/// Most bytes of a VM's name.
pub const NAME_MAX: usize = 64;
/// Most characters of a device's id.
pub const ID_MAX: usize = 64;
/// Kernel command line used when none is given: console on the serial port, reset through ACPI.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";

/// A whole VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Name in logs, 1 to [`NAME_MAX`] bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Number of vCPUs, 1 to [`CPUS_MAX`].
    pub cpus: u8,
    /// Guest memory.
    pub memory: MemorySpec,
    /// What to boot.
    pub boot: BootSpec,
    /// Disks, in the order the guest sees them (`/dev/vda`, `/dev/vdb`, …).
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces, in the order the guest sees them.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// The virtio entropy device, if there is one.
    #[serde(default, with = "rng")]
    pub rng: Option<RngSpec>,
    /// The virtio socket device, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockSpec>,
    /// The metadata service, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds: Option<MmdsSpec>,
    /// The virtio balloon, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonSpec>,
    /// Where the guest's serial port `ttyS0` goes.
    #[serde(default)]
    pub serial: SerialSpec,
}

/// Guest memory, mapped by the monitor: anonymous if private, one memfd if shared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Size, a multiple of 4 KiB (of 2 MiB with huge pages), [`MEMORY_MIN`] to [`MEMORY_MAX`].
    pub size: ByteSize,
    /// Let other processes map the same memory.
    #[serde(default)]
    pub shared: bool,
    /// Back the memory with 2 MiB hugetlb pages.
    #[serde(default)]
    pub hugepages: bool,
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// A bzImage or an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// How the kernel is entered.
    #[serde(default)]
    pub protocol: BootProtocol,
    /// Kernel command line, at most [`CMDLINE_MAX`] bytes.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootProtocol {
    /// PVH where an ELF kernel has that entry, else Linux.
    #[default]
    Auto,
    /// The Linux 64-bit boot protocol.
    Linux,
    /// PVH or an error.
    Pvh,
}

/// One virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// What requests call it, 1 to [`ID_MAX`] letters, digits and underscores; see [`id_at`](Self::id_at).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Raw image file or block device; its size is a multiple of 512 bytes.
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Serial number the guest sees, 1 to [`DISK_SERIAL_MAX`] printable ASCII characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How requests reach the host.
    #[serde(default)]
    pub io: DiskIo,
    /// Limits: bytes read and written, and requests of all kinds.
    #[serde(default, skip_serializing_if = "RateLimiterSpec::is_unlimited")]
    pub rate_limiter: RateLimiterSpec,
}

/// How a disk's requests reach the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskIo {
    /// io_uring where the host's kernel has it, else the thread pool.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// A pool of threads.
    Threads,
}

/// One virtio-net interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// What requests call it, 1 to [`ID_MAX`] letters, digits and underscores; see [`id_at`](Self::id_at).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The host's end.
    #[serde(default)]
    pub tap: TapSpec,
    /// The guest's MAC address; a locally administered one is made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// MTU told to the guest, [`MTU_MIN`] to 65535 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Address and prefix length to give the host's end, which is then brought up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<HostAddress>,
    /// Limits of what the guest receives: bytes of frames, and frames.
    #[serde(default, skip_serializing_if = "RateLimiterSpec::is_unlimited")]
    pub rx_rate_limiter: RateLimiterSpec,
    /// Limits of what the guest sends: bytes of frames, and frames.
    #[serde(default, skip_serializing_if = "RateLimiterSpec::is_unlimited")]
    pub tx_rate_limiter: RateLimiterSpec,
}

/// The host's end of a network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TapSpec {
    /// Create a tap device with a free name; it disappears with the VM.
    #[default]
    Create,
    /// Use the tap device of this name; one that does not exist is created.
    Name(String),
    /// Use an open tap file descriptor that this process inherited.
    Fd(RawFd),
}

/// An IPv4 address with its prefix length, written `172.16.0.1/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostAddress {
    /// The address.
    pub address: Ipv4Addr,
    /// Length of the network prefix in bits, 0 to 32.
    pub prefix: u8,
}

/// A unicast Ethernet address, written `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// The virtio socket device: connections between programs of the guest and of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's address, [`CID_MIN`] to [`CID_MAX`].
    pub cid: u32,
    /// Unix socket of the host that is created for connections to the guest, of at most [`UDS_PATH_MAX`] bytes. For the
    /// guest's own connections to a port, somebody listens at this path with `_PORT` appended.
    pub uds: PathBuf,
}

/// The metadata service: what the host has to say, read by the guest over HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsSpec {
    /// Who is given metadata.
    #[serde(default)]
    pub version: MmdsVersion,
    /// Ids of the network interfaces at which it answers; all if there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<String>,
    /// Its address there, of 169.254.1.0 to 169.254.254.255: link-local, and not reserved (RFC 3927 §2.1).
    #[serde(default = "mmds_address")]
    pub address: Ipv4Addr,
    /// Answer in the form of EC2's service whatever the guest accepts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub imds_compat: bool,
}

/// Who is given metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Everybody in the guest.
    V1,
    /// Who asks with a token.
    #[default]
    V2,
}

/// Where the metadata service is unless told otherwise: EC2's.
pub fn mmds_address() -> Ipv4Addr {
    Ipv4Addr::new(169, 254, 169, 254)
}

/// The virtio balloon: memory that the guest gives back to its host while that has better use for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonSpec {
    /// How much the guest is asked for, in whole MiB, at most all of its memory.
    #[serde(default)]
    pub amount: ByteSize,
    /// The guest may take memory out of the balloon before it is out of it.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Every how many seconds the guest tells of its memory; never if 0.
    #[serde(default)]
    pub stats_interval_s: u16,
    /// The guest reports memory that it does not use, without being asked.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Where the guest's serial port goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SerialSpec {
    /// Standard input and output; a terminal is put in raw mode, with the escape Ctrl-A x.
    #[default]
    Stdio,
    /// Output appended to a file, no input.
    File(PathBuf),
    /// A listening Unix socket, one client at a time.
    Socket(PathBuf),
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// Output discarded, no input.
    Null,
}

/// Why a text or a spec does not describe a VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not a unicast Ethernet address.
    #[error("'{0}' is not a unicast MAC address: write six hexadecimal bytes such as 02:00:00:00:00:01")]
    Mac(String),
    /// Not an address with a prefix length.
    #[error("'{0}' is not an IPv4 address with a prefix length, such as 172.16.0.1/24")]
    HostAddress(String),
    /// The VM's name is empty, long, or not printable.
    #[error("name: {0:?} cannot be used: a name has 1 to {NAME_MAX} bytes and no control characters")]
    Name(String),
    /// No vCPU, or more than [`CPUS_MAX`].
    #[error("cpus: {0} is out of range: a VM has 1 to {CPUS_MAX} vCPUs")]
    Cpus(u8),
    /// Less than [`MEMORY_MIN`] or more than [`MEMORY_MAX`].
    #[error("memory: {0} is out of range: a VM has {MEMORY_MIN} to {MEMORY_MAX} of memory")]
    MemoryRange(ByteSize),
    /// Memory comes in whole pages.
    #[error("memory: {size} is not a multiple of the page size, {page}")]
    MemoryPages {
        /// What was asked for.
        size: ByteSize,
        /// What it must be a multiple of.
        page: ByteSize,
    },
    /// More than [`CMDLINE_MAX`] bytes.
    #[error("cmdline: {0} bytes are too long: a kernel takes at most {CMDLINE_MAX}")]
    CmdlineLength(usize),
    /// A kernel would see the command line end there.
    #[error("cmdline: the byte at position {0} is NUL, which would end the command line")]
    CmdlineNul(usize),
    /// More than [`DEVICES_MAX`] virtio devices.
    #[error(
        "{0} devices (disks, network interfaces, rng, vsock, balloon) are too many: a VM has interrupt lines for {DEVICES_MAX}"
    )]
    Devices(usize),
    /// Not an id.
    #[error("{device}: id: {id:?} cannot be used: an id has 1 to {ID_MAX} letters, digits and underscores")]
    Id {
        /// `disk` or `net`.
        device: &'static str,
        /// The id.
        id: String,
    },
    /// Two devices of a kind would answer to one id.
    #[error("{device}: id: {id:?} is that of more than one device; the n-th has {device}N if none is given, from 0 on")]
    IdTwice {
        /// `disk` or `net`.
        device: &'static str,
        /// The id.
        id: String,
    },
    /// Not a serial number.
    #[error("disk {}: serial: {serial:?} cannot be used: it has 1 to {DISK_SERIAL_MAX} printable ASCII characters", .path.display())]
    DiskSerial {
        /// Which disk.
        path: PathBuf,
        /// The serial number.
        serial: String,
    },
    /// Two disks of one VM are the same file, and the guest may write to it: each would overwrite the other's data.
    #[error("disk {}: given more than once: only a disk that is read-only each time can be", .0.display())]
    DiskTwice(PathBuf),
    /// Not a name Linux gives to a network interface.
    #[error("net: tap: {0:?} is not an interface name: it has 1 to {TAP_NAME_MAX} bytes without blanks, '/' or ':'")]
    TapName(String),
    /// Two interfaces of one VM would fight over one tap.
    #[error("net: tap: {0} is given to more than one network interface")]
    TapTwice(String),
    /// A descriptor is a small non-negative number.
    #[error("net: fd: {0} is not a file descriptor")]
    TapFd(RawFd),
    /// Less than [`CID_MIN`] or more than [`CID_MAX`].
    #[error("vsock: cid: {0} is out of range: a guest has an address from {CID_MIN} to {CID_MAX}")]
    Cid(u32),
    /// Empty, or more than [`UDS_PATH_MAX`] bytes.
    #[error("vsock: uds: {} cannot be used: the path has 1 to {UDS_PATH_MAX} bytes, so that _PORT can be appended", .0.display())]
    UdsPath(PathBuf),
    /// No interface with this id.
    #[error("mmds: nets: there is no network interface {0:?}")]
    MmdsNet(String),
    /// No interface at all.
    #[error("mmds: the VM has no network interface at which the metadata service could answer")]
    MmdsNowhere,
    /// Not an address that nobody else can have.
    #[error("mmds: address: {0} cannot be used: it is one of 169.254.1.0 to 169.254.254.255")]
    MmdsAddress(Ipv4Addr),
    /// Not whole MiB, or more than the guest has.
    #[error(
        "balloon: amount: {amount} cannot be asked for: it is a multiple of 1M, at most the guest's memory of {memory}"
    )]
    BalloonAmount {
        /// What was asked for.
        amount: ByteSize,
        /// What there is.
        memory: ByteSize,
    },
    /// Less than [`MTU_MIN`].
    #[error("net: mtu: {0} is out of range: it is {MTU_MIN} to 65535 bytes")]
    Mtu(u16),
}

impl BalloonSpec {
    /// The amount in pages of 4 KiB; all there can be if it is not that of a balloon that was
    /// [checked](VmSpec::check).
    pub fn pages(&self) -> u32 {
        u32::try_from(self.amount.bytes() >> 12).unwrap_or(u32::MAX)
    }
}

impl DiskSpec {
    /// The id of this disk, which is the `index`-th of its VM, counted from 0: the one given, or `disk0`, `disk1`, ….
    pub fn id_at(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{index}"))
    }
}

impl NetSpec {
    /// The id of this interface, which is the `index`-th of its VM, counted from 0: the one given, or `net0`, `net1`, ….
    pub fn id_at(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("net{index}"))
    }
}

impl FromStr for MacAddr {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && !part.starts_with('+'))
                .ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        let multicast = bytes[0] & 1 != 0;
        if parts.next().is_some() || multicast || bytes == [0; 6] {
            return Err(error());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for HostAddress {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::HostAddress(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(error)?;
        let address = address.parse().map_err(|_| error())?;
        let prefix = prefix.parse().ok().filter(|&bits| bits <= 32).ok_or_else(error)?;
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

macro_rules! serde_as_text {
    ($($type:ty),*) => {$(
        impl TryFrom<String> for $type {
            type Error = SpecError;

            fn try_from(text: String) -> Result<Self, SpecError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    )*};
}
serde_as_text!(MacAddr, HostAddress);

fn default_cmdline() -> String {
    DEFAULT_CMDLINE.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_read_and_printed_alike() {
        for text in ["02:00:00:00:00:01", "fe:dc:ba:98:76:54"] {
            assert_eq!(text.parse::<MacAddr>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_no_unicast_mac_address_is_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02-00-00-00-00-01",
            "0x:00:00:00:00:01",
            "+2:00:00:00:00:01",
            "01:00:00:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(SpecError::Mac(text.to_owned())));
        }
    }

    #[test]
    fn host_addresses_are_read_and_printed_alike() {
        for text in ["172.16.0.1/24", "10.0.0.1/32", "0.0.0.0/0"] {
            assert_eq!(text.parse::<HostAddress>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_no_host_address_is_refused() {
        for text in [
            "",
            "172.16.0.1",
            "172.16.0.1/33",
            "172.16.0/24",
            "::1/64",
            "172.16.0.1/",
            "/24",
        ] {
            assert_eq!(
                text.parse::<HostAddress>(),
                Err(SpecError::HostAddress(text.to_owned()))
            );
        }
    }
}
