//! What the host's kernel is asked about its network interfaces: the `SIOC*` requests of netdevice(7).

use std::ffi::{c_char, c_int};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use cutover_snapshot::spec::HostAddress;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

/// Bytes of an interface's name without its final NUL.
pub const NAME_LEN_MAX: usize = libc::IFNAMSIZ - 1;

/// A request that names interface `name`, which was checked to be at most [`NAME_LEN_MAX`] bytes.
pub fn request_for(name: &str) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().take(NAME_LEN_MAX).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_mtu: 0 },
    }
}

/// The interface that `request` names.
pub fn name_in(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .take_while(|&&c| c != 0)
        .map(|&c: &c_char| c.cast_unsigned())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// An interface of this network namespace.
pub struct Interface {
    name: String,
    socket: OwnedFd,
}

impl Interface {
    /// The interface called `name`.
    pub fn new(name: &str) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self {
            name: name.to_owned(),
            socket,
        })
    }

    /// Whether there is such an interface.
    pub fn exists(&self) -> bool {
        let mut request = request_for(&self.name);
        // SAFETY: the kernel reads and writes no more than an `ifreq`.
        check(unsafe { ioctl_with_mut_ref(&self.socket, libc::SIOCGIFINDEX, &mut request) }).is_ok()
    }

    /// Gives it an address, and the network that goes with it.
    pub fn set_address(&self, address: HostAddress) -> io::Result<()> {
        let netmask = u32::MAX.checked_shl(32 - u32::from(address.prefix)).unwrap_or(0);
        self.set_socket_address(libc::SIOCSIFADDR, address.address)?;
        self.set_socket_address(libc::SIOCSIFNETMASK, Ipv4Addr::from_bits(netmask))
    }

    /// Sets the longest packet it takes, in bytes.
    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = request_for(&self.name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.set(libc::SIOCSIFMTU, &request)
    }

    /// Brings it up.
    pub fn bring_up(&self) -> io::Result<()> {
        let mut request = request_for(&self.name);
        // SAFETY: the kernel writes no more than an `ifreq`.
        check(unsafe { ioctl_with_mut_ref(&self.socket, libc::SIOCGIFFLAGS, &mut request) })?;
        let up = i16::try_from(libc::IFF_UP).map_err(io::Error::other)?;
        // SAFETY: the kernel just filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | up;
        self.set(libc::SIOCSIFFLAGS, &request)
    }

    fn set_socket_address(&self, code: libc::Ioctl, address: Ipv4Addr) -> io::Result<()> {
        let mut request = request_for(&self.name);
        let family = libc::sa_family_t::try_from(libc::AF_INET).map_err(io::Error::other)?;
        let mut sa_data = [0; 14];
        // A `sockaddr_in`: two bytes of port, then the address.
        for (to, from) in sa_data[2..6].iter_mut().zip(address.octets()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_addr = libc::sockaddr {
            sa_family: family,
            sa_data,
        };
        self.set(code, &request)
    }

    fn set(&self, code: libc::Ioctl, request: &libc::ifreq) -> io::Result<()> {
        // SAFETY: the kernel reads no more than an `ifreq`.
        check(unsafe { ioctl_with_ref(&self.socket, code, request) })
    }
}

/// The result of an ioctl as a `Result`.
pub fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
