//! The service at one interface: which frames are for it, and what comes back.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time;

use event_manager::EventOps;
use rustix::rand::{GetRandomFlags, getrandom};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol, IpCidr, IpProtocol, Ipv4Packet};

use super::connection::{Connection, Progress, socket};
use super::http::HEAD_MAX;
use super::service::Service;
use super::wire::Wire;
use crate::timer::Timer;
use crate::virtio::DeviceError;

/// The first bytes of a frame, as many as it takes to know whom it is for: Ethernet and ARP, or IPv4 without options.
pub const CLAIM_LEN: usize = ETHERNET_LEN + 28;
const ETHERNET_LEN: usize = 14;
/// The service's own address on each cable: Firecracker's.
const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
const PORT: u16 = 80;
/// Most connections at a time. Others are refused.
const CONNECTIONS_MAX: usize = 30;
/// Most bytes of a frame that a guest needs to send: what a connection has room for, behind the longest headers.
const FRAME_MAX: usize = ETHERNET_LEN + 60 + 60 + HEAD_MAX;
/// MTU of Ethernet, and the most that the service uses.
const MTU: u16 = 1500;
/// Shortest time for which the timer is set.
const WAIT_MIN: Duration = Duration::from_millis(10);

/// See the module.
pub struct Endpoint {
    service: Arc<Service>,
    address: Ipv4Addr,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    /// The socket for the next connection; none if there are too many.
    listener: Option<SocketHandle>,
    connections: Vec<Connection>,
    /// From which time is counted here.
    start: time::Instant,
    /// Made before the thread that sets it is confined.
    timer: Timer,
    timer_is_set: bool,
}

impl Endpoint {
    /// `service` at `address`, on a cable whose MTU is `mtu`; frames for the guest have `headroom` zeroes in front.
    ///
    /// # Errors
    /// There is no timer or no randomness to be had.
    pub fn new(
        service: Arc<Service>,
        address: Ipv4Addr,
        mtu: Option<u16>,
        headroom: usize,
    ) -> Result<Self, DeviceError> {
        let timer = Timer::new("the metadata service")?;
        let mut seed = [0; 8];
        // So few bytes come in one piece (getrandom(2)).
        getrandom(&mut seed, GetRandomFlags::empty()).map_err(DeviceError::system("make up sequence numbers"))?;
        let mut wire = Wire::new(usize::from(mtu.unwrap_or(MTU).min(MTU)) + ETHERNET_LEN, headroom);
        let mut config = Config::new(MAC.into());
        config.random_seed = u64::from_le_bytes(seed);
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Whatever address the guest has, it is at the other end of this cable.
            let pushed = addresses.push(IpCidr::new(address.into(), 0));
            pushed.expect("there is room for the first address");
        });
        let mut endpoint = Self {
            service,
            address,
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            listener: None,
            connections: Vec::new(),
            start: time::Instant::now(),
            timer,
            timer_is_set: false,
        };
        endpoint.listen();
        Ok(endpoint)
    }

    /// Whether the frame that begins with `beginning`, of [`CLAIM_LEN`] bytes, is for the service: ARP or IPv4 to its
    /// address. Both have an address of the guest's choice on the Ethernet: that of a router, for one that knows no other
    /// way.
    pub fn claims(&self, beginning: &[u8; CLAIM_LEN]) -> bool {
        let frame = EthernetFrame::new_unchecked(beginning);
        match frame.ethertype() {
            EthernetProtocol::Arp => {
                let packet = ArpPacket::new_checked(frame.payload());
                let is_ipv4 = |packet: &ArpPacket<_>| packet.protocol_len() == 4 && packet.hardware_len() == 6;
                packet.is_ok_and(|packet| is_ipv4(&packet) && packet.target_protocol_addr() == self.address.octets())
            }
            EthernetProtocol::Ipv4 => Ipv4Packet::new_unchecked(frame.payload()).dst_addr() == self.address,
            _ => false,
        }
    }

    /// Takes a frame of the guest that is for the service, of any length. What comes of it is among the [next
    /// frames](Self::next_frame).
    pub fn take(&mut self, mut frame: Vec<u8>) {
        self.service.counters().rx_frames.add(1);
        if !is_understood(&frame) {
            self.service.counters().rx_dropped.add(1);
            return;
        }
        let mut ethernet = EthernetFrame::new_unchecked(&mut frame);
        ethernet.set_dst_addr(MAC);
        if !self.wire.bring(frame) {
            self.service.counters().rx_dropped.add(1);
        }
        self.go_on();
    }

    /// The next frame for the guest.
    pub fn next_frame(&mut self) -> Option<Vec<u8>> {
        if !self.wire.has_next() && self.wire.take_was_full() {
            self.go_on();
        }
        let frame = self.wire.next()?;
        self.service.counters().tx_frames.add(1);
        Some(frame)
    }

    /// Whether there is a frame for the guest.
    pub fn has_next(&self) -> bool {
        self.wire.has_next()
    }

    /// Does what is due: the timer rang, or something came.
    pub fn go_on(&mut self) {
        let now = self.now();
        // Ends: each turn but the last takes a request, sends a part of its answer or ends a connection, and answers have
        // an end.
        loop {
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            if !self.serve(now) {
                break;
            }
        }
        self.set_timer(now);
    }

    /// Has the event loop report the timer with `data`.
    pub fn watch(&self, ops: &mut EventOps, data: u32) -> Result<(), event_manager::Error> {
        self.timer.watch(ops, data)
    }

    /// Has the event loop report the timer no more.
    pub fn ignore(&self, ops: &mut EventOps) {
        self.timer.ignore(ops);
    }

    /// Number of connections.
    #[cfg(test)]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Has all that happens from now on happen `later`.
    #[cfg(test)]
    pub fn let_pass(&mut self, later: time::Duration) {
        self.start -= later;
    }

    fn now(&self) -> Instant {
        let micros = i64::try_from(self.start.elapsed().as_micros());
        Instant::from_micros(micros.unwrap_or(i64::MAX))
    }

    /// Lets each connection go on; whether that leaves something to be done.
    fn serve(&mut self, now: Instant) -> bool {
        let mut goes_on = self.accept(now);
        self.connections.retain_mut(|connection| {
            let socket = self.sockets.get_mut(connection.handle);
            let progress = connection.serve(socket, &self.service, now);
            goes_on |= progress != Progress::None;
            if progress == Progress::Over {
                self.sockets.remove(connection.handle);
                self.service.counters().closed.add(1);
            }
            progress != Progress::Over
        });
        self.listen();
        goes_on
    }

    /// Whether somebody has asked for a connection.
    fn accept(&mut self, now: Instant) -> bool {
        let Some(handle) = self.listener else {
            return false;
        };
        if self.sockets.get::<Socket<'_>>(handle).state() == State::Listen {
            return false;
        }
        self.listener = None;
        self.connections.push(Connection::new(handle, now));
        self.service.counters().opened.add(1);
        true
    }

    /// Has a socket wait for the next connection, if there may be one more.
    fn listen(&mut self) {
        if self.listener.is_some() || self.connections.len() == CONNECTIONS_MAX {
            return;
        }
        let mut socket = socket();
        socket.listen(PORT).expect("a new socket can listen at any port but 0");
        self.listener = Some(self.sockets.add(socket));
    }

    fn set_timer(&mut self, now: Instant) {
        let deadlines = self.connections.iter().map(|connection| connection.deadline);
        let next = deadlines.chain(self.interface.poll_at(now, &self.sockets)).min();
        let set = match next {
            Some(next) if next > now => self.timer.set((next - now).max(WAIT_MIN).into()),
            Some(_) => self.timer.set(WAIT_MIN.into()),
            None if self.timer_is_set => self.timer.clear(),
            None => return,
        };
        self.timer_is_set = next.is_some();
        if let Err(error) = set {
            tracing::error!(%error, "cannot set the timer of the metadata service; what is lost stays lost");
        }
    }
}

/// Whether `frame` is nothing that the service has no use for: neither longer than a guest needs nor of another protocol
/// than TCP.
fn is_understood(frame: &[u8]) -> bool {
    if !(CLAIM_LEN..=FRAME_MAX).contains(&frame.len()) {
        return false;
    }
    let frame = EthernetFrame::new_unchecked(frame);
    match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            Ipv4Packet::new_checked(frame.payload()).is_ok_and(|packet| packet.next_header() == IpProtocol::Tcp)
        }
        _ => true,
    }
}
