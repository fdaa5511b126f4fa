//! The whole device, between a driver with real rings and programs with real sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use super::credit::BUFFER;
use super::packet::*;
use super::*;
use crate::stats::VsockStats;
use crate::virtio::dirty_pages::changed_pages;
use crate::virtio::testing::{DATA, Guest, HIGH_START, Piece};

mod hostile;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const CID: u32 = 3;
/// Where the driver has its packet to send, and its buffer to receive into: a header and a page.
const TX_PACKET: u64 = DATA;
const RX_BUFFER: u64 = DATA + 0x2_0000;
const RX_LEN: u32 = 44 + 4096;
/// What the driver says it keeps of each connection, unless a test says something else.
const GUEST_BUFFER: u32 = 64 << 10;
/// First port that a client of the host has.
const CLIENT: u32 = 1 << 30;

/// A guest with a socket device, and the folder with its sockets.
struct Driver {
    guest: Guest,
    device: Arc<Mutex<Vsock>>,
    dir: TempDir,
}

fn device(dir: &TempDir) -> Arc<Mutex<Vsock>> {
    let uds = dir.path().join("v.sock");
    Arc::new(Mutex::new(Vsock::new(&VsockSpec { cid: CID, uds })))
}

impl Driver {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        device.lock().unwrap().listen().unwrap();
        let mut guest = Guest::sharing(device.clone());
        guest.start(0);
        Self { guest, device, dir }
    }

    /// A client of the host that asks for `port`.
    fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.dir.path().join("v.sock")).unwrap();
        writeln!(client, "CONNECT {port}").unwrap();
        client
    }

    /// A listener for the guest at `port`.
    fn listener(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// Puts a packet where it is sent from, and offers it.
    fn offer(&mut self, header: Header, data: &[u8]) {
        self.guest.write(TX_PACKET, &header.bytes());
        self.guest.write(TX_PACKET + 44, data);
        let len = u32::try_from(data.len()).unwrap();
        // As Linux does it, or not: how a packet is cut into descriptors is the driver's matter.
        match len {
            0 => self.guest.offer(TX, &[Piece::Out(TX_PACKET, 44)]),
            _ => self
                .guest
                .offer(TX, &[Piece::Out(TX_PACKET, 40), Piece::Out(TX_PACKET + 40, 4 + len)]),
        };
        self.guest.kick(TX);
    }

    /// Sends a packet, and waits until the device has taken it.
    fn send(&mut self, header: Header, data: &[u8]) {
        self.offer(header, data);
        self.guest.take_used(TX);
    }

    /// Waits for a packet.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let written = self.guest.request(RX, &[Piece::In(RX_BUFFER, RX_LEN)]);
        let bytes = self.guest.read(RX_BUFFER, usize::try_from(written).unwrap());
        let (header, data) = bytes.split_first_chunk().unwrap();
        let header = Header::read(header);
        assert_eq!(usize::try_from(header.len).unwrap(), data.len());
        (header, data.to_vec())
    }

    /// Waits for a packet without data; returns what it is about.
    fn told(&mut self) -> (u16, Ports, u32) {
        let (header, data) = self.receive();
        assert!(data.is_empty());
        assert_eq!((header.source_cid, header.destination_cid), (HOST_CID, CID.into()));
        let ports = Ports {
            guest: header.destination_port,
            host: header.source_port,
        };
        (header.operation, ports, header.flags)
    }

    /// A connection of a client to `port`.
    fn connected(&mut self, port: u32, buffer: u32) -> (UnixStream, Ports) {
        let mut client = self.client(port);
        let (request, _) = self.receive();
        assert_eq!(request.operation, Operation::Request.number());
        assert_eq!((request.destination_port, request.buffer), (port, BUFFER));
        let ports = Ports {
            guest: port,
            host: request.source_port,
        };
        self.send(
            Header {
                buffer,
                ..packet(ports, Operation::Response)
            },
            &[],
        );
        assert_eq!(read(&mut client, 14), format!("OK {}\n", ports.host).as_bytes());
        (client, ports)
    }

    fn stats(&self) -> VsockStats {
        self.device.lock().unwrap().counters().read()
    }
}

/// A packet of the guest's.
fn packet(ports: Ports, operation: Operation) -> Header {
    Header {
        source_cid: CID.into(),
        destination_cid: HOST_CID,
        source_port: ports.guest,
        destination_port: ports.host,
        kind: STREAM,
        operation: operation.number(),
        buffer: GUEST_BUFFER,
        ..Header::default()
    }
}

fn data_packet(ports: Ports, data: &[u8]) -> Header {
    Header {
        len: u32::try_from(data.len()).unwrap(),
        ..packet(ports, Operation::Data)
    }
}

fn shutdown_packet(ports: Ports, flags: u32) -> Header {
    Header {
        flags,
        ..packet(ports, Operation::Shutdown)
    }
}

fn read(from: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    from.read_exact(&mut data).unwrap();
    data
}

/// Everything up to the end.
fn read_all(mut from: UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    from.read_to_end(&mut data).unwrap();
    data
}

/// `len` bytes that differ everywhere.
fn pattern(len: usize) -> Vec<u8> {
    let words = (0..len.div_ceil(4)).map(|word| u32::try_from(word).unwrap().wrapping_mul(0x9e37_79b1));
    let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    bytes.truncate(len);
    bytes
}

#[test]
fn a_client_of_the_host_talks_to_a_port_of_the_guest() {
    let mut driver = Driver::new();
    let (mut client, ports) = driver.connected(52, GUEST_BUFFER);
    assert_eq!(ports.host, CLIENT);
    client.write_all(b"hello").unwrap();
    let (header, data) = driver.receive();
    assert_eq!((header.operation, &data[..]), (Operation::Data.number(), &b"hello"[..]));
    driver.send(data_packet(ports, b"world"), b"world");
    assert_eq!(read(&mut client, 5), b"world");
    let stats = driver.stats();
    assert_eq!((stats.opened, stats.closed, stats.refused), (1, 0, 0));
    assert_eq!((stats.rx_bytes, stats.tx_bytes), (5, 5));
    assert_eq!((stats.rx_packets, stats.tx_packets), (2, 2));
}

#[test]
fn a_client_is_turned_away_if_nobody_listens_in_the_guest_or_it_asks_for_nothing() {
    let mut driver = Driver::new();
    let client = driver.client(52);
    let (_, ports, _) = driver.told();
    driver.send(packet(ports, Operation::Reset), &[]);
    assert_eq!(read_all(client), b"");
    let mut other = UnixStream::connect(driver.dir.path().join("v.sock")).unwrap();
    other.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    assert_eq!(read_all(other), b"");
    assert_eq!((driver.stats().opened, driver.stats().refused), (0, 2));
}

#[test]
fn the_guest_reaches_the_listener_of_a_port_and_is_refused_where_there_is_none() {
    let mut driver = Driver::new();
    let listener = driver.listener(1000);
    let at = |host| Ports { guest: 5, host };
    driver.send(packet(at(1001), Operation::Request), &[]);
    assert_eq!(driver.told(), (Operation::Reset.number(), at(1001), 0));
    driver.send(packet(at(1000), Operation::Request), &[]);
    assert_eq!(driver.told(), (Operation::Response.number(), at(1000), 0));
    let (mut host, _) = listener.accept().unwrap();
    driver.send(data_packet(at(1000), b"ping"), b"ping");
    assert_eq!(read(&mut host, 4), b"ping");
    // The guest cannot have the same connection twice.
    driver.send(packet(at(1000), Operation::Request), &[]);
    assert_eq!(driver.told(), (Operation::Reset.number(), at(1000), 0));
    assert_eq!(read_all(host), b"");
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut driver = Driver::new();
    let (mut client, ports) = driver.connected(52, 10);
    client.write_all(&pattern(25)).unwrap();
    let mut received = Vec::new();
    for part in [10, 10, 5] {
        let (header, data) = driver.receive();
        assert_eq!((header.operation, data.len()), (Operation::Data.number(), part));
        received.extend(data);
        if received.len() < 25 {
            assert_eq!(driver.told().0, Operation::CreditRequest.number());
            let update = Header {
                buffer: 10,
                forwarded: u32::try_from(received.len()).unwrap(),
                ..packet(ports, Operation::CreditUpdate)
            };
            driver.send(update, &[]);
        }
    }
    assert_eq!(received, pattern(25));
}

#[test]
fn what_a_slow_host_does_not_take_waits_and_the_guest_learns_of_room_as_it_does() {
    const TOTAL: usize = 4 << 20;
    const PART: usize = 16 << 10;
    let mut driver = Driver::new();
    let (mut client, ports) = driver.connected(52, GUEST_BUFFER);
    let data = pattern(TOTAL);
    let (mut sent, mut forwarded, mut taken) = (0, 0, Vec::new());
    while taken.len() < TOTAL {
        let room = usize::try_from(BUFFER).unwrap() - (sent - forwarded);
        let part = &data[sent..TOTAL.min(sent + room.min(PART))];
        if part.is_empty() {
            // The driver asks, as the device need not tell of little.
            taken.extend(read(&mut client, PART.min(TOTAL - taken.len())));
            driver.send(packet(ports, Operation::CreditRequest), &[]);
            let (update, _) = driver.receive();
            assert_eq!(update.operation, Operation::CreditUpdate.number());
            forwarded = usize::try_from(update.forwarded).unwrap();
            assert!(forwarded <= sent && update.buffer == BUFFER);
        } else {
            driver.send(data_packet(ports, part), part);
            sent += part.len();
        }
    }
    assert!(taken == data);
    assert_eq!(driver.stats().tx_bytes, TOTAL as u64);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_its_connection() {
    let mut driver = Driver::new();
    let (_client, ports) = driver.connected(52, GUEST_BUFFER);
    let part = pattern(64 << 10);
    // However much the socket takes, this is more.
    for _ in 0..32 {
        driver.send(data_packet(ports, &part), &part);
    }
    let mut told = driver.told();
    while told.0 == Operation::CreditUpdate.number() {
        told = driver.told();
    }
    assert_eq!(told, (Operation::Reset.number(), ports, 0));
    assert_eq!(driver.stats().closed, 1);
}

#[test]
fn each_direction_is_closed_by_itself() {
    let mut driver = Driver::new();
    let (mut client, ports) = driver.connected(52, GUEST_BUFFER);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(driver.receive().1, b"last");
    assert_eq!(driver.told(), (Operation::Shutdown.number(), ports, SENDS_NO_MORE));
    driver.send(data_packet(ports, b"answer"), b"answer");
    assert_eq!(read(&mut client, 6), b"answer");
    driver.send(shutdown_packet(ports, SENDS_NO_MORE), &[]);
    assert_eq!(read_all(client), b"");
    assert_eq!(driver.told(), (Operation::Shutdown.number(), ports, SHUT_DOWN));
    driver.send(shutdown_packet(ports, RECEIVES_NO_MORE), &[]);
    assert_eq!(driver.told(), (Operation::Reset.number(), ports, 0));
}

#[test]
fn a_client_that_goes_away_is_known_in_the_guest() {
    let mut driver = Driver::new();
    let (mut client, ports) = driver.connected(52, GUEST_BUFFER);
    client.write_all(b"last").unwrap();
    drop(client);
    assert_eq!(driver.receive().1, b"last");
    assert_eq!(driver.told(), (Operation::Shutdown.number(), ports, SHUT_DOWN));
    driver.send(packet(ports, Operation::Reset), &[]);
    let stats = driver.stats();
    assert_eq!((stats.opened, stats.closed), (1, 1));
}

#[test]
fn what_the_guest_sent_before_it_closed_is_delivered() {
    let mut driver = Driver::new();
    let (mut client, ports) = driver.connected(52, GUEST_BUFFER);
    let part = pattern(48 << 10);
    let mut sent = 0;
    // More than the socket takes, so that some waits in the device; less than that and what the device keeps.
    while driver.device.lock().unwrap().table.kept() == 0 {
        driver.send(data_packet(ports, &part), &part);
        sent += 1;
    }
    driver.send(shutdown_packet(ports, SHUT_DOWN), &[]);
    let mut told = driver.told();
    while told.0 == Operation::CreditUpdate.number() {
        told = driver.told();
    }
    assert_eq!(told, (Operation::Reset.number(), ports, 0));
    for _ in 0..sent {
        assert!(read(&mut client, part.len()) == part);
    }
    assert_eq!(read_all(client), b"");
}

#[test]
fn a_packet_about_no_connection_is_refused_and_a_refusal_is_not_answered() {
    let mut driver = Driver::new();
    let ports = Ports { guest: 7, host: 8 };
    let good = packet(ports, Operation::Request);
    for bad in [
        packet(ports, Operation::Data),
        packet(ports, Operation::Response),
        packet(ports, Operation::Shutdown),
        packet(ports, Operation::CreditRequest),
        Header { kind: 2, ..good },
        Header {
            destination_cid: 9,
            ..good
        },
        Header { source_cid: 9, ..good },
        Header { operation: 0, ..good },
        Header { operation: 8, ..good },
    ] {
        driver.send(packet(ports, Operation::Reset), &[]);
        driver.send(bad, &[]);
        assert_eq!(driver.receive().0, bad.refusal());
    }
}

#[test]
fn a_guest_that_takes_nothing_is_given_no_more_to_answer() {
    let mut driver = Driver::new();
    let bad = packet(Ports { guest: 7, host: 8 }, Operation::Data);
    for _ in 0..table::REPLIES_MAX {
        driver.send(bad, &[]);
    }
    driver.offer(bad, &[]);
    driver.guest.on_loop(|| ());
    assert_eq!(driver.guest.try_take_used(TX), None);
    assert_eq!(driver.receive().0, bad.refusal());
    driver.guest.take_used(TX);
    for _ in 0..table::REPLIES_MAX {
        assert_eq!(driver.receive().0, bad.refusal());
    }
}

#[test]
fn connections_live_through_a_pause_and_not_through_another_set_up() {
    let mut driver = Driver::new();
    let (mut client, ports) = driver.connected(52, GUEST_BUFFER);
    driver.guest.transport.pause();
    client.write_all(b"meanwhile").unwrap();
    driver.guest.transport.resume();
    assert_eq!(driver.receive().1, b"meanwhile");
    driver.send(data_packet(ports, b"yes"), b"yes");
    assert_eq!(read(&mut client, 3), b"yes");
    driver.guest.start(0);
    assert_eq!(read_all(client), b"");
    driver.send(packet(ports, Operation::Data), &[]);
    assert_eq!(driver.told(), (Operation::Reset.number(), ports, 0));
}

#[test]
fn a_device_that_takes_anothers_place_tells_the_guest_that_its_connections_are_gone() {
    let mut driver = Driver::new();
    let (client, _) = driver.connected(52, GUEST_BUFFER);
    driver.guest.transport.pause();
    let state = driver.guest.transport.save();
    // Whoever lets go of the path has it free for the next.
    driver.device.lock().unwrap().stop_listening();
    let mut successor = Vsock::new(&VsockSpec {
        cid: CID,
        uds: driver.dir.path().join("v.sock"),
    });
    successor.listen().unwrap();
    driver.guest.replace(successor, &state).unwrap();
    driver.device = device(&driver.dir);
    assert_eq!(read_all(client), b"");
    driver.guest.transport.resume();
    // No buffer for the event is there yet: nothing else happens before the guest knows.
    let _waiting = driver.client(7);
    driver.guest.on_loop(|| ());
    assert_eq!(driver.guest.request(EVENT, &[Piece::In(HIGH_START, 8)]), 4);
    assert_eq!(driver.guest.read(HIGH_START, 4), TRANSPORT_RESET);
    assert_eq!(driver.told().0, Operation::Request.number());
    driver.guest.transport.pause();
    driver.guest.transport.resume();
    driver.guest.offer(EVENT, &[Piece::In(HIGH_START, 8)]);
    driver.guest.kick(EVENT);
    driver.guest.on_loop(|| ());
    assert_eq!(driver.guest.try_take_used(EVENT), None, "once is enough");
}

#[test]
fn pages_that_packets_are_put_into_are_marked() {
    let mut driver = Driver::new();
    let (mut client, _) = driver.connected(52, GUEST_BUFFER);
    let buffers = [Piece::In(DATA + 0xff0, 0x20), Piece::In(HIGH_START + 0x1000, 0x1000)];
    let changed = changed_pages(
        &mut driver.guest,
        |guest| {
            client.write_all(&[1; 4096]).unwrap();
            guest.offer(RX, &buffers);
        },
        |guest| assert_eq!(guest.take_used(RX).1, 0x1020),
    );
    assert_eq!(changed, [0x1000, DATA, DATA + 0x1000, HIGH_START + 0x1000]);
}
