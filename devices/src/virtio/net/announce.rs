//! Telling the LAN that a guest is now behind this host: what live migration ends with.
//!
//! The guest keeps its addresses, and knows nothing of the move; so the monitor speaks for it, to everybody:
//!
//! ```text
//!  RARP request (RFC 903)                  one for each MAC    switches learn the port it is behind now
//!  ARP announcement (RFC 5227 §3)          one for each IPv4   neighbours, and fabrics that answer ARP themselves
//!  neighbor advertisement, unsolicited     one for each IPv6   the same
//!   (RFC 4861 §7.2.6)
//! ```
//! Nobody acknowledges any of this, so it is said several times, by a timer on the event loop. A frame for which the tap
//! has no room is not sent, nor one that the gate blocks: the next time it is said again.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use event_manager::EventOps;

use super::addresses::{
    ARP_OF_IPV4, Addresses, ETHERTYPE_ARP, ETHERTYPE_IPV6, HOP_LIMIT, ICMPV6, IS_ROUTER, NEIGHBOR_ADVERTISEMENT,
    Neighbor,
};
use super::gate::Gate;
use super::{DeviceError, HEADER_LEN};
use crate::timer::Timer;

/// What passes before each announcement; the first is made at once.
const PAUSES: [Duration; 5] = [
    Duration::from_nanos(1),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(100),
    Duration::from_millis(100),
];

/// To everybody on the LAN, and to all of them that speak IPv6.
const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ETHERTYPE_RARP: u16 = 0x8035;
/// Operations of ARP and RARP.
const REQUEST: u16 = 1;
const REVERSE_REQUEST: u16 = 3;

/// The flag of an advertisement that replaces what is cached.
const OVERRIDE: u8 = 0x20;
/// The option of an advertisement that has the link-layer address, and its length in units of 8 bytes.
const TARGET_LINK_LAYER_ADDRESS: [u8; 2] = [2, 1];

/// Least bytes of a frame, without its checksum (IEEE 802.3).
const FRAME_LEN_MIN: usize = 60;

/// When to announce.
pub struct Announcer {
    /// Made before the thread that sets it is confined.
    timer: Timer,
    /// Pauses that are still to come.
    left: &'static [Duration],
    /// What is said: all of it was known when it began, so that nothing is told of what a protected guest did since.
    frames: Vec<Vec<u8>>,
}

impl Announcer {
    /// One that has nothing to announce.
    ///
    /// # Errors
    /// No timer can be had.
    pub fn new() -> Result<Self, DeviceError> {
        Ok(Self {
            timer: Timer::new("announcements")?,
            left: &[],
            frames: Vec::new(),
        })
    }

    /// Begins to say `frames`, or begins anew.
    pub fn begin(&mut self, frames: Vec<Vec<u8>>) {
        self.frames = frames;
        self.left = &PAUSES;
        self.set_timer();
    }

    /// The timer rang: they are sent through `gate`, and it is set for the next time.
    pub fn rang(&mut self, gate: &mut Gate) {
        for frame in &self.frames {
            if let Err(error) = gate.pass_own(frame) {
                tracing::debug!(%error, "announcement not sent");
            }
        }
        self.set_timer();
    }

    /// Has the event loop report the timer with `data`.
    pub fn watch(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        self.timer.watch(ops, data)
    }

    /// Has the event loop report the timer no more.
    pub fn ignore(&self, ops: &mut EventOps) {
        self.timer.ignore(ops);
    }

    /// Whether all has been announced.
    #[cfg(test)]
    pub fn is_done(&self) -> bool {
        self.left.is_empty()
    }

    fn set_timer(&mut self) {
        let set = match self.left {
            [pause, rest @ ..] => {
                self.left = rest;
                self.timer.set(*pause)
            }
            [] => self.timer.clear(),
        };
        if let Err(error) = set {
            tracing::error!(%error, "cannot set the timer of announcements; there are no more");
        }
    }
}

/// What announces a guest with an interface `mac`, and the addresses it was `seen` to use; with the tap's headers.
pub fn frames(mac: [u8; 6], seen: &Addresses) -> Vec<Vec<u8>> {
    let mut macs = vec![mac];
    let behind = seen.ipv4().iter().map(|neighbor| neighbor.mac);
    for other in behind.chain(seen.ipv6().iter().map(|neighbor| neighbor.mac)) {
        if !macs.contains(&other) {
            macs.push(other);
        }
    }
    let rarps = macs.into_iter().map(reverse_request);
    let arps = seen.ipv4().iter().map(arp_announcement);
    let router = seen.router();
    let advertisements = seen.ipv6().iter().map(|neighbor| advertisement(neighbor, router));
    rarps.chain(arps).chain(advertisements).collect()
}

/// "Which IPv4 address have I?", which nobody answers; but every switch on the way sees the source.
fn reverse_request(mac: [u8; 6]) -> Vec<u8> {
    let unknown = Ipv4Addr::UNSPECIFIED;
    frame(
        BROADCAST,
        mac,
        ETHERTYPE_RARP,
        &arp(REVERSE_REQUEST, mac, unknown, mac, unknown),
    )
}

/// A request for one's own address.
fn arp_announcement(&Neighbor { mac, address }: &Neighbor<Ipv4Addr>) -> Vec<u8> {
    frame(
        BROADCAST,
        mac,
        ETHERTYPE_ARP,
        &arp(REQUEST, mac, address, [0; 6], address),
    )
}

fn arp(operation: u16, mac: [u8; 6], address: Ipv4Addr, target_mac: [u8; 6], target: Ipv4Addr) -> Vec<u8> {
    [
        &ARP_OF_IPV4[..],
        &operation.to_be_bytes(),
        &mac,
        &address.octets(),
        &target_mac,
        &target.octets(),
    ]
    .concat()
}

fn advertisement(&Neighbor { mac, address }: &Neighbor<Ipv6Addr>, router: bool) -> Vec<u8> {
    let flags = OVERRIDE | if router { IS_ROUTER } else { 0 };
    let before_checksum = [NEIGHBOR_ADVERTISEMENT, 0];
    let after = [
        &[flags, 0, 0, 0],
        &address.octets()[..],
        &TARGET_LINK_LAYER_ADDRESS,
        &mac,
    ]
    .concat();
    let len = u16::try_from(before_checksum.len() + 2 + after.len()).expect("32 bytes");
    // What the checksum is over (RFC 8200 §8.1), with zeroes where it will be.
    let summed = [
        &address.octets()[..],
        &ALL_NODES.octets(),
        &u32::from(len).to_be_bytes(),
        &[0, 0, 0, ICMPV6],
        &before_checksum,
        &[0, 0],
        &after,
    ];
    let checksum = checksum(&summed.concat());
    let ip = [
        &[0x60, 0, 0, 0],
        &len.to_be_bytes()[..],
        &[ICMPV6, HOP_LIMIT],
        &address.octets(),
        &ALL_NODES.octets(),
    ];
    let packet = [&ip.concat()[..], &before_checksum, &checksum.to_be_bytes(), &after];
    frame(ALL_NODES_MAC, mac, ETHERTYPE_IPV6, &packet.concat())
}

/// The Internet checksum (RFC 1071) of `bytes`, which are an even number.
fn checksum(bytes: &[u8]) -> u16 {
    let (words, _) = bytes.as_chunks();
    let sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    // Twice: the first fold can carry once more.
    let folded = [(); 2].iter().fold(sum, |sum, ()| (sum & 0xffff) + (sum >> 16));
    !u16::try_from(folded).expect("folded into 16 bits")
}

fn frame(to: [u8; 6], from: [u8; 6], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = [&[0; HEADER_LEN][..], &to, &from, &ethertype.to_be_bytes(), packet].concat();
    frame.resize(frame.len().max(HEADER_LEN + FRAME_LEN_MIN), 0);
    frame
}
