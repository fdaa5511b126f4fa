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

/// Most vCPUs a VM may have.
pub const CPUS_MAX: u8 = 32;
/// Least guest memory.
pub const MEMORY_MIN: ByteSize = ByteSize::from_mib(32);
/// Kernel command line used when none is given: console on the serial port, reset through ACPI.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";

/// A whole VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Name in messages, logs and the process title.
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
    /// Whether the guest has a virtio entropy device.
    #[serde(default)]
    pub rng: bool,
    /// Where the guest's serial port `ttyS0` goes.
    #[serde(default)]
    pub serial: SerialSpec,
}

/// Guest memory: one memfd, mapped by the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Size, a multiple of 4 KiB (of 2 MiB with huge pages), at least [`MEMORY_MIN`].
    pub size: ByteSize,
    /// Map the memfd shared, so that other processes can map the same memory, instead of private.
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
    /// Kernel command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
}

/// One virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Raw image file or block device; its size is a multiple of 512 bytes.
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Serial number the guest sees, at most 20 bytes (virtio 1.2 §5.2.6.1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How requests reach the host.
    #[serde(default)]
    pub io: DiskIo,
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// The host's end.
    #[serde(default)]
    pub tap: TapSpec,
    /// The guest's MAC address; a locally administered one is made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// MTU told to the guest, 68 to 65535 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Address and prefix length to give the host's end, which is then brought up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<HostAddress>,
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
