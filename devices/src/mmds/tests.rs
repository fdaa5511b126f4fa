//! The service as a guest with a TCP/IP stack of its own finds it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time;

use cutover_snapshot::spec::{MmdsSpec, MmdsVersion, mmds_address};
use serde_json::{Value, json};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};

use super::*;

mod hostile;

const HEADROOM: usize = 12;
const GUEST: Ipv4Address = Ipv4Address::new(198, 18, 0, 2);
const GUEST_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 2]);

fn spec(version: MmdsVersion, imds_compat: bool) -> MmdsSpec {
    MmdsSpec {
        version,
        nets: Vec::new(),
        address: mmds_address(),
        imds_compat,
    }
}

fn endpoint_of(spec: &MmdsSpec, document: Value) -> Endpoint {
    let metadata = Metadata::with_limit(1 << 20);
    metadata.put(document).unwrap();
    let service = Arc::new(Service::new(spec, Arc::new(metadata)));
    Endpoint::new(service, spec.address, None, HEADROOM).unwrap()
}

fn endpoint(version: MmdsVersion) -> Endpoint {
    endpoint_of(
        &spec(version, false),
        json!({
            "latest": {
                "meta-data": { "ami-id": "ami-1", "macs": { "a/b": "x" }, "numbers": [1, 2] },
                "user-data": "two\nlines",
            },
        }),
    )
}

/// The guest's end of the cable.
#[derive(Default)]
struct Cable {
    from_service: VecDeque<Vec<u8>>,
    to_service: Vec<Vec<u8>>,
}

struct Frame(Vec<u8>);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl TxToken for &mut Cable {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let filled = fill(&mut frame);
        self.to_service.push(frame);
        filled
    }
}

impl Device for Cable {
    type RxToken<'a> = Frame;
    type TxToken<'a> = &'a mut Cable;

    fn receive(&mut self, _now: Instant) -> Option<(Frame, &mut Self)> {
        let frame = self.from_service.pop_front()?;
        Some((Frame(frame), self))
    }

    fn transmit(&mut self, _now: Instant) -> Option<&mut Self> {
        Some(self)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        (capabilities.medium, capabilities.max_transmission_unit) = (Medium::Ethernet, 1514);
        capabilities
    }
}

/// A guest that checks every sum.
struct Client {
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    now: Instant,
    next_port: u16,
}

impl Client {
    fn new() -> Self {
        let mut cable = Cable::default();
        let mut interface = Interface::new(Config::new(GUEST_MAC.into()), &mut cable, Instant::ZERO);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(GUEST.into(), 0)).unwrap());
        Self {
            cable,
            interface,
            sockets: SocketSet::new(Vec::new()),
            now: Instant::ZERO,
            next_port: 50_000,
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(buffer(30_000), buffer(10_000));
        self.next_port += 1;
        let to = (IpAddress::from(mmds_address()), 80);
        socket.connect(self.interface.context(), to, self.next_port).unwrap();
        self.sockets.add(socket)
    }

    /// Carries frames to and fro until there are none.
    fn exchange(&mut self, endpoint: &mut Endpoint) {
        loop {
            // Timers ring at once where nothing else happens.
            self.now += smoltcp::time::Duration::from_millis(20);
            self.interface.poll(self.now, &mut self.cable, &mut self.sockets);
            let sent = std::mem::take(&mut self.cable.to_service);
            let is_quiet = sent.is_empty();
            for frame in sent {
                assert!(endpoint.claims(frame.first_chunk().unwrap()));
                endpoint.take(frame);
            }
            while let Some(frame) = endpoint.next_frame() {
                assert_eq!(frame[..HEADROOM], [0; HEADROOM]);
                self.cable.from_service.push_back(frame[HEADROOM..].to_vec());
            }
            if is_quiet && self.cable.from_service.is_empty() {
                return;
            }
        }
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// What comes on a connection until it ends.
    fn read_to_end(&mut self, handle: SocketHandle, endpoint: &mut Endpoint) -> String {
        let mut received = Vec::new();
        loop {
            self.exchange(endpoint);
            let socket = self.socket(handle);
            let before = received.len();
            while socket
                .recv(|data| (data.len(), received.extend_from_slice(data)))
                .is_ok()
                && socket.can_recv()
            {}
            if received.len() == before {
                assert!(!socket.may_recv(), "it has ended");
                socket.close();
                self.exchange(endpoint);
                self.sockets.remove(handle);
                return String::from_utf8(received).unwrap();
            }
        }
    }

    /// Sends `request` in pieces of `piece` bytes, and returns the answer.
    fn send_in_pieces(&mut self, endpoint: &mut Endpoint, request: &str, piece: usize) -> String {
        let handle = self.connect();
        self.exchange(endpoint);
        for piece in request.as_bytes().chunks(piece) {
            // It may have been answered before all was said.
            let _ = self.socket(handle).send_slice(piece);
            self.exchange(endpoint);
        }
        self.read_to_end(handle, endpoint)
    }

    fn request(&mut self, endpoint: &mut Endpoint, request: &str) -> String {
        self.send_in_pieces(endpoint, request, usize::MAX)
    }
}

/// A request for `path` with header `fields`, each with its end of line; status and body of the answer.
fn ask(endpoint: &mut Endpoint, method: &str, path: &str, fields: &str) -> (String, String) {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{fields}\r\n");
    let answer = Client::new().request(endpoint, &request);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    let status = head.strip_prefix("HTTP/1.1 ").unwrap().lines().next().unwrap();
    (status.to_owned(), body.to_owned())
}

fn get(endpoint: &mut Endpoint, path: &str, fields: &str) -> (String, String) {
    ask(endpoint, "GET", path, fields)
}

fn ok(body: &str) -> (String, String) {
    ("200 OK".to_owned(), body.to_owned())
}

const JSON: &str = "Accept: application/json\r\n";

#[test]
fn metadata_are_listed_as_ec2_does_or_given_as_json() {
    let endpoint = &mut endpoint(MmdsVersion::V1);
    assert_eq!(get(endpoint, "/", ""), ok("latest/"));
    assert_eq!(get(endpoint, "/latest", ""), ok("meta-data/\nuser-data"));
    assert_eq!(
        get(endpoint, "//latest//meta-data/", "Accept: */*\r\n"),
        ok("ami-id\nmacs/\nnumbers")
    );
    assert_eq!(get(endpoint, "/latest/meta-data/ami-id", ""), ok("ami-1"));
    assert_eq!(get(endpoint, "/latest/meta-data/macs/a~1b", ""), ok("x"));
    assert_eq!(get(endpoint, "/latest/user-data", ""), ok("two\nlines"));
    assert_eq!(get(endpoint, "/latest/meta-data/ami-id", JSON), ok("\"ami-1\""));
    assert_eq!(get(endpoint, "/latest/meta-data/numbers", JSON), ok("[1,2]"));
    assert_eq!(get(endpoint, "/latest/meta-data/numbers/1", JSON), ok("2"));
    assert_eq!(get(endpoint, "/latest/meta-data/numbers", "").0, "501 Not Implemented");
    assert_eq!(get(endpoint, "/latest/none", JSON).0, "404 Not Found");
    assert_eq!(ask(endpoint, "POST", "/latest", "").0, "405 Method Not Allowed");
    let compatible = &mut endpoint_of(&spec(MmdsVersion::V1, true), json!({ "a": { "b": "c" } }));
    assert_eq!(get(compatible, "/a", JSON), ok("b"));
}

#[test]
fn version_2_takes_a_token_that_is_asked_for_in_the_right_way_and_is_good_for_its_time() {
    let endpoint = &mut endpoint(MmdsVersion::V2);
    let refused = |answer: (String, String)| assert_eq!(answer.0, "401 Unauthorized");
    refused(get(endpoint, "/latest", ""));
    refused(get(endpoint, "/latest", "X-metadata-token: abc\r\n"));
    for fields in [
        "",
        "X-metadata-token-ttl-seconds: 0\r\n",
        "X-metadata-token-ttl-seconds: 21601\r\n",
        "X-metadata-token-ttl-seconds: soon\r\n",
        "X-metadata-token-ttl-seconds: 60\r\nX-FORWARDED-FOR: 10.0.0.1\r\n",
    ] {
        let answer = ask(endpoint, "PUT", "/latest/api/token", fields);
        assert_eq!(answer.0, "400 Bad Request", "{fields}");
    }
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n";
    assert_eq!(ask(endpoint, "PUT", "/latest/token", ttl).0, "404 Not Found");
    let (status, token) = ask(endpoint, "PUT", "/latest/api/token", ttl);
    assert_eq!(status, "200 OK");
    for name in ["X-metadata-token", "x-aws-ec2-metadata-token"] {
        let field = format!("{name}: {token}\r\n");
        assert_eq!(get(endpoint, "/latest/meta-data/ami-id", &field), ok("ami-1"));
    }
    let asked = format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}\r\n");
    let answer = Client::new().request(endpoint, &asked);
    assert!(answer.contains(ttl), "EC2's clients want to be told: {answer}");
    // Version 1 knows tokens too, and asks for none.
    let first = &mut self::endpoint(MmdsVersion::V1);
    assert_eq!(ask(first, "PUT", "/latest/api/token", ttl).0, "200 OK");
    assert_eq!(
        get(
            first,
            "/latest/meta-data/ami-id",
            &format!("X-metadata-token: {token}\r\n")
        ),
        ok("ami-1")
    );
}

#[test]
fn an_answer_larger_than_every_buffer_arrives_whole_and_a_request_may_come_byte_by_byte() {
    let text: String = (0..100_000)
        .map(|index| char::from(b'a' + u8::try_from(index % 23).unwrap()))
        .collect();
    let endpoint = &mut endpoint_of(&spec(MmdsVersion::V1, false), json!({ "text": text }));
    assert_eq!(get(endpoint, "/text", ""), ok(&text));
    let answer = Client::new().send_in_pieces(endpoint, "GET / HTTP/1.1\r\n\r\n", 1);
    assert!(answer.ends_with("\r\n\r\ntext"), "{answer}");
    let endless = format!("GET / HTTP/1.1\r\n{}", "a: b\r\n".repeat(2000));
    let answer = Client::new().send_in_pieces(endpoint, &endless, 1000);
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(endpoint.connections(), 0);
}

#[test]
fn there_are_so_many_connections_at_a_time_and_none_outlives_its_time() {
    let endpoint = &mut endpoint(MmdsVersion::V1);
    let client = &mut Client::new();
    let handles: Vec<_> = (0..40).map(|_| client.connect()).collect();
    client.exchange(endpoint);
    let open = handles
        .iter()
        .filter(|handle| client.sockets.get::<tcp::Socket<'_>>(**handle).may_send());
    assert_eq!((open.count(), endpoint.connections()), (30, 30));
    endpoint.let_pass(time::Duration::from_secs(30));
    endpoint.go_on();
    client.exchange(endpoint);
    let open = handles
        .iter()
        .filter(|handle| client.sockets.get::<tcp::Socket<'_>>(**handle).is_open());
    assert_eq!((open.count(), endpoint.connections()), (0, 0));
    assert_eq!(get(endpoint, "/", ""), ok("latest/"));
}

#[test]
fn a_guest_that_goes_on_from_a_snapshot_is_found_again() {
    let client = &mut Client::new();
    assert!(
        client
            .request(&mut endpoint(MmdsVersion::V1), "GET / HTTP/1.1\r\n\r\n")
            .ends_with("latest/")
    );
    let open = client.connect();
    client.exchange(&mut endpoint(MmdsVersion::V1));
    // It does not ask again for the address of the service, which has to ask for that of the guest.
    let elsewhere = &mut endpoint(MmdsVersion::V1);
    assert!(client.request(elsewhere, "GET / HTTP/1.1\r\n\r\n").ends_with("latest/"));
    client.socket(open).send_slice(b"G").unwrap();
    client.exchange(elsewhere);
    assert!(
        !client.socket(open).is_open(),
        "a connection to another process is reset"
    );
}

#[test]
fn frames_for_others_are_not_claimed() {
    let endpoint = endpoint(MmdsVersion::V1);
    let frame = |ethertype: [u8; 2], at: usize, address: [u8; 4]| {
        let mut frame = [0; CLAIM_LEN];
        frame[12..14].copy_from_slice(&ethertype);
        frame[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
        frame[at..at + 4].copy_from_slice(&address);
        frame
    };
    let ours = [169, 254, 169, 254];
    assert!(endpoint.claims(&frame([8, 0], 30, ours)));
    assert!(endpoint.claims(&frame([8, 6], 38, ours)));
    assert!(!endpoint.claims(&frame([8, 0], 30, [169, 254, 169, 253])));
    assert!(!endpoint.claims(&frame([8, 0], 26, ours)), "from it, not to it");
    assert!(!endpoint.claims(&frame([8, 6], 28, ours)), "the sender");
    assert!(!endpoint.claims(&frame([0x86, 0xdd], 38, ours)));
    assert!(!endpoint.claims(&frame([0x81, 0], 30, ours)));
}
