//! Networks between the host and one guest each, which do not get in each other's way.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU8, Ordering};

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

    /// The shell command that gives the `micro` guest its address on its first interface.
    pub fn guest_setup(&self) -> String {
        format!("ip address add {}/24 dev eth0 && ip link set eth0 up", self.guest())
    }

    /// The argument of `--net`.
    pub fn argument(&self) -> String {
        format!("tap={},host-ip={}/24", self.tap, self.host())
    }
}
