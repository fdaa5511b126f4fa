//! Frames for the metadata service are answered at the interface; all others come and go as before.

use cutover_snapshot::spec::{MmdsSpec, MmdsVersion, mmds_address};

use super::*;
use crate::mmds::Service;

fn device_with_service() -> (Net, OwnedFd) {
    let spec = MmdsSpec {
        version: MmdsVersion::V2,
        nets: Vec::new(),
        address: mmds_address(),
        imds_compat: false,
    };
    let (mut net, cable) = device();
    let service = Arc::new(Service::new(&spec, Arc::default()));
    net.serve_metadata(service, spec.address, None).unwrap();
    (net, cable)
}

fn guest_with_service() -> (Guest, OwnedFd) {
    let (net, cable) = device_with_service();
    (Guest::started(net, MERGEABLE), cable)
}

/// "Who has the address of the service?"
fn question() -> Vec<u8> {
    super::addresses::arp_for([2, 0, 0, 0, 0, 1], "198.18.0.2", mmds_address())
}

#[test]
fn what_is_for_the_service_is_answered_and_does_not_leave() {
    let (mut guest, cable) = guest_with_service();
    for index in 0..4 {
        guest.offer(RX, &[Piece::In(RX_DATA + 0x1_0000 * index, 0x8000)]);
    }
    guest.kick(RX);
    guest.clean();
    let head = offer_frame(&mut guest, TX_DATA, &question());
    guest.kick(TX);
    assert_eq!(guest.take_used(TX), (head, 0));
    assert_eq!(guest.take_used(RX), (0, 12 + 42));
    let answer = guest.read(RX_DATA, 54);
    // One buffer, to the guest, from the service, that it is an answer.
    assert_eq!(answer[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(answer[12..24], [2, 0, 0, 0, 0, 1, 6, 1, 0x23, 0x45, 0x67, 1]);
    assert_eq!(answer[32..34], [0, 2]);
    assert_eq!(answer[40..44], mmds_address().octets());
    assert!(guest.is_dirty(RX_DATA));
    // The next frame that the host gets is another one.
    let other = frame(1, 60);
    offer_frame(&mut guest, TX_DATA, &other);
    guest.kick(TX);
    assert_eq!(receive(&cable), other);
    write(&cable, &frame(2, 100)).unwrap();
    assert_eq!(guest.take_used(RX), (1, 112));
}

#[test]
fn an_answer_waits_until_the_guest_has_buffers_for_it() {
    let (mut guest, _cable) = guest_with_service();
    let head = offer_frame(&mut guest, TX_DATA, &question());
    guest.kick(TX);
    assert_eq!(guest.take_used(TX), (head, 0));
    guest.transport.pause();
    guest.transport.resume();
    assert_eq!(guest.try_take_used(RX), None);
    guest.offer(RX, &[Piece::In(RX_DATA, 0x1_8000)]);
    guest.kick(RX);
    assert_eq!(guest.take_used(RX), (0, 54));
}

#[test]
fn hostile_rings_do_no_harm_to_an_interface_with_the_service() {
    for features in [0, MERGEABLE] {
        let (net, cable) = device_with_service();
        let disturb = || {
            // The socket is full when the guest does not receive.
            let _ = write(&cable, &frame(1, 1500));
        };
        survives_hostile_rings(Guest::with(net), 2, features, disturb, |guest| {
            let mut data = vec![0; 0x2_0000];
            while read(&cable, &mut data).is_ok() {}
            guest.offer(RX, &[Piece::In(RX_DATA, 0x1_8000)]);
            guest.kick(RX);
            offer_frame(guest, TX_DATA, &question());
            guest.kick(TX);
            guest.take_used(TX);
            // What was on the cable before may come first.
            guest.take_used(RX);
        });
    }
}
