//! What the LAN is told after a move.

use std::sync::Mutex;

use super::addresses::{GUEST_MAC, OTHER_MAC, arp, nd};
use super::*;

/// Announcements of one `begin`.
const TIMES: usize = 5;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.chars().filter(|digit| !digit.is_whitespace()).collect();
    let byte = |pair: &[char]| u8::from_str_radix(&String::from_iter(pair), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// A frame as it is on the tap: with its header, and padded.
fn on_tap(text: &str) -> Vec<u8> {
    let mut frame = [vec![0; HEADER_LEN], hex(text)].concat();
    frame.resize(frame.len().max(HEADER_LEN + 60), 0);
    frame
}

/// A guest with [`GUEST_MAC`], a way to its interface, and the other end of the cable.
fn guest() -> (Guest, Arc<Mutex<Net>>, OwnedFd) {
    let (net, cable) = device_of(&NetSpec {
        mac: Some(MacAddr(GUEST_MAC)),
        ..spec()
    });
    let net = Arc::new(Mutex::new(net));
    let mut guest = Guest::sharing(net.clone());
    guest.start(0);
    (guest, net, cable)
}

fn send(guest: &mut Guest, cable: &OwnedFd, frame: &[u8]) {
    offer_frame(guest, TX_DATA, frame);
    guest.kick(TX);
    assert_eq!(receive(cable), frame);
    // Until then, the buffer is the device's.
    guest.take_used(TX);
}

const RARP: &str = "ffffffffffff 02000000002a 8035  0001 0800 06 04 0003
    02000000002a 00000000  02000000002a 00000000";

#[test]
fn an_interface_is_announced_with_all_addresses_several_times() {
    let (mut guest, net, cable) = guest();
    send(&mut guest, &cable, &arp(GUEST_MAC, "192.0.2.7"));
    send(
        &mut guest,
        &cable,
        &nd(GUEST_MAC, "2001:db8::2a", 135, 0, "2001:db8::1"),
    );
    // Of a container behind the guest's interface.
    send(&mut guest, &cable, &arp(OTHER_MAC, "192.0.2.8"));
    net.lock().unwrap().announce();
    let announced = [
        on_tap(RARP),
        on_tap(&RARP.replace("02000000002a", "020000000099")),
        on_tap(
            "ffffffffffff 020000000099 0806  0001 0800 06 04 0001
             020000000099 c0000208  000000000000 c0000208",
        ),
        on_tap(
            "ffffffffffff 02000000002a 0806  0001 0800 06 04 0001
             02000000002a c0000207  000000000000 c0000207",
        ),
        on_tap(
            "333300000001 02000000002a 86dd  60000000 0020 3a ff
             20010db8 00000000 00000000 0000002a  ff020000 00000000 00000000 00000001
             88 00 f8af 20000000  20010db8 00000000 00000000 0000002a  02 01 02000000002a",
        ),
    ];
    for _ in 0..TIMES {
        for frame in &announced {
            assert_eq!(receive(&cable), *frame);
        }
    }
    guest.until(|| net.lock().unwrap().announcer.is_done());
    assert!(read(&cable, &mut [0]).is_err(), "nothing more is sent");
}

#[test]
fn a_router_is_announced_as_one() {
    let (mut guest, net, cable) = guest();
    send(&mut guest, &cable, &nd(GUEST_MAC, "2001:db8::2a", 134, 0, "::"));
    net.lock().unwrap().announce();
    assert_eq!(receive(&cable), on_tap(RARP));
    let advertisement = receive(&cable);
    let flags_and_checksum = (HEADER_LEN + 14 + 40 + 4, HEADER_LEN + 14 + 40 + 2);
    assert_eq!(advertisement[flags_and_checksum.0], 0xa0);
    assert_eq!(advertisement[flags_and_checksum.1..][..2], [0x78, 0xaf]);
}

#[test]
fn what_is_begun_while_the_device_stands_still_is_announced_when_it_goes_on() {
    let (mut guest, net, cable) = guest();
    guest.transport.pause();
    net.lock().unwrap().announce();
    guest.transport.resume();
    for _ in 0..TIMES {
        assert_eq!(receive(&cable), on_tap(RARP));
    }
}

#[test]
fn an_interface_in_a_saved_state_announces_what_the_guest_used_before() {
    let (mut guest, net, cable) = guest();
    send(&mut guest, &cable, &arp(GUEST_MAC, "192.0.2.7"));
    guest.transport.pause();
    let (state, addresses) = (guest.transport.save(), net.lock().unwrap().addresses());
    let (mut moved, cable) = device();
    moved.recall(&addresses);
    moved.announce();
    guest.replace(moved, &state).unwrap();
    guest.transport.resume();
    assert_eq!(receive(&cable)[HEADER_LEN + 12..][..2], [0x80, 0x35]);
    assert_eq!(receive(&cable)[HEADER_LEN + 12..][..2], [0x80, 0x35]);
    assert_eq!(
        receive(&cable),
        on_tap(
            "ffffffffffff 02000000002a 0806  0001 0800 06 04 0001
             02000000002a c0000207  000000000000 c0000207",
        )
    );
}
