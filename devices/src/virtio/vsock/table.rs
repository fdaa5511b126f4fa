//! All connections of the device, and what waits for the guest.
//!
//! Everything is bounded. There are at most [`CONNECTIONS_MAX`] connections and clients. Packets that belong to no
//! connection wait in `replies`; from [`REPLIES_MAX`] of them on nothing new begins until the guest has taken some: its own
//! packets stay in its queue, and clients are turned away. Of connections only their places in `waiting` are kept.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Fate, SendError};
use super::credit::BUFFER;
use super::host::{self, Host, Wish};
use super::packet::{HEADER_LEN, Header, Operation, Ports};
use crate::stats::VsockCounters;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::queue::QueueError;

/// Most connections, and clients that have not said yet what they want.
pub const CONNECTIONS_MAX: usize = 512;
/// Most packets that wait for the guest before nothing new begins; each connection may add one.
pub const REPLIES_MAX: usize = 256;
/// Ports that clients of the host have in the guest's eyes begin here, far from those that programs choose.
const CLIENT_PORT_FIRST: u32 = 1 << 30;
const CLIENT_PORT_LAST: u32 = (1 << 31) - 1;

/// See the module.
pub struct Table {
    cid: u64,
    /// Added to a slot's index to make the data of its events.
    events_from: u32,
    slots: Vec<Option<Slot>>,
    by_ports: HashMap<Ports, usize>,
    /// Slots of connections that may have something for the guest, each once.
    waiting: VecDeque<usize>,
    replies: VecDeque<Header>,
    next_client_port: u32,
    counters: Arc<VsockCounters>,
}

/// What a socket belongs to.
enum Slot {
    /// A client that has not said yet which port it wants.
    Client(OwnedFd),
    Connection(Connection),
}

impl AsRawFd for Slot {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Client(socket) => socket.as_raw_fd(),
            Self::Connection(connection) => connection.as_raw_fd(),
        }
    }
}

impl Table {
    /// No connections yet, of the guest at address `cid`. Events of sockets will have `events_from` and more as their data.
    pub fn new(cid: u64, events_from: u32, counters: Arc<VsockCounters>) -> Self {
        Self {
            cid,
            events_from,
            slots: Vec::new(),
            by_ports: HashMap::new(),
            waiting: VecDeque::new(),
            replies: VecDeque::new(),
            next_client_port: CLIENT_PORT_FIRST,
            counters,
        }
    }

    /// Whether something new may begin.
    pub fn has_room(&self) -> bool {
        self.replies.len() < REPLIES_MAX
    }

    /// Whether there is something for the guest, or may be.
    pub fn has_something(&self) -> bool {
        !self.replies.is_empty() || !self.waiting.is_empty()
    }

    /// Forgets everything: the guest's driver knows of nothing any more. The sockets are not on an event loop.
    pub fn clear(&mut self) {
        let open = self.slots.drain(..).flatten().filter(is_open).count();
        self.counters.closed.add(open as u64);
        self.by_ports.clear();
        self.waiting.clear();
        self.replies.clear();
    }

    /// Has the event loop report every socket.
    pub fn watch(&mut self, ops: &mut EventOps) {
        for index in 0..self.slots.len() {
            if let Some(slot) = &self.slots[index]
                && !self.watch_socket(slot, index, ops)
            {
                self.remove(index, None);
            }
        }
    }

    /// Has the event loop report no socket any more.
    pub fn ignore(&mut self, ops: &mut EventOps) {
        for slot in self.slots.iter().flatten() {
            ignore(slot, ops);
        }
    }

    /// Takes in a client of the host, or turns it away.
    pub fn admit(&mut self, client: OwnedFd, ops: &mut EventOps) {
        if !self.has_room() || self.insert(Slot::Client(client), ops).is_none() {
            self.counters.refused.add(1);
        }
    }

    /// The event loop has reported the socket whose events have this `data`.
    pub fn report(&mut self, data: u32, events: EventSet, ops: &mut EventOps) {
        let index = usize::try_from(data - self.events_from).expect("u32 fits usize on x86-64");
        let fate = match self.slots.get_mut(index) {
            // It was removed by an event before this one.
            Some(None) | None => return,
            Some(Some(Slot::Connection(connection))) => connection.report(events),
            Some(Some(Slot::Client(socket))) => {
                match host::wish(socket) {
                    Wish::Unknown => {}
                    Wish::Port(port) if self.has_room() => self.ask(index, port),
                    Wish::Port(_) | Wish::Nonsense => {
                        self.counters.refused.add(1);
                        self.remove(index, Some(ops));
                    }
                }
                return;
            }
        };
        self.settle(index, fate, true, ops);
    }

    /// Takes in the packet of the guest's that begins with `header`, with `data` behind it. Connections that it asks for go
    /// to `host`.
    ///
    /// # Errors
    /// Guest memory that was there before is not there now.
    pub fn receive(
        &mut self,
        header: &Header,
        data: &mut GuestBuffers,
        host: &Host,
        ops: &mut EventOps,
    ) -> Result<(), QueueError> {
        self.counters.tx_packets.add(1);
        let operation = header.operation(self.cid);
        let index = self.by_ports.get(&header.ports()).copied();
        match (operation, index) {
            (Some(Operation::Request), None) => self.accept(header, host, ops),
            (Some(operation), Some(index)) => {
                let Some(Some(Slot::Connection(connection))) = self.slots.get_mut(index) else {
                    unreachable!("ports are those of connections");
                };
                if operation == Operation::Data {
                    self.counters.tx_bytes.add(data.len() as u64);
                }
                let was_asked = connection.is_asked();
                let fate = connection.receive(operation, header, data)?;
                if was_asked && !connection.is_asked() {
                    self.counters.opened.add(1);
                }
                self.settle(index, fate, operation != Operation::Reset, ops);
            }
            // Resets are never answered, of whatever they are: two ends that did would not stop.
            _ if header.operation == Operation::Reset.number() => {}
            _ => self.refuse(header),
        }
        Ok(())
    }

    /// Puts the next packet for the guest into `buffers`, which have room for a header at least; returns its length, or
    /// nothing if there is none.
    ///
    /// # Errors
    /// Guest memory that was there before is not there now.
    pub fn send(&mut self, buffers: &GuestBuffers, ops: &mut EventOps) -> Result<Option<usize>, QueueError> {
        loop {
            if let Some(header) = self.replies.pop_front() {
                buffers.copy_from(0, &header.bytes())?;
                self.counters.rx_packets.add(1);
                return Ok(Some(HEADER_LEN));
            }
            let Some(index) = self.waiting.pop_front() else {
                return Ok(None);
            };
            let Some(Some(Slot::Connection(connection))) = self.slots.get_mut(index) else {
                continue;
            };
            match connection.send(self.cid, buffers) {
                Ok(Some((len, data))) => {
                    // At the end of the line, so that each gets its turn.
                    self.settle(index, Fate::Lives, true, ops);
                    self.counters.rx_packets.add(1);
                    self.counters.rx_bytes.add(data as u64);
                    return Ok(Some(len));
                }
                Ok(None) => {}
                Err(SendError::Host(_)) => self.settle(index, Fate::Ends, true, ops),
                Err(SendError::Queue(error)) => return Err(error),
            }
        }
    }

    /// The client in slot `index` wants a port of the guest's: it is asked.
    fn ask(&mut self, index: usize, port: u32) {
        let ports = self.client_ports(port);
        if let Some(Slot::Client(socket)) = self.slots[index].take() {
            self.slots[index] = Some(Slot::Connection(Connection::asked(ports, socket)));
            self.by_ports.insert(ports, index);
            self.reply(ports, Operation::Request);
        }
    }

    /// Ports of a new connection to `guest`: those of the host are used in turn.
    fn client_ports(&mut self, guest: u32) -> Ports {
        // There are far more ports than connections.
        loop {
            let host = self.next_client_port;
            self.next_client_port = if host == CLIENT_PORT_LAST {
                CLIENT_PORT_FIRST
            } else {
                host + 1
            };
            let ports = Ports { guest, host };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// The guest asks for a port of the host's.
    fn accept(&mut self, request: &Header, host: &Host, ops: &mut EventOps) {
        let socket = host.connect(request.destination_port).ok();
        let connection = socket.map(|socket| Slot::Connection(Connection::accepted(request, socket)));
        let Some(index) = connection.and_then(|slot| self.insert(slot, ops)) else {
            self.counters.refused.add(1);
            self.refuse(request);
            return;
        };
        self.by_ports.insert(request.ports(), index);
        self.counters.opened.add(1);
        self.reply(request.ports(), Operation::Response);
    }

    /// Carries out what becomes of the connection in slot `index`; its guest is told of an end if it `is_to_know`.
    fn settle(&mut self, index: usize, fate: Fate, is_to_know: bool, ops: &mut EventOps) {
        let Some(Some(Slot::Connection(connection))) = self.slots.get(index) else {
            return;
        };
        let ports = connection.ports();
        if fate == Fate::Lives {
            if connection.has_something() && !self.waiting.contains(&index) {
                self.waiting.push_back(index);
            }
            return;
        }
        if self.by_ports.get(&ports) == Some(&index) {
            self.by_ports.remove(&ports);
            if is_to_know {
                self.reply(ports, Operation::Reset);
            }
        }
        if fate == Fate::Ends {
            self.remove(index, Some(ops));
        }
    }

    fn reply(&mut self, ports: Ports, operation: Operation) {
        let buffer = if operation == Operation::Reset { 0 } else { BUFFER };
        self.replies.push_back(Header {
            buffer,
            ..Header::to_guest(self.cid, ports, operation)
        });
    }

    fn refuse(&mut self, header: &Header) {
        self.replies.push_back(header.refusal());
    }

    /// Puts `slot` in a free place, and its socket on the event loop.
    fn insert(&mut self, slot: Slot, ops: &mut EventOps) -> Option<usize> {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(self.slots.len());
        if index == CONNECTIONS_MAX || !self.watch_socket(&slot, index, ops) {
            return None;
        }
        match self.slots.get_mut(index) {
            Some(place) => *place = Some(slot),
            None => self.slots.push(Some(slot)),
        }
        Some(index)
    }

    /// Drops what is in slot `index`, after taking it off the event loop if it is there.
    fn remove(&mut self, index: usize, ops: Option<&mut EventOps>) {
        let Some(slot) = self.slots[index].take() else {
            return;
        };
        if let Some(ops) = ops {
            ignore(&slot, ops);
        }
        self.waiting.retain(|&waiting| waiting != index);
        if let Slot::Connection(connection) = &slot {
            self.by_ports.retain(|_, &mut other| other != index);
            let counter = if connection.is_asked() {
                &self.counters.refused
            } else {
                &self.counters.closed
            };
            counter.add(1);
        }
    }

    /// Edge-triggered: what a socket was last found to be is remembered, so that one that waits for the guest costs nothing.
    fn watch_socket(&self, slot: &Slot, index: usize, ops: &mut EventOps) -> bool {
        let data = self.events_from + u32::try_from(index).expect("CONNECTIONS_MAX fits");
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = ops.add(Events::with_data(slot, data, events));
        if let Err(error) = &watched {
            tracing::error!(%error, "the event loop refused a vsock connection");
        }
        watched.is_ok()
    }
}

#[cfg(test)]
impl Table {
    /// Bytes of the guest's that wait for the host.
    pub fn kept(&self) -> usize {
        let slots = self.slots.iter().flatten();
        let kept = slots.map(|slot| match slot {
            Slot::Connection(connection) => connection.kept(),
            Slot::Client(_) => 0,
        });
        kept.sum()
    }
}

fn is_open(slot: &Slot) -> bool {
    matches!(slot, Slot::Connection(connection) if !connection.is_asked())
}

fn ignore(slot: &Slot, ops: &mut EventOps) {
    if let Err(error) = ops.remove(Events::empty(slot)) {
        tracing::error!(%error, "cannot take a vsock connection off the event loop");
    }
}
