//! One connection: a Unix socket of the host at one end, a port of the guest's at the other.
//!
//! ```text
//!  a client of the host ─► Asked ──── the guest agrees ────► Open ── the guest closes ─► Draining ─► over
//!  the guest's request, if the host has a listener ────────►  │      what it sent is not all taken yet
//!                            │                                │
//!                            └── reset by either end ─────────┴──────────────────────────────────► over
//! ```
//! What the host sends goes from its socket straight into the guest's buffers, as far as the guest has room: the rest stays
//! in the socket. What the guest sends goes straight into the socket; what that does not take is kept, at most
//! [`BUFFER`] bytes of it, which is what the guest is told there is room for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use vmm_sys_util::epoll::EventSet;

use super::credit::{BUFFER, Credit};
use super::packet::{HEADER_LEN, Header, Operation, Ports, RECEIVES_NO_MORE, SENDS_NO_MORE, SHUT_DOWN};
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::queue::QueueError;

/// See the module.
pub struct Connection {
    ports: Ports,
    socket: OwnedFd,
    phase: Phase,
    credit: Credit,
    /// What the guest sent and the socket has not taken.
    unsent: Vec<u8>,
    /// Whether the socket has not been found empty since the event loop last reported it.
    is_readable: bool,
    /// What the guest does no more: flags of [`Operation::Shutdown`].
    guest_shut: u32,
    /// What the host does no more.
    host_shut: u32,
    /// What the guest was told of that.
    told_shut: u32,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has been asked for it.
    Asked,
    /// Data goes both ways.
    Open,
    /// The guest has closed it and knows it no more.
    Draining,
}

/// What becomes of a connection after something has happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    /// It goes on.
    Lives,
    /// It is over for the guest, but not all that the guest sent has been taken.
    Drains,
    /// It is over.
    Ends,
}

/// A packet for the guest, all but its addresses.
struct Content {
    operation: Operation,
    flags: u32,
    len: usize,
}

impl Content {
    fn bare(operation: Operation) -> Self {
        Self {
            operation,
            flags: 0,
            len: 0,
        }
    }
}

impl Connection {
    /// A connection for which the guest has been asked, by the client behind `socket`.
    pub fn asked(ports: Ports, socket: OwnedFd) -> Self {
        Self {
            ports,
            socket,
            phase: Phase::Asked,
            credit: Credit::new(),
            unsent: Vec::new(),
            is_readable: true,
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
        }
    }

    /// A connection to `socket` that the guest has asked for with `request`.
    pub fn accepted(request: &Header, socket: OwnedFd) -> Self {
        let mut connection = Self::asked(request.ports(), socket);
        connection.phase = Phase::Open;
        connection.credit.learn(request.buffer, request.forwarded);
        connection
    }

    /// Its two ends.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether the guest has not agreed to it yet.
    pub fn is_asked(&self) -> bool {
        self.phase == Phase::Asked
    }

    /// Takes in a packet of the guest's, with `data` behind its header.
    ///
    /// # Errors
    /// Guest memory that was there before is not there now.
    pub fn receive(
        &mut self,
        operation: Operation,
        header: &Header,
        data: &mut GuestBuffers,
    ) -> Result<Fate, QueueError> {
        self.credit.learn(header.buffer, header.forwarded);
        Ok(match (self.phase, operation) {
            (_, Operation::Reset) => self.forget(),
            (Phase::Asked, Operation::Response) => self.open(),
            (Phase::Open, Operation::Data) => self.take(header.len, data)?,
            (Phase::Open, Operation::Shutdown) => self.shut(header.flags),
            (Phase::Open, Operation::CreditUpdate) => Fate::Lives,
            (Phase::Open, Operation::CreditRequest) => {
                self.credit.ask();
                Fate::Lives
            }
            _ => Fate::Ends,
        })
    }

    /// The event loop has reported its socket.
    pub fn report(&mut self, events: EventSet) -> Fate {
        self.is_readable = true;
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            if self.phase == Phase::Asked {
                return Fate::Ends;
            }
            self.host_shut |= RECEIVES_NO_MORE;
        }
        self.flush()
    }

    /// Whether there is something for the guest, or may be.
    pub fn has_something(&self) -> bool {
        let data = self.may_have_data() && (self.credit.room() > 0 || self.credit.request_is_due());
        self.phase == Phase::Open && (data || self.untold() != 0 || self.credit.update_is_due())
    }

    /// Puts the next packet for the guest at address `cid` into `buffers`, which have room for a header at least; returns
    /// the packet's length and that of its data, or nothing if there is none.
    ///
    /// # Errors
    /// The host's end failed; or guest memory that was there before is not there now.
    pub fn send(&mut self, cid: u64, buffers: &GuestBuffers) -> Result<Option<(usize, usize)>, SendError> {
        let Some(content) = self.next_content(buffers)? else {
            return Ok(None);
        };
        let data = u32::try_from(content.len).expect("no more than there was room for");
        let (buffer, forwarded) = self.credit.tell();
        let header = Header {
            len: data,
            flags: content.flags,
            buffer,
            forwarded,
            ..Header::to_guest(cid, self.ports, content.operation)
        };
        buffers.copy_from(0, &header.bytes()).map_err(QueueError::from)?;
        Ok(Some((HEADER_LEN + content.len, content.len)))
    }

    /// What the guest is to be told next. Data is in its place in `buffers`.
    fn next_content(&mut self, buffers: &GuestBuffers) -> io::Result<Option<Content>> {
        if self.phase != Phase::Open {
            return Ok(None);
        }
        if let Some(content) = self.read(buffers)? {
            return Ok(Some(content));
        }
        if self.untold() != 0 {
            self.told_shut = self.host_shut;
            return Ok(Some(Content {
                flags: self.host_shut,
                ..Content::bare(Operation::Shutdown)
            }));
        }
        if self.credit.update_is_due() {
            return Ok(Some(Content::bare(Operation::CreditUpdate)));
        }
        if self.may_have_data() && self.credit.request_is_due() {
            self.credit.request();
            return Ok(Some(Content::bare(Operation::CreditRequest)));
        }
        Ok(None)
    }

    /// Reads from the socket into `buffers`, behind the place of the header.
    fn read(&mut self, buffers: &GuestBuffers) -> io::Result<Option<Content>> {
        let room = usize::try_from(self.credit.room()).expect("u32 fits usize on x86-64");
        let most = room.min(buffers.len() - HEADER_LEN);
        if !self.may_have_data() || most == 0 {
            return Ok(None);
        }
        match buffers.read_part_from(self.socket.as_fd(), HEADER_LEN, most) {
            Ok(0) => self.host_shut |= SENDS_NO_MORE,
            Ok(len) => {
                self.credit
                    .send(u32::try_from(len).expect("no more than there was room for"));
                return Ok(Some(Content {
                    len,
                    ..Content::bare(Operation::Data)
                }));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.is_readable = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(None)
    }

    /// Whether the guest could be given something the host has sent.
    fn may_have_data(&self) -> bool {
        self.is_readable && self.guest_shut & RECEIVES_NO_MORE == 0 && self.host_shut & SENDS_NO_MORE == 0
    }

    /// What the guest does not know yet of what the host does no more.
    fn untold(&self) -> u32 {
        self.host_shut & !self.told_shut
    }

    /// The guest agrees: its client is told.
    fn open(&mut self) -> Fate {
        let answer = format!("OK {}\n", self.ports.host);
        // There is room for so little in a socket to which nothing has been written, or it is no use.
        match rustix::io::write(&self.socket, answer.as_bytes()) {
            Ok(written) if written == answer.len() => {
                self.phase = Phase::Open;
                Fate::Lives
            }
            _ => Fate::Ends,
        }
    }

    /// The guest knows it no more. What it sent before it said that it would send no more is still delivered.
    fn forget(&mut self) -> Fate {
        if self.guest_shut & SENDS_NO_MORE != 0 && !self.unsent.is_empty() {
            self.phase = Phase::Draining;
            return Fate::Drains;
        }
        Fate::Ends
    }

    /// The guest does no more what `flags` say.
    fn shut(&mut self, flags: u32) -> Fate {
        self.guest_shut |= flags & SHUT_DOWN;
        if self.guest_shut == SHUT_DOWN {
            return self.forget();
        }
        if self.guest_shut & RECEIVES_NO_MORE != 0 {
            self.shut_socket(Shutdown::Read);
        }
        if self.guest_shut & SENDS_NO_MORE != 0 && self.unsent.is_empty() {
            self.shut_socket(Shutdown::Write);
        }
        Fate::Lives
    }

    fn shut_socket(&self, how: Shutdown) {
        // The host's end may be gone already, of which the event loop tells.
        let _ = shutdown(&self.socket, how);
    }

    /// Gives the host `len` bytes of `data`.
    fn take(&mut self, len: u32, data: &mut GuestBuffers) -> Result<Fate, QueueError> {
        let size = usize::try_from(len).expect("u32 fits usize on x86-64");
        let buffer = usize::try_from(BUFFER).expect("u32 fits usize on x86-64");
        let is_allowed = self.guest_shut & SENDS_NO_MORE == 0 && self.unsent.len().saturating_add(size) <= buffer;
        if !is_allowed || data.len() < size {
            return Ok(Fate::Ends);
        }
        if self.host_shut & RECEIVES_NO_MORE != 0 {
            self.credit.forward(len);
            return Ok(Fate::Lives);
        }
        // Of what waits already nothing may be overtaken. What fails here fails again below.
        let written = match self.unsent.is_empty() {
            true => data.write_part_to(self.socket.as_fd(), size).unwrap_or(0),
            false => 0,
        };
        self.credit
            .forward(u32::try_from(written).expect("no more than there was"));
        if written == size {
            return Ok(Fate::Lives);
        }
        data.advance(written);
        let start = self.unsent.len();
        self.unsent.resize(start + size - written, 0);
        data.copy_to(&mut self.unsent[start..])?;
        Ok(self.flush())
    }

    /// Gives the host what it takes of what has been kept.
    fn flush(&mut self) -> Fate {
        if self.unsent.is_empty() {
            return Fate::Lives;
        }
        let mut done = 0;
        // Each round takes something, or is the last but for signals.
        while done < self.unsent.len() && self.host_shut & RECEIVES_NO_MORE == 0 {
            match rustix::io::write(&self.socket, &self.unsent[done..]) {
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.host_shut |= RECEIVES_NO_MORE,
            }
        }
        if self.host_shut & RECEIVES_NO_MORE != 0 {
            done = self.unsent.len();
        }
        self.credit.forward(u32::try_from(done).expect("no more than is kept"));
        self.unsent.drain(..done);
        if !self.unsent.is_empty() {
            return Fate::Lives;
        }
        // So that connections without a backlog take no memory.
        self.unsent = Vec::new();
        if self.phase == Phase::Draining {
            return Fate::Ends;
        }
        if self.guest_shut & SENDS_NO_MORE != 0 {
            self.shut_socket(Shutdown::Write);
        }
        Fate::Lives
    }
}

#[cfg(test)]
impl Connection {
    /// Bytes of the guest's that wait for the host.
    pub fn kept(&self) -> usize {
        self.unsent.len()
    }
}

/// Why a packet cannot be put into the guest's buffers.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The host's end failed.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// The guest's did.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
