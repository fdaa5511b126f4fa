//! What a guest of which output is held notices: nothing, until there is no space to hold more.

use std::sync::Mutex;

use super::*;

const STRANGER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const LEN: usize = 60_000;

/// A guest whose frames are held, a way to its interface, and the other end of the cable.
fn held_guest() -> (Guest, Arc<Mutex<Net>>, OwnedFd) {
    let (mut net, cable) = device();
    net.hold(Arc::default(), 1, Arc::new(|| {}));
    let net = Arc::new(Mutex::new(net));
    let mut guest = Guest::sharing(net.clone());
    guest.start(0);
    (guest, net, cable)
}

fn numbered(number: u32, len: usize) -> Vec<u8> {
    let head = [&[0; HEADER_LEN][..], &STRANGER, &[0; 8], &number.to_le_bytes()].concat();
    head.into_iter().chain(std::iter::repeat(7)).take(len).collect()
}

#[test]
fn held_frames_are_done_for_the_guest_and_leave_in_order_when_they_are_released() {
    let (mut guest, net, cable) = held_guest();
    for number in 0..3 {
        let head = offer_frame(&mut guest, TX_DATA, &numbered(number, 100));
        guest.kick(TX);
        assert_eq!(guest.take_used(TX), (head, 0));
    }
    assert_eq!(net.lock().unwrap().held().frames, 3);
    assert!(read(&cable, &mut [0]).is_err());
    guest.transport.pause();
    net.lock().unwrap().cut(2);
    guest.transport.resume();
    net.lock().unwrap().release(1);
    for number in 0..3 {
        assert_eq!(receive(&cable), numbered(number, 100));
    }
}

#[test]
fn frames_stay_in_the_guests_queue_when_no_more_can_be_held_and_all_leave_in_the_end() {
    let (mut guest, net, cable) = held_guest();
    let has_space = || net.lock().unwrap().held().bytes + LEN + 100 <= HELD_BYTES_MAX;
    let mut taken = 0;
    while has_space() {
        offer_frame(&mut guest, TX_DATA, &numbered(taken, LEN));
        guest.kick(TX);
        guest.take_used(TX);
        taken += 1;
    }
    let held = net.lock().unwrap().held();
    assert_eq!(held.frames, usize::try_from(taken).unwrap());
    let head = offer_frame(&mut guest, TX_DATA, &numbered(taken, LEN));
    guest.kick(TX);
    // The loop has seen to the kick by then, or will when it goes on.
    guest.transport.pause();
    guest.transport.resume();
    assert_eq!((guest.try_take_used(TX), net.lock().unwrap().held()), (None, held));
    net.lock().unwrap().open_gate();
    for number in 0..=taken {
        assert_eq!(receive(&cable), numbered(number, LEN));
    }
    assert_eq!(guest.take_used(TX), (head, 0));
}

#[test]
fn what_is_held_outlives_a_pause_and_a_reset() {
    let (mut guest, net, cable) = held_guest();
    let frame = numbered(0, 100);
    offer_frame(&mut guest, TX_DATA, &frame);
    guest.kick(TX);
    guest.take_used(TX);
    guest.transport.pause();
    net.lock().unwrap().open_gate();
    assert!(read(&cable, &mut [0]).is_err(), "a stopped device sends nothing");
    guest.start(0);
    assert_eq!(receive(&cable), frame);
}

#[test]
fn announcements_tell_what_was_known_when_they_began_and_are_not_held() {
    let (mut guest, net, cable) = held_guest();
    net.lock().unwrap().announce();
    let first = receive(&cable);
    offer_frame(&mut guest, TX_DATA, &super::addresses::arp(STRANGER, "192.0.2.7"));
    guest.kick(TX);
    guest.take_used(TX);
    assert_ne!(net.lock().unwrap().addresses(), AddressesState::default());
    for _ in 0..4 {
        assert_eq!(receive(&cable), first, "nothing of an epoch that may never have been");
    }
}
