//! The addresses a guest uses on its LAN, as far as its neighbours can know them.
//!
//! What neighbours keep in their caches they have from ARP (RFC 826) and Neighbor Discovery (RFC 4861), so only such
//! frames are looked at:
//!
//! ```text
//!  guest ──► sender of an ARP packet, source of a solicitation, target of an advertisement ──► it is the guest's
//!  guest ◄── the same, of somebody else                                                    ──► no longer
//! ```
//! An address that the guest merely probes for (RFC 5227, RFC 4862 §5.4) is not its own yet, and what it forwards never
//! is. All other frames cost a look at their first bytes. Frames with VLAN tags are among those others.

use std::net::{Ipv4Addr, Ipv6Addr};

use cutover_snapshot::error::SectionError;
use cutover_snapshot::section::{Payload, Section};
use serde::{Deserialize, Serialize};

use super::HEADER_LEN;
use crate::virtio::buffers::GuestBuffers;

/// Most addresses of each family that are known; that which was seen longest ago makes room for another.
pub const ADDRESSES_MAX: usize = 8;

/// `ETHERTYPE_ARP` and `ETHERTYPE_IPV6` of the IEEE's registry.
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// `ICMPv6` among the protocols of IP.
pub const ICMPV6: u8 = 58;
/// Types of ICMPv6 (RFC 4861 §4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
/// What Neighbor Discovery is sent with: a packet that was forwarded has less.
pub const HOP_LIMIT: u8 = 255;
/// The flag of an advertisement whose sender forwards packets.
pub const IS_ROUTER: u8 = 0x80;
/// Ethernet, IPv4, and how long their addresses are, at the beginning of an ARP packet.
pub const ARP_OF_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// Bytes of Ethernet's and of IPv6's header.
const ETHERNET: usize = 14;
const IPV6: usize = 40;
/// As much of a frame as tells whether the rest matters: up to the protocol of an IPv6 packet.
const FIRST_LOOK: usize = HEADER_LEN + ETHERNET + 7;
/// As much of a frame as matters: up to the target of a neighbor advertisement.
const WHOLE_LOOK: usize = HEADER_LEN + ETHERNET + IPV6 + 24;

/// An address, and that of the interface it is reached through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbor<A> {
    /// Of Ethernet.
    pub mac: [u8; 6],
    /// Of IP.
    pub address: A,
}

/// What is known of a guest's addresses behind one interface, those seen last first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    ipv4: Vec<Neighbor<Ipv4Addr>>,
    ipv6: Vec<Neighbor<Ipv6Addr>>,
    /// Whether the guest is a router to its neighbours.
    router: bool,
}

/// [`Addresses`] as they are saved. Not to be trusted when they are read back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressesState {
    pub(super) ipv4: Vec<Neighbor<Ipv4Addr>>,
    pub(super) ipv6: Vec<Neighbor<Ipv6Addr>>,
    pub(super) router: bool,
}

impl Section for AddressesState {
    const VERSION: u16 = 1;

    fn read(payload: &Payload<'_>) -> Result<Self, SectionError> {
        match payload.version {
            1 => payload.decode(),
            _ => Err(payload.unknown_version::<Self>()),
        }
    }
}

impl From<&Addresses> for AddressesState {
    fn from(known: &Addresses) -> Self {
        Self {
            ipv4: known.ipv4.clone(),
            ipv6: known.ipv6.clone(),
            router: known.router,
        }
    }
}

impl From<&AddressesState> for Addresses {
    /// Keeps what a guest can have been seen to use.
    fn from(state: &AddressesState) -> Self {
        let mut known = Self {
            router: state.router,
            ..Self::default()
        };
        // The last that is noted becomes the first.
        for neighbor in state.ipv4.iter().take(ADDRESSES_MAX).rev() {
            known.note(Claim::Ipv4(*neighbor));
        }
        for neighbor in state.ipv6.iter().take(ADDRESSES_MAX).rev() {
            known.note(Claim::Ipv6(*neighbor));
        }
        known
    }
}

impl Addresses {
    /// Of IPv4.
    pub fn ipv4(&self) -> &[Neighbor<Ipv4Addr>] {
        &self.ipv4
    }

    /// Of IPv6.
    pub fn ipv6(&self) -> &[Neighbor<Ipv6Addr>] {
        &self.ipv6
    }

    /// Whether the guest is a router to its neighbours.
    pub fn router(&self) -> bool {
        self.router
    }

    /// Looks at a frame that the guest has sent, with its header.
    pub fn sent(&mut self, frame: &GuestBuffers) {
        if let Some(claim) = look_at(frame, frame.len()) {
            self.note(claim);
        }
    }

    /// Looks at a frame that the guest is to receive: the first `len` bytes of `space`, with its header.
    pub fn received(&mut self, space: &GuestBuffers, len: usize) {
        match look_at(space, len) {
            Some(Claim::Ipv4(other)) => self.ipv4.retain(|own| !takes(&other, own)),
            Some(Claim::Ipv6(other) | Claim::Router(other)) => self.ipv6.retain(|own| !takes(&other, own)),
            None => {}
        }
    }

    fn note(&mut self, claim: Claim) {
        match claim {
            Claim::Ipv4(neighbor) if is_usable_ipv4(neighbor.address) => note(&mut self.ipv4, neighbor),
            Claim::Ipv6(neighbor) if is_usable_ipv6(neighbor.address) => note(&mut self.ipv6, neighbor),
            Claim::Router(neighbor) if is_usable_ipv6(neighbor.address) => {
                note(&mut self.ipv6, neighbor);
                self.router = true;
            }
            _ => {}
        }
    }
}

/// What a frame says of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    Ipv4(Neighbor<Ipv4Addr>),
    Ipv6(Neighbor<Ipv6Addr>),
    /// The same, of one that forwards packets.
    Router(Neighbor<Ipv6Addr>),
}

/// Puts `neighbor` in front.
fn note<A: Copy + PartialEq>(known: &mut Vec<Neighbor<A>>, neighbor: Neighbor<A>) {
    if !is_unicast(neighbor.mac) {
        return;
    }
    match known.iter().position(|known| known.address == neighbor.address) {
        Some(place) => known[..=place].rotate_right(1),
        None => {
            known.truncate(ADDRESSES_MAX - 1);
            known.insert(0, neighbor);
        }
    }
    known[0] = neighbor;
}

/// Whether `other` says that it has the address of `own`.
fn takes<A: PartialEq>(other: &Neighbor<A>, own: &Neighbor<A>) -> bool {
    other.address == own.address && other.mac != own.mac
}

fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

fn is_usable_ipv4(address: Ipv4Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || address.is_broadcast())
}

fn is_usable_ipv6(address: Ipv6Addr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

/// What the first `len` bytes of `frame` say of who sent them. That all of it is there has been seen to: it came from
/// guest memory, or went there.
fn look_at(frame: &GuestBuffers, len: usize) -> Option<Claim> {
    let mut bytes = [0; WHOLE_LOOK];
    let first = copy(frame, len, &mut bytes[..FIRST_LOOK])?;
    let (ethernet, packet) = first.split_first_chunk::<ETHERNET>()?;
    match ethertype(ethernet) {
        ETHERTYPE_ARP => arp(copy(frame, len, &mut bytes)?.get(ETHERNET..)?),
        ETHERTYPE_IPV6 if packet.get(6) == Some(&ICMPV6) => {
            let (ethernet, packet) = copy(frame, len, &mut bytes)?.split_first_chunk()?;
            neighbor_discovery(ethernet, packet)
        }
        _ => None,
    }
}

/// Copies as much of the first `len` bytes of `frame` as fits; returns what follows the header that the tap wants.
fn copy<'a>(frame: &GuestBuffers, len: usize, to: &'a mut [u8]) -> Option<&'a [u8]> {
    let wanted = len.min(to.len());
    let copied = frame.copy_to(&mut to[..wanted]).ok()?;
    to.get(HEADER_LEN..copied)
}

fn ethertype(ethernet: &[u8; ETHERNET]) -> u16 {
    u16::from_be_bytes([ethernet[12], ethernet[13]])
}

/// The sender of an ARP packet, be it a request or an answer.
fn arp(packet: &[u8]) -> Option<Claim> {
    if !packet.starts_with(&ARP_OF_IPV4) {
        return None;
    }
    let (mac, rest) = packet.get(8..)?.split_first_chunk()?;
    let address: [u8; 4] = *rest.first_chunk()?;
    Some(Claim::Ipv4(Neighbor {
        mac: *mac,
        address: address.into(),
    }))
}

/// Who sent a packet of Neighbor Discovery, if it is one.
fn neighbor_discovery(ethernet: &[u8; ETHERNET], packet: &[u8]) -> Option<Claim> {
    let (_, source_mac) = ethernet[..12].split_last_chunk::<6>()?;
    let (ip, message) = packet.split_first_chunk::<IPV6>()?;
    if ip[0] >> 4 != 6 || ip[7] != HOP_LIMIT {
        return None;
    }
    let at = |address: &[u8; 16]| Neighbor {
        mac: *source_mac,
        address: Ipv6Addr::from(*address),
    };
    let source = at(ip[8..].first_chunk()?);
    match message {
        [ROUTER_SOLICITATION | NEIGHBOR_SOLICITATION, 0, ..] => Some(Claim::Ipv6(source)),
        [ROUTER_ADVERTISEMENT, 0, ..] => Some(Claim::Router(source)),
        [NEIGHBOR_ADVERTISEMENT, 0, _, _, flags, ..] => {
            let target = at(message.get(8..)?.first_chunk()?);
            Some(if flags & IS_ROUTER == 0 {
                Claim::Ipv6(target)
            } else {
                Claim::Router(target)
            })
        }
        _ => None,
    }
}
