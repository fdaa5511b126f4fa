//! Frames of a fake driver, with a packet socket pair in place of a tap device: it keeps message boundaries too.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use cutover_snapshot::spec::TapSpec;
use rustix::io::{read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::virtio::hostile_rings::survives_hostile_rings;
use crate::virtio::testing::{DATA, Guest, HIGH_START, Piece, QUEUE_SIZE, tight_limits, wait_readable};

mod addresses;
mod announce;
mod dirty_pages;
mod gate;
mod limits;
mod mmds;

const RX: usize = 0;
const TX: usize = 1;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const TX_DATA: u64 = DATA + 0x10_0000;
const RX_DATA: u64 = DATA + 0x20_0000;

fn spec() -> NetSpec {
    NetSpec::default()
}

/// A network device and the other end of its cable.
fn device() -> (Net, OwnedFd) {
    device_of(&spec())
}

fn device_of(spec: &NetSpec) -> (Net, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Net::over(Tap::over_socket(ours), spec).unwrap(), theirs)
}

fn guest(features: u64) -> (Guest, OwnedFd) {
    let (net, cable) = device();
    (Guest::started(net, features), cable)
}

/// A header and `len` bytes that differ from frame to frame.
fn frame(number: u8, len: usize) -> Vec<u8> {
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let body = (0..len).map(|byte| number.wrapping_add(byte.to_le_bytes()[0]));
    header.into_iter().chain(body).collect()
}

fn offer_frame(guest: &mut Guest, at: u64, frame: &[u8]) -> u16 {
    guest.write(at, frame);
    guest.offer(TX, &[Piece::Out(at, u32::try_from(frame.len()).unwrap())])
}

fn receive(cable: &OwnedFd) -> Vec<u8> {
    wait_readable(cable.as_fd());
    let mut data = vec![0; 0x2_0000];
    let len = read(cable, &mut data).unwrap();
    data.truncate(len);
    data
}

/// `frame` as the guest sees it: with the number of buffers it takes.
fn in_buffers(frame: &[u8], count: u8) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[10] = count;
    frame
}

#[test]
fn frames_leave_whole_and_in_order() {
    let (mut guest, cable) = guest(0);
    let frames = [frame(1, 60), frame(2, 1514), frame(3, 14)];
    let heads: Vec<_> = (0..)
        .zip(&frames)
        .map(|(index, frame)| offer_frame(&mut guest, TX_DATA + 0x1000 * index, frame))
        .collect();
    guest.kick(TX);
    for (head, frame) in heads.into_iter().zip(&frames) {
        assert_eq!(receive(&cable), *frame);
        assert_eq!(guest.take_used(TX), (head, 0));
    }
}

#[test]
fn a_frame_is_gathered_from_all_its_descriptors() {
    let (mut guest, cable) = guest(0);
    let frame = frame(9, 300);
    guest.write(TX_DATA, &frame[..5]);
    guest.write(HIGH_START, &frame[5..200]);
    guest.write(TX_DATA + 0x5000, &frame[200..]);
    guest.request(
        TX,
        &[
            Piece::Out(TX_DATA, 5),
            Piece::Out(HIGH_START, 195),
            Piece::Out(TX_DATA + 0x5000, 112),
        ],
    );
    assert_eq!(receive(&cable), frame);
}

#[test]
fn what_makes_no_frame_is_dropped_and_the_next_frame_leaves() {
    let (mut guest, cable) = guest(0);
    assert_eq!(guest.request(TX, &[Piece::Out(TX_DATA, 11)]), 0);
    assert_eq!(guest.request(TX, &[Piece::Out(TX_DATA, 0x2_0000)]), 0);
    assert_eq!(guest.request(TX, &[Piece::In(TX_DATA, 100)]), 0);
    let frame = frame(4, 60);
    offer_frame(&mut guest, TX_DATA, &frame);
    guest.kick(TX);
    assert_eq!(receive(&cable), frame);
}

#[test]
fn frames_wait_for_room_on_the_cable_and_none_is_lost() {
    let (mut guest, cable) = guest(0);
    let mut sent = 0_u8;
    // Enough to fill the socket several times over.
    for _ in 0..8 {
        for index in 0..u64::from(QUEUE_SIZE) {
            offer_frame(&mut guest, TX_DATA + 0x1_0000 * index, &frame(sent, 32_000));
            sent += 1;
        }
        guest.kick(TX);
        for number in sent - u8::try_from(QUEUE_SIZE).unwrap()..sent {
            assert_eq!(receive(&cable), frame(number, 32_000));
            guest.take_used(TX);
        }
    }
}

#[test]
fn a_frame_held_back_while_the_device_stops_leaves_once() {
    let (mut guest, cable) = guest(0);
    for index in 0..QUEUE_SIZE {
        let number = u8::try_from(index).unwrap();
        offer_frame(
            &mut guest,
            TX_DATA + 0x1_0000 * u64::from(index),
            &frame(number, 32_000),
        );
    }
    guest.kick(TX);
    guest.transport.pause();
    assert_eq!(receive(&cable), frame(0, 32_000));
    guest.transport.resume();
    for number in 1..u8::try_from(QUEUE_SIZE).unwrap() {
        assert_eq!(receive(&cable), frame(number, 32_000));
    }
    for head in 0..QUEUE_SIZE {
        assert_eq!(guest.take_used(TX), (head, 0));
    }
}

#[test]
fn a_frame_fills_a_mergeable_buffer_and_the_others_stay_posted() {
    let (mut guest, cable) = guest(MERGEABLE);
    for index in 0..3 {
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * index, 0x8000)]);
    }
    guest.kick(RX);
    guest.clean();
    for (index, number) in [(0, 1), (1, 2)] {
        write(&cable, &frame(number, 100)).unwrap();
        assert_eq!(guest.take_used(RX), (index, 112));
        let at = RX_DATA + 0x1_0000 * u64::from(index);
        assert_eq!(guest.read(at, 112), in_buffers(&frame(number, 100), 1));
        assert!(guest.is_dirty(at) && !guest.is_dirty(at + 0x1000));
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * u64::from(index + 3), 0x8000)]);
        guest.kick(RX);
    }
}

#[test]
fn a_long_frame_is_spread_over_mergeable_buffers_and_says_over_how_many() {
    let (mut guest, cable) = guest(MERGEABLE);
    for index in 0..u64::from(QUEUE_SIZE) {
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * index, 1000)]);
    }
    guest.kick(RX);
    let frame = frame(7, 2500 - HEADER_LEN);
    write(&cable, &frame).unwrap();
    assert_eq!(
        [guest.take_used(RX), guest.take_used(RX), guest.take_used(RX)],
        [(0, 1000), (1, 1000), (2, 500)]
    );
    let parts = [(0, 1000), (1, 1000), (2, 500)].map(|(index, len)| guest.read(RX_DATA + 0x1_0000 * index, len));
    assert_eq!(parts.concat(), in_buffers(&frame, 3));
    assert_eq!(guest.try_take_used(RX), None);
}

#[test]
fn without_mergeable_buffers_a_frame_fills_one_chain() {
    let (mut guest, cable) = guest(0);
    for index in 0..2 {
        let at = RX_DATA + 0x1_0000 * index;
        guest.offer(RX, &[Piece::In(at, 12), Piece::In(at + 0x1000, 2000)]);
    }
    guest.kick(RX);
    for (index, len) in [(0, 600), (1, 700)] {
        let frame = frame(index, len);
        write(&cable, &frame).unwrap();
        assert_eq!(
            guest.take_used(RX),
            (u16::from(index) * 2, u32::try_from(len + HEADER_LEN).unwrap())
        );
        let at = RX_DATA + 0x1_0000 * u64::from(index);
        assert_eq!(
            [guest.read(at, 12), guest.read(at + 0x1000, len)].concat(),
            in_buffers(&frame, 1)
        );
    }
}

#[test]
fn a_frame_waits_until_the_guest_posts_buffers() {
    for features in [0, MERGEABLE] {
        let (mut guest, cable) = guest(features);
        write(&cable, &frame(5, 200)).unwrap();
        guest.transport.pause();
        guest.transport.resume();
        assert_eq!(guest.try_take_used(RX), None);
        let head = guest.offer(RX, &[Piece::In(RX_DATA, 0x1_8000)]);
        guest.kick(RX);
        assert_eq!(guest.take_used(RX), (head, 212));
        assert_eq!(guest.read(RX_DATA, 212), in_buffers(&frame(5, 200), 1));
    }
}

#[test]
fn posted_buffers_survive_a_pause() {
    let (mut guest, cable) = guest(MERGEABLE);
    for index in 0..4 {
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * index, 0x8000)]);
    }
    guest.kick(RX);
    write(&cable, &frame(1, 100)).unwrap();
    assert_eq!(guest.take_used(RX), (0, 112));
    for head in 1..3 {
        guest.transport.pause();
        write(&cable, &frame(2, 100)).unwrap();
        assert_eq!(guest.try_take_used(RX), None);
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * u64::from(head + 3), 0x8000)]);
        guest.transport.resume();
        assert_eq!(guest.take_used(RX), (head, 112));
        assert_eq!(
            guest.read(RX_DATA + 0x1_0000 * u64::from(head), 112),
            in_buffers(&frame(2, 100), 1)
        );
    }
}

#[test]
fn a_flood_of_frames_arrives_complete() {
    let (mut guest, cable) = guest(MERGEABLE);
    for index in 0..u64::from(QUEUE_SIZE) {
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * index, 0x8000)]);
    }
    guest.kick(RX);
    for number in 0..=u8::MAX {
        write(&cable, &frame(number, 64)).unwrap();
        let (head, written) = guest.take_used(RX);
        assert_eq!(written, 76);
        let at = RX_DATA + 0x1_0000 * u64::from(head);
        assert_eq!(guest.read(at, 76), in_buffers(&frame(number, 64), 1));
        guest.offer(RX, &[Piece::In(at, 0x8000)]);
        guest.kick(RX);
    }
}

#[test]
fn a_receive_buffer_too_small_for_the_header_stops_the_device() {
    let (mut guest, _cable) = guest(MERGEABLE);
    guest.offer(RX, &[Piece::In(RX_DATA, 11)]);
    guest.kick(RX);
    guest.wait_for_failure();
    guest.start(MERGEABLE);
}

#[test]
fn hostile_rings_do_no_harm() {
    let limits = [RateLimiterSpec::default(), tight_limits()];
    for (features, limits) in [0, MERGEABLE]
        .into_iter()
        .flat_map(|features| limits.map(|limits| (features, limits)))
    {
        let (net, cable) = device_of(&NetSpec {
            rx_rate_limiter: limits,
            tx_rate_limiter: limits,
            ..spec()
        });
        let disturb = || {
            for number in 0..3 {
                // The socket is full when the guest does not receive.
                let _ = write(&cable, &frame(number, 1500));
            }
        };
        survives_hostile_rings(Guest::with(net), 2, features, disturb, |guest| {
            let mut data = vec![0; 0x2_0000];
            while read(&cable, &mut data).is_ok() {}
            let frame = frame(8, 60);
            offer_frame(guest, TX_DATA, &frame);
            guest.kick(TX);
            assert_eq!(receive(&cable), frame);
            for index in 0..4 {
                guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * index, 0x8000)]);
            }
            guest.kick(RX);
            while read(&cable, &mut data).is_ok() {}
        });
    }
}

#[test]
fn the_driver_reads_the_address_link_state_and_mtu() {
    let (ours, _theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mac = "02:00:00:00:00:2a".parse().ok();
    let net = Net::over(
        Tap::over_socket(ours),
        &NetSpec {
            mac,
            mtu: Some(9000),
            ..spec()
        },
    )
    .unwrap();
    let mut config = [0; 12];
    net.config().read(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 0x2a, 1, 0, 0, 0, 0x28, 0x23]);
    assert!(has_feature(net.features(), VIRTIO_NET_F_MTU));
}

#[test]
fn frames_that_wait_for_a_guest_that_there_is_no_more_are_dropped_and_counted() {
    let (mut net, cable) = device();
    for number in 0..3 {
        rustix::io::write(&cable, &frame(number, 1000)).unwrap();
    }
    assert_eq!(net.drop_received(), 3);
    assert_eq!(net.drop_received(), 0);
    rustix::io::write(&cable, &frame(3, 1000)).unwrap();
    assert_eq!(net.drop_received(), 1);
}

#[test]
fn a_made_up_address_is_local_and_unicast_and_new_each_time() {
    let [first, second] = [random_mac().unwrap(), random_mac().unwrap()];
    assert_eq!(first.0[0] & 3, 2);
    assert_ne!(first, second);
    assert!(!has_feature(device().0.features(), VIRTIO_NET_F_MTU));
}

/// The message with which an interface is refused.
fn refusal(spec: &NetSpec) -> String {
    Net::open(spec).map(drop).unwrap_err().to_string()
}

#[test]
fn names_that_the_kernel_does_not_allow_are_refused() {
    for name in ["", "sixteen-bytes-xx", "a/b", "a b", "..", "nul\0"] {
        let message = refusal(&NetSpec {
            tap: TapSpec::Name(name.to_owned()),
            ..spec()
        });
        assert!(message.contains("is not a name for a tap device"), "{message}");
    }
}

#[test]
fn descriptors_that_are_no_tap_device_are_refused() {
    let file = tempfile::tempfile().unwrap();
    for fd in [file.as_raw_fd(), -1, 1 << 20] {
        let message = refusal(&NetSpec {
            tap: TapSpec::Fd(fd),
            ..spec()
        });
        assert!(
            message.starts_with(&format!("file descriptor {fd} is not a tap device")),
            "{message}"
        );
    }
    // Still the caller's.
    assert_eq!((&file).read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_mtu_below_that_of_ip_is_refused() {
    let (ours, _theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let refused = Net::over(
        Tap::over_socket(ours),
        &NetSpec {
            mtu: Some(67),
            ..spec()
        },
    );
    assert_eq!(
        refused.map(drop).unwrap_err().to_string(),
        "an MTU of 67 bytes is too small; the least is 68"
    );
}

#[test]
fn an_interface_in_a_saved_state_uses_what_the_driver_posted_and_sends_what_was_held() {
    let (mut guest, cable) = guest(0);
    for index in 0..3 {
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1000 * index, 2048)]);
    }
    guest.kick(RX);
    let first = frame(1, 100);
    write(&cable, &first).unwrap();
    assert_eq!(guest.take_used(RX), (0, 112));
    guest.transport.pause();
    offer_frame(&mut guest, TX_DATA, &frame(7, 60));
    let state = guest.transport.save();
    let (device, cable) = device();
    guest.replace(device, &state).unwrap();
    guest.transport.resume();
    assert_eq!(receive(&cable), frame(7, 60));
    let second = frame(2, 200);
    write(&cable, &second).unwrap();
    assert_eq!(guest.take_used(RX), (1, 212));
    assert_eq!(guest.read(RX_DATA + 0x1000, 212), in_buffers(&second, 1));
    assert_eq!(guest.read(RX_DATA, 112), in_buffers(&first, 1));
}
