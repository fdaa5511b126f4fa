//! [`Lan`]: one network for several monitors, so that a guest can go from one to the other and stay where it is.

use std::net::Ipv4Addr;

use crate::network::{Network, Tap, ip};

/// A bridge with the host's address, and taps on it.
pub struct Lan {
    network: Network,
    bridge: Tap,
    taps: Vec<Tap>,
}

impl Lan {
    /// A network of its own, without taps yet.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "each is a different one")]
    pub fn new() -> Self {
        let network = Network::new();
        let name = format!("{}b", network.tap());
        ip(&["link", "add", &name, "type", "bridge"]);
        let bridge = Tap::named(&name);
        ip(&["address", "add", &format!("{}/24", network.host()), "dev", &name]);
        ip(&["link", "set", &name, "up"]);
        Self {
            network,
            bridge,
            taps: Vec::new(),
        }
    }

    /// Adds a tap, and returns its name.
    #[track_caller]
    pub fn add_tap(&mut self) -> String {
        let name = format!("{}{}", self.network.tap(), self.taps.len());
        ip(&["tuntap", "add", "dev", &name, "mode", "tap", "vnet_hdr"]);
        self.taps.push(Tap::named(&name));
        ip(&["link", "set", &name, "master", self.bridge.name(), "up"]);
        name
    }

    /// The name of the bridge.
    pub(crate) fn bridge(&self) -> &str {
        self.bridge.name()
    }

    /// The host's address.
    pub fn host(&self) -> Ipv4Addr {
        self.network.host()
    }

    /// The guest's address.
    pub fn guest(&self) -> Ipv4Addr {
        self.network.guest()
    }

    /// The shell command that gives the `micro` guest its address on its first interface.
    pub fn guest_setup(&self) -> String {
        self.network.guest_setup()
    }

    /// The address of one of several guests.
    #[track_caller]
    pub fn member(&self, number: u8) -> Ipv4Addr {
        self.network.member(number)
    }
}
