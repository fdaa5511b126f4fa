//! Real tap devices, each test in a network namespace of its own, so that it meets nobody and leaves nothing.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use cutover_snapshot::spec::TapSpec;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::interface::Interface;
use super::*;
use crate::virtio::testing::{DATA, Guest, Piece};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x2a];
const RX: usize = 0;
const TX: usize = 1;

/// Runs `test` on a thread with an empty network namespace.
fn in_network_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: only the thread's own view of the network changes.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("needs CAP_SYS_ADMIN");
        test();
    });
    thread.join().unwrap();
}

fn spec(tap: TapSpec) -> NetSpec {
    NetSpec {
        tap,
        mac: Some(MacAddr(GUEST_MAC)),
        mtu: None,
        host_ip: None,
    }
}

fn named(name: &str) -> NetSpec {
    spec(TapSpec::Name(name.to_owned()))
}

fn refusal(spec: &NetSpec) -> String {
    Net::open(spec).map(drop).unwrap_err().to_string()
}

/// An ARP request of the guest for the host's address, behind an empty header.
fn arp_request() -> Vec<u8> {
    let ethernet = [&[0xff; 6][..], &GUEST_MAC, &[8, 6]].concat();
    let arp = [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &GUEST_MAC,
        &GUEST.octets(),
        &[0; 6],
        &HOST.octets(),
    ]
    .concat();
    [&[0; HEADER_LEN][..], &ethernet, &arp].concat()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN and CAP_SYS_ADMIN"]
fn a_created_tap_device_carries_frames_between_guest_and_host() {
    in_network_namespace(|| {
        let host_ip = format!("{HOST}/24").parse().ok();
        let net = Net::open(&NetSpec {
            host_ip,
            mtu: Some(1400),
            ..spec(TapSpec::Create)
        })
        .unwrap();
        assert!(Interface::new("cutover0").unwrap().exists());
        let offloads = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
        assert_eq!(net.features() & offloads, offloads);
        let mut guest = Guest::started(net, offloads | 1 << VIRTIO_NET_F_MRG_RXBUF);
        for index in 0..8 {
            guest.offer(RX, &[Piece::In(DATA + 0x1_0000 * index, 0x1_0000)]);
        }
        guest.kick(RX);
        let request = arp_request();
        guest.write(DATA + 0x20_0000, &request);
        guest.request(
            TX,
            &[Piece::Out(DATA + 0x20_0000, u32::try_from(request.len()).unwrap())],
        );
        // The host answers, and may have things of its own to say before.
        let answer = loop {
            let (head, len) = guest.take_used(RX);
            let frame = guest.read(DATA + 0x1_0000 * u64::from(head), usize::try_from(len).unwrap());
            if frame[HEADER_LEN + 12..][..2] == [8, 6] {
                break frame;
            }
        };
        assert_eq!(answer[HEADER_LEN..][..6], GUEST_MAC);
        assert_eq!(answer[HEADER_LEN + 14..][6..8], [0, 2]);
        assert_eq!(answer[HEADER_LEN + 14..][14..18], HOST.octets());
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.send_to(&[0x5a; 1000], (GUEST, 9)).unwrap();
        let datagram = loop {
            let (head, len) = guest.take_used(RX);
            let frame = guest.read(DATA + 0x1_0000 * u64::from(head), usize::try_from(len).unwrap());
            if frame[HEADER_LEN + 12..][..2] == [8, 0] {
                break frame;
            }
        };
        assert_eq!(datagram[0], 1, "the checksum is left to the guest, which accepted that");
        assert_eq!(datagram[HEADER_LEN + 14 + 20 + 8..], [0x5a; 1000]);
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN and CAP_SYS_ADMIN"]
fn a_named_tap_device_is_created_and_has_one_user() {
    in_network_namespace(|| {
        let net = Net::open(&named("cut-a")).unwrap();
        assert!(Interface::new("cut-a").unwrap().exists());
        assert_eq!(
            refusal(&named("cut-a")),
            "tap device 'cut-a' is busy: another process has it open"
        );
        drop(net);
        Net::open(&named("cut-a")).unwrap();
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN and CAP_SYS_ADMIN"]
fn an_interface_that_is_no_tap_device_is_refused() {
    in_network_namespace(|| {
        assert!(refusal(&named("lo")).starts_with("network interface 'lo' is not a tap device"));
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN and CAP_SYS_ADMIN"]
fn an_inherited_tap_device_is_used_and_stays_open_for_its_owner() {
    in_network_namespace(|| {
        let owner = Tap::open(&named("cut-b")).unwrap();
        let net = Net::open(&spec(TapSpec::Fd(owner.as_raw_fd()))).unwrap();
        assert!(has_feature(net.features(), VIRTIO_NET_F_GUEST_TSO4));
        drop(net);
        assert!(Interface::new("cut-b").unwrap().exists());
        drop(owner);
        assert!(!Interface::new("cut-b").unwrap().exists());
    });
}
