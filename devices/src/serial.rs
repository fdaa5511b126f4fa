//! COM1: a 16550 (of the vm-superio crate) between the port bus and a [`Console`].
//!
//! The vCPU's thread writes output through; everything that has to wait happens on the event loop, where the port is a
//! subscriber:
//!
//! ```text
//!  guest writes ─► uart ─► output ──(full)──► pending ── event loop, when writable ─► reader
//!  guest reads  ◄─ uart's FIFO ◄── event loop, when readable *and* the FIFO has room ◄─ input
//! ```
//!
//! Input is left where it is while the guest does not empty the FIFO (back-pressure); the read that empties it wakes
//! the loop. Only a terminal is read all the same, for the escape to work when the guest hangs.
//!
//! Output commit is not for this port: what the guest writes is seen at once, also while its VM is protected and its
//! [frames](crate::virtio::net) are held. It is a log for whoever runs the guest, and a guest that went back to a
//! checkpoint may write again what it has written, or something else. Nobody may take it for a promise.

mod state;
mod watch;

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::console::{Command, Console, HELP, Input, Output};
use crate::guest_event::{GuestEvent, GuestEventSink};
use crate::stats::SerialCounters;
use watch::Watch;

pub use state::SerialState;

/// Ports of a 16550.
pub const PORTS: u16 = 8;

struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Counts what passes the uart.
struct Traffic(Arc<SerialCounters>);

impl SerialEvents for Traffic {
    fn buffer_read(&self) {
        self.0.input_bytes.add(1);
    }

    fn out_byte(&self) {
        self.0.output_bytes.add(1);
    }

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {}
}

/// A serial port. It belongs on the port bus and, at the same time, on the event loop.
pub struct SerialPort {
    uart: Serial<Interrupt, Traffic, Output>,
    counters: Arc<SerialCounters>,
    fifo_size: usize,
    input: Input,
    /// The input cannot be polled because it never waits: a file, `/dev/null`.
    input_always_ready: bool,
    wake: EventFd,
    events: GuestEventSink,
    clients: Watch,
    readable: Watch,
    writable: Watch,
}

impl SerialPort {
    /// A port that raises `interrupt`, talks to `console` and reports the console's escape to `events`.
    pub fn new(interrupt: EventFd, console: Console, events: GuestEventSink) -> Self {
        let Console { input, output, wake } = console;
        let counters = Arc::<SerialCounters>::default();
        let uart = Serial::with_events(Interrupt(Arc::new(interrupt)), Traffic(counters.clone()), output);
        Self {
            fifo_size: uart.fifo_capacity(),
            uart,
            counters,
            input,
            input_always_ready: false,
            wake,
            events,
            clients: Watch::for_events(EventSet::IN),
            readable: Watch::for_events(EventSet::IN),
            writable: Watch::for_events(EventSet::OUT),
        }
    }

    /// What has passed.
    pub fn counters(&self) -> &Arc<SerialCounters> {
        &self.counters
    }

    /// Whether the event loop must look at the port again, after the guest used it.
    fn needs_the_loop(&self) -> bool {
        let output = self.uart.writer();
        let input_waits = self.readable.is_off() && self.input.stream().is_some() || self.input.has_typed_ahead();
        let room_again = input_waits && self.fifo_is_empty();
        let blocked = self.writable.is_off() && output.blocked_on().is_some();
        let client_gone = output.is_broken() && self.input.has_client();
        room_again || blocked || client_gone
    }

    fn fifo_is_empty(&self) -> bool {
        self.uart.fifo_capacity() == self.fifo_size
    }

    fn wake_the_loop_if_needed(&self) {
        if self.needs_the_loop()
            && let Err(error) = self.wake.write(1)
        {
            tracing::error!(%error, "cannot wake the event loop for the serial port");
        }
    }

    /// Moves what the input has, and the FIFO has room for, to the guest.
    fn receive(&mut self, ops: &mut EventOps) {
        match self.input.read(self.uart.fifo_capacity()) {
            Ok((bytes, commands)) => {
                self.enqueue(&bytes);
                for command in commands {
                    self.obey(command);
                }
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::warn!(%error, "the console's input has ended");
                }
                self.hang_up(ops);
            }
        }
    }

    /// Gives the guest bytes for which the FIFO has room.
    fn enqueue(&mut self, bytes: &[u8]) {
        if !bytes.is_empty()
            && let Err(error) = self.uart.enqueue_raw_bytes(bytes)
        {
            tracing::error!(%error, "cannot interrupt the guest for the serial port");
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Quit => (self.events)(GuestEvent::ConsoleQuit),
            Command::Help => self.uart.writer_mut().write_all(HELP.as_bytes()).unwrap_or_default(),
        }
    }

    /// Ends the input; a client's output too, for the next client not to get it.
    fn hang_up(&mut self, ops: &mut EventOps) {
        self.readable.point_at(None, ops);
        if self.input.has_client() {
            self.writable.point_at(None, ops);
            std::mem::take(self.uart.writer_mut()).abandon();
        }
        self.input.close();
    }

    fn welcome(&mut self, ops: &mut EventOps) {
        match self.input.accept() {
            Ok(output) => *self.uart.writer_mut() = output,
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                // The client still waits: to go on watching would be to try for ever.
                tracing::error!(%error, "no more clients of the console can be accepted");
                self.clients.point_at(None, ops);
                self.input.stop_listening();
            }
        }
    }

    /// Brings what the loop watches in line with what the port waits for.
    fn update_watches(&mut self, ops: &mut EventOps) {
        let wanted = self.input.is_wanted(self.uart.fifo_capacity()) && !self.input_always_ready;
        if !self.readable.point_at(self.input.stream().filter(|_| wanted), ops) {
            self.input_always_ready = true;
            self.receive(ops);
        }
        self.writable.point_at(self.uart.writer().blocked_on(), ops);
        self.clients.point_at(self.input.vacant_listener(), ops);
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Ok(register) = u8::try_from(offset) else {
            return;
        };
        for byte in data {
            *byte = self.uart.read(register);
        }
        self.wake_the_loop_if_needed();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(register) = u8::try_from(offset) else {
            return;
        };
        for &byte in data {
            if let Err(error) = self.uart.write(register, byte) {
                tracing::error!(%error, "cannot interrupt the guest for the serial port");
            }
        }
        self.wake_the_loop_if_needed();
    }
}

impl MutEventSubscriber for SerialPort {
    fn init(&mut self, ops: &mut EventOps) {
        for watch in [&mut self.clients, &mut self.readable, &mut self.writable] {
            watch.forget();
        }
        if let Err(error) = ops.add(Events::new(&self.wake, EventSet::IN)) {
            tracing::error!(%error, "the event loop cannot watch the serial port");
        }
        self.update_watches(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.wake.as_raw_fd() {
            // Only its being readable matters, not how often it was written.
            let _ = self.wake.read();
            if self.uart.writer().is_broken() && self.input.has_client() {
                self.hang_up(ops);
            }
            let ahead = self.input.take_typed_ahead(self.uart.fifo_capacity());
            self.enqueue(&ahead);
            if self.input_always_ready && self.fifo_is_empty() {
                self.receive(ops);
            }
        } else if self.clients.is_at(fd) {
            self.welcome(ops);
        } else if self.writable.is_at(fd) {
            self.uart.writer_mut().drain();
        } else if self.readable.is_at(fd) {
            self.receive(ops);
        }
        self.update_watches(ops);
    }
}

/// Whether trying again may do.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

#[cfg(test)]
mod tests;
