//! Networks between the host and one guest each, which do not get in each other's way.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `struct ifreq` as TUNSETIFF uses it (Linux Documentation/networking/tuntap.rst).
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_SIZE],
    flags: u16,
    _rest: [u8; 22],
}

const NAME_SIZE: usize = 16;
const TUNSETIFF: Opcode = opcode::write::<std::ffi::c_int>(b'T', 202);
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Networks handed out in this process so far.
static COUNT: AtomicU8 = AtomicU8::new(0);

/// A tap device, which `cutover` creates, with a subnet of 198.18.0.0/15: addresses set aside for tests (RFC 2544).
#[derive(Debug)]
pub struct Network {
    tap: String,
    subnet: u8,
}

impl Network {
    /// A network of its own.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "each is a different one")]
    pub fn new() -> Self {
        let subnet = COUNT.fetch_add(1, Ordering::Relaxed);
        assert!(subnet < u8::MAX, "one test process has at most 255 networks");
        // Unique on the machine, and within the 15 bytes an interface name may have.
        let tap = format!("ct{}n{subnet}", std::process::id());
        Self { tap, subnet }
    }

    /// Name of the tap device.
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// The host's address.
    pub fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.subnet, 1)
    }

    /// The guest's address, which the guest has to be told.
    pub fn guest(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.subnet, 2)
    }

    /// Addresses of several guests.
    ///
    /// # Panics
    /// There are not so many.
    #[track_caller]
    pub fn member(&self, number: u8) -> Ipv4Addr {
        assert!(number < 200, "the subnet has no room for guest {number}");
        Ipv4Addr::new(198, 18, self.subnet, 10 + number)
    }

    /// The shell command that gives the `micro` guest its address on its first interface.
    pub fn guest_setup(&self) -> String {
        format!("ip address add {}/24 dev eth0 && ip link set eth0 up", self.guest())
    }

    /// Makes the tap device, open, for a monitor to inherit under the descriptor's number. It is gone when the last
    /// holder closes it.
    #[track_caller]
    pub fn open_tap(&self) -> OwnedFd {
        let tun = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap_or_else(|error| panic!("/dev/net/tun: {error}"));
        let mut request = InterfaceRequest {
            name: [0; NAME_SIZE],
            flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
            _rest: [0; 22],
        };
        request.name[..self.tap.len()].copy_from_slice(self.tap.as_bytes());
        // SAFETY: TUNSETIFF takes a pointer to a `struct ifreq`, which `InterfaceRequest` is, and the kernel writes back
        // no more than that.
        let made = unsafe { ioctl(&tun, Updater::<TUNSETIFF, _>::new(&mut request)) };
        made.unwrap_or_else(|error| panic!("cannot make {}: {error}", self.tap));
        fcntl_setfd(&tun, FdFlags::empty()).expect("an open descriptor has flags");
        tun.into()
    }

    /// Makes the tap device, with the host's address, for a monitor that takes it by its name.
    #[track_caller]
    pub fn make_tap(&self) -> Tap {
        ip(&["tuntap", "add", "dev", &self.tap, "mode", "tap", "vnet_hdr"]);
        let tap = Tap::named(&self.tap);
        ip(&["address", "add", &format!("{}/24", self.host()), "dev", &self.tap]);
        ip(&["link", "set", &self.tap, "up"]);
        tap
    }

    /// The argument of `--net`.
    pub fn argument(&self) -> String {
        format!("tap={},host-ip={}/24", self.tap, self.host())
    }
}

/// A tap device, or a bridge, that lasts until it is dropped.
#[derive(Debug)]
pub struct Tap(String);

impl Tap {
    pub(crate) fn named(name: &str) -> Self {
        Self(name.to_owned())
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // A device that cannot be removed goes with the machine at the latest.
        let _ = Command::new("ip").args(["link", "delete", &self.0]).output();
    }
}

#[track_caller]
pub(crate) fn ip(arguments: &[&str]) {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run ip (package iproute2): {error}"));
    assert!(
        output.status.success(),
        "'ip {}' failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}
