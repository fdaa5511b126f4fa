//! Properties: whatever packets a guest sends, and whatever it writes into its rings, the device neither panics nor hangs,
//! keeps to its bounds, and serves the next driver.

use std::cell::RefCell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::virtio::hostile_rings::survives_hostile_rings;

const CASES: u32 = 200;
/// Ports that are in use in some way: of a listener, and of clients.
const LISTENER: u32 = 1000;

/// A packet, near to one that makes sense.
fn any_packet() -> impl Strategy<Value = (Header, usize)> {
    let host = prop_oneof![Just(LISTENER), CLIENT..CLIENT + 3, any::<u32>()];
    let cid = prop_oneof![12 => Just(CID.into()), 1 => any::<u64>()];
    let to = prop_oneof![12 => Just(HOST_CID), 1 => any::<u64>()];
    let kind = prop_oneof![12 => Just(STREAM), 1 => any::<u16>()];
    let operation = prop_oneof![12 => 1..8_u16, 1 => any::<u16>()];
    let numbers = prop_oneof![4 => 0..200_000_u32, 1 => any::<u32>()];
    let len = prop_oneof![4 => 0..10_000_u32, 1 => any::<u32>()];
    let fields = (cid, to, 50..53_u32, host, (kind, operation, 0..8_u32));
    (fields, len, numbers.clone(), numbers, 0..10_000_usize).prop_map(
        |((source_cid, destination_cid, source_port, destination_port, rest), len, buffer, forwarded, size)| {
            let (kind, operation, flags) = rest;
            let header = Header {
                source_cid,
                destination_cid,
                source_port,
                destination_port,
                len,
                kind,
                operation,
                flags,
                buffer,
                forwarded,
            };
            // Most packets are as long as they say.
            let len = usize::try_from(len).unwrap();
            (header, if len < 10_000 { len } else { size })
        },
    )
}

#[test]
fn no_sequence_of_packets_does_harm() {
    let driver = RefCell::new(Driver::new());
    let listener = driver.borrow().listener(LISTENER);
    listener.set_nonblocking(true).unwrap();
    TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    })
    .run(&prop::collection::vec(any_packet(), 0..60), |packets| {
        let driver = &mut *driver.borrow_mut();
        driver.guest.start(0);
        let mut clients: Vec<UnixStream> = (50..53).map(|port| driver.client(port)).collect();
        for (step, (header, size)) in packets.into_iter().enumerate() {
            // There is always a buffer, so that the device need not wait for one.
            driver.guest.offer(RX, &[Piece::In(RX_BUFFER, RX_LEN)]);
            driver.guest.kick(RX);
            driver.send(header, &pattern(size));
            while driver.guest.try_take_used(RX).is_some() {}
            if let Some(client) = clients.get_mut(step % 7) {
                // It may have been closed.
                let _ = client.write(b"some data");
            }
            if let Ok((host, _)) = listener.accept()
                && step % 2 == 0
            {
                clients.push(host);
            }
            if step % 11 == 10 && !clients.is_empty() {
                clients.remove(0);
            }
        }
        driver.guest.transport.pause();
        driver.guest.assert_fences_hold();
        prop_assert!(!driver.guest.needs_reset());
        drop(clients);
        while listener.accept().is_ok() {}
        driver.guest.start(0);
        serve(&mut driver.guest);
        Ok(())
    })
    .unwrap();
}

/// A connection to a port where nobody listens is refused.
fn serve(guest: &mut Guest) {
    let request = packet(Ports { guest: 1, host: 2 }, Operation::Request);
    guest.write(TX_PACKET, &request.bytes());
    guest.offer(TX, &[Piece::Out(TX_PACKET, 44)]);
    guest.kick(TX);
    let mut header = request;
    // Clients of before may still be asking.
    while header != request.refusal() {
        assert_eq!(guest.request(RX, &[Piece::In(RX_BUFFER, RX_LEN)]), 44);
        header = Header::read(guest.read(RX_BUFFER, 44).first_chunk().unwrap());
    }
}

#[test]
fn the_socket_device_survives_hostile_rings() {
    let driver = Driver::new();
    let path = driver.dir.path().join("v.sock");
    survives_hostile_rings(
        driver.guest,
        3,
        0,
        || {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"CONNECT 1\n").unwrap();
        },
        serve,
    );
}
