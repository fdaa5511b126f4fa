//! Which frames tell of an address of the guest, and which do not.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::net::addresses::{ADDRESSES_MAX, Neighbor};

pub const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x2a];
pub const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

/// An Ethernet frame with the header that the tap wants.
fn ethernet(mac: [u8; 6], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN][..], &[0xff; 6], &mac, &ethertype.to_be_bytes(), packet].concat()
}

/// An ARP request of `address` for another.
pub fn arp(mac: [u8; 6], address: &str) -> Vec<u8> {
    arp_for(mac, address, Ipv4Addr::new(192, 0, 2, 1))
}

/// The same for `other`.
pub fn arp_for(mac: [u8; 6], address: &str, other: Ipv4Addr) -> Vec<u8> {
    let address: Ipv4Addr = address.parse().unwrap();
    let packet = [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &mac,
        &address.octets(),
        &[0; 6],
        &other.octets(),
    ];
    ethernet(mac, 0x0806, &packet.concat())
}

/// A packet of IPv6 with `hop_limit`, whose `body` is of protocol `next_header`.
fn ipv6(mac: [u8; 6], source: &str, hop_limit: u8, next_header: u8, body: &[u8]) -> Vec<u8> {
    let source: Ipv6Addr = source.parse().unwrap();
    let len = u16::try_from(body.len()).unwrap().to_be_bytes();
    let packet = [
        &[0x60, 0, 0, 0],
        &len[..],
        &[next_header, hop_limit],
        &source.octets(),
        &[0xff; 16],
        body,
    ];
    ethernet(mac, 0x86dd, &packet.concat())
}

/// A message of Neighbor Discovery of `kind` and with `flags`.
pub fn nd(mac: [u8; 6], source: &str, kind: u8, flags: u8, target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    let message = [
        &[kind, 0, 0x12, 0x34, flags, 0, 0, 0][..],
        &target.octets(),
        &[2, 1],
        &mac,
    ];
    ipv6(mac, source, 255, 58, &message.concat())
}

fn buffers(frame: &[u8]) -> GuestBuffers {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
    memory.write_slice(frame, GuestAddress(0)).unwrap();
    let mut buffers = GuestBuffers::new(Arc::new(memory));
    // In two pieces, in the middle of what is looked at.
    let first = frame.len().min(20);
    buffers.push(GuestAddress(0), first).unwrap();
    buffers.push(GuestAddress(first as u64), frame.len() - first).unwrap();
    buffers
}

fn after(frames: &[Vec<u8>]) -> Addresses {
    let mut seen = Addresses::default();
    for frame in frames {
        seen.sent(&buffers(frame));
    }
    seen
}

/// The addresses, those seen last first.
fn known(seen: &Addresses) -> Vec<String> {
    let ipv4 = seen.ipv4().iter().map(|neighbor| neighbor.address.to_string());
    let ipv6 = seen.ipv6().iter().map(|neighbor| neighbor.address.to_string());
    ipv4.chain(ipv6).collect()
}

#[test]
fn addresses_are_known_from_arp_and_neighbor_discovery() {
    let seen = after(&[
        arp(GUEST_MAC, "192.0.2.7"),
        nd(GUEST_MAC, "fe80::2a", 133, 0, "::"),
        nd(GUEST_MAC, "2001:db8::1", 135, 0, "2001:db8::ff"),
        nd(GUEST_MAC, "fe80::2a", 136, 0x60, "2001:db8::2"),
    ]);
    assert_eq!(known(&seen), ["192.0.2.7", "2001:db8::2", "2001:db8::1", "fe80::2a"]);
    assert_eq!(
        seen.ipv4(),
        [Neighbor {
            mac: GUEST_MAC,
            address: [192, 0, 2, 7].into()
        }]
    );
    assert!(seen.ipv6().iter().all(|neighbor| neighbor.mac == GUEST_MAC));
    assert!(!seen.router());
}

#[test]
fn a_guest_that_forwards_packets_is_known_as_a_router() {
    for frame in [
        nd(GUEST_MAC, "fe80::2a", 134, 0, "::"),
        nd(GUEST_MAC, "fe80::2a", 136, 0xe0, "fe80::2a"),
    ] {
        let seen = after(&[frame, nd(GUEST_MAC, "fe80::2a", 135, 0, "fe80::1")]);
        assert_eq!(known(&seen), ["fe80::2a"]);
        assert!(seen.router());
    }
}

#[test]
fn what_is_no_address_of_the_guest_is_not_taken_for_one() {
    let udp = ethernet(GUEST_MAC, 0x0800, &[0x45; 40]);
    let mut arp_of_another_network = arp(GUEST_MAC, "192.0.2.7");
    arp_of_another_network[HEADER_LEN + 14 + 1] = 6;
    for frame in [
        // Probing, whether by ARP or by a solicitation; nobody's; everybody's.
        arp(GUEST_MAC, "0.0.0.0"),
        nd(GUEST_MAC, "::", 135, 0, "2001:db8::1"),
        arp(GUEST_MAC, "127.0.0.1"),
        arp(GUEST_MAC, "255.255.255.255"),
        arp(GUEST_MAC, "224.0.0.1"),
        nd(GUEST_MAC, "fe80::2a", 136, 0, "ff02::1"),
        arp([0xff; 6], "192.0.2.7"),
        arp([0; 6], "192.0.2.7"),
        // Not about addresses.
        udp,
        arp_of_another_network,
        ipv6(GUEST_MAC, "2001:db8::1", 64, 6, &[0; 40]),
        ipv6(GUEST_MAC, "2001:db8::1", 255, 58, &[128, 0, 0, 0, 0, 0, 0, 0]),
        // Forwarded by a router.
        ipv6(GUEST_MAC, "2001:db8::1", 254, 58, &[135; 32]),
    ] {
        assert_eq!(known(&after(std::slice::from_ref(&frame))), [""; 0], "{frame:?}");
    }
}

#[test]
fn the_address_that_was_seen_longest_ago_makes_room() {
    let address = |number| format!("192.0.2.{number}");
    let mut frames: Vec<_> = (1..=ADDRESSES_MAX)
        .map(|number| arp(GUEST_MAC, &address(number)))
        .collect();
    frames.push(arp(GUEST_MAC, &address(1)));
    frames.push(arp(GUEST_MAC, "198.51.100.1"));
    let seen = after(&frames);
    let mut expected = vec!["198.51.100.1".to_owned(), address(1)];
    expected.extend((3..=ADDRESSES_MAX).rev().map(address));
    assert_eq!(known(&seen), expected);
}

#[test]
fn an_address_that_somebody_else_has_now_is_forgotten() {
    let mut seen = after(&[
        arp(GUEST_MAC, "192.0.2.7"),
        arp(GUEST_MAC, "192.0.2.8"),
        nd(GUEST_MAC, "fe80::2a", 136, 0, "2001:db8::1"),
        nd(GUEST_MAC, "fe80::2a", 136, 0, "2001:db8::2"),
    ]);
    for (frame, left) in [
        (arp(GUEST_MAC, "192.0.2.7"), 4),
        (arp(OTHER_MAC, "192.0.2.9"), 4),
        (arp(OTHER_MAC, "192.0.2.7"), 3),
        (nd(OTHER_MAC, "fe80::99", 136, 0x20, "2001:db8::1"), 2),
    ] {
        let mut space = frame.clone();
        let len = space.len();
        // What was in the buffers before does not count.
        space.resize(2000, 0xaa);
        seen.received(&buffers(&space), len);
        assert_eq!(known(&seen).len(), left, "{frame:?}");
    }
    assert_eq!(known(&seen), ["192.0.2.8", "2001:db8::2"]);
}

#[test]
fn a_frame_that_is_cut_short_tells_nothing() {
    for (frame, needed) in [
        (arp(GUEST_MAC, "192.0.2.7"), HEADER_LEN + 14 + 18),
        (nd(GUEST_MAC, "fe80::2a", 136, 0, "fe80::2a"), HEADER_LEN + 14 + 40 + 24),
    ] {
        for len in 0..frame.len() {
            let found = known(&after(&[frame[..len].to_vec()])).len();
            assert_eq!(found, usize::from(len >= needed), "{len} bytes of {frame:?}");
        }
    }
}

#[test]
fn what_was_saved_is_known_again_as_far_as_a_guest_can_have_it() {
    let seen = after(&[
        arp(GUEST_MAC, "192.0.2.7"),
        arp(GUEST_MAC, "192.0.2.8"),
        nd(GUEST_MAC, "fe80::2a", 134, 0, "::"),
    ]);
    assert_eq!(Addresses::from(&AddressesState::from(&seen)), seen);
    let neighbor = |number| Neighbor {
        mac: [number, 0, 0, 0, 0, 1],
        address: Ipv4Addr::from([192, 0, 2, number]),
    };
    let state = AddressesState {
        ipv4: (0..200).map(neighbor).collect(),
        ipv6: vec![Neighbor {
            mac: GUEST_MAC,
            address: Ipv6Addr::from([0xff; 16]),
        }],
        router: false,
    };
    let seen = Addresses::from(&state);
    assert_eq!(known(&seen), ["192.0.2.0", "192.0.2.2", "192.0.2.4", "192.0.2.6"]);
}

proptest! {
    #[test]
    fn whatever_a_guest_sends_or_gets_does_no_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        ethertype in prop::sample::select(vec![[0x08, 0x06], [0x86, 0xdd], [0x08, 0x00]]),
        len in 0_usize..300,
    ) {
        let mut frame = bytes;
        if frame.len() > HEADER_LEN + 14 {
            frame[HEADER_LEN + 12..HEADER_LEN + 14].copy_from_slice(&ethertype);
        }
        let buffers = buffers(&frame);
        let mut seen = Addresses::default();
        seen.sent(&buffers);
        seen.received(&buffers, len);
        prop_assert!(known(&seen).len() <= 1);
    }
}
