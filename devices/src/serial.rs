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
//! the loop.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::console::{Command, Console, HELP, Input, Output};
use crate::guest_event::{GuestEvent, GuestEventSink};

/// Ports of a 16550.
pub const PORTS: u16 = 8;

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// A serial port. It belongs on the port bus and, at the same time, on the event loop.
pub struct SerialPort {
    uart: Serial<Interrupt, NoEvents, Output>,
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
        let uart = Serial::new(Interrupt(interrupt), output);
        Self {
            fifo_size: uart.fifo_capacity(),
            uart,
            input,
            input_always_ready: false,
            wake,
            events,
            clients: Watch::for_events(EventSet::IN),
            readable: Watch::for_events(EventSet::IN),
            writable: Watch::for_events(EventSet::OUT),
        }
    }

    /// Whether the event loop must look at the port again, after the guest used it.
    fn needs_the_loop(&self) -> bool {
        let output = self.uart.writer();
        let room_again = self.readable.is_off() && self.input.stream().is_some() && self.fifo_is_empty();
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
        let room = self.uart.fifo_capacity();
        if room == 0 || self.input.stream().is_none() {
            return;
        }
        match self.input.read(room) {
            Ok((bytes, commands)) => {
                if let Err(error) = self.uart.enqueue_raw_bytes(&bytes) {
                    tracing::error!(%error, "cannot interrupt the guest for the serial port");
                }
                for command in commands {
                    self.obey(command);
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                if error.kind() != std::io::ErrorKind::UnexpectedEof {
                    tracing::warn!(%error, "the console's input has ended");
                }
                self.hang_up(ops);
            }
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
        self.readable
            .point_at(None, ops)
            .unwrap_or_else(|error| log_watch_error(&error));
        if self.input.has_client() {
            self.writable
                .point_at(None, ops)
                .unwrap_or_else(|error| log_watch_error(&error));
            *self.uart.writer_mut() = Output::default();
        }
        self.input.close();
    }

    fn welcome(&mut self) {
        match self.input.accept() {
            Ok(output) => *self.uart.writer_mut() = output,
            Err(error) => tracing::warn!(%error, "a client of the console could not be accepted"),
        }
    }

    /// Brings what the loop watches in line with what the port waits for.
    fn update_watches(&mut self, ops: &mut EventOps) {
        let input = self
            .input
            .stream()
            .filter(|_| self.uart.fifo_capacity() > 0 && !self.input_always_ready);
        match self.readable.point_at(input, ops) {
            Err(event_manager::Error::Epoll(error)) if error.errno() == Errno::PERM.raw_os_error() => {
                self.input_always_ready = true;
                self.receive(ops);
            }
            result => result.unwrap_or_else(|error| log_watch_error(&error)),
        }
        let blocked_on = self.uart.writer().blocked_on();
        for result in [
            self.writable.point_at(blocked_on, ops),
            self.clients.point_at(self.input.vacant_listener(), ops),
        ] {
            result.unwrap_or_else(|error| log_watch_error(&error));
        }
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
            log_watch_error(&error);
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
            if self.input_always_ready && self.fifo_is_empty() {
                self.receive(ops);
            }
        } else if self.clients.is_at(fd) {
            self.welcome();
        } else if self.writable.is_at(fd) {
            self.uart.writer_mut().drain();
        } else if self.readable.is_at(fd) {
            self.receive(ops);
        }
        self.update_watches(ops);
    }
}

/// A descriptor the event loop watches at times.
struct Watch {
    interest: EventSet,
    at: Option<RawFd>,
}

impl Watch {
    fn for_events(interest: EventSet) -> Self {
        Self { interest, at: None }
    }

    fn is_off(&self) -> bool {
        self.at.is_none()
    }

    fn is_at(&self, fd: RawFd) -> bool {
        self.at == Some(fd)
    }

    /// Starts afresh on a loop that watches nothing yet.
    fn forget(&mut self) {
        self.at = None;
    }

    /// Watches `fd` from now on, or nothing. A descriptor must not be closed while it is watched.
    fn point_at(&mut self, fd: Option<RawFd>, ops: &mut EventOps) -> event_manager::Result<()> {
        if self.at == fd {
            return Ok(());
        }
        if let Some(before) = self.at.take() {
            ops.remove(Events::empty_raw(before))?;
        }
        if let Some(fd) = fd {
            ops.add(Events::new_raw(fd, self.interest))?;
            self.at = Some(fd);
        }
        Ok(())
    }
}

fn log_watch_error(error: &event_manager::Error) {
    tracing::error!(%error, "the event loop cannot watch the serial port's console");
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::mpsc::{Receiver, channel};
    use std::sync::{Arc, Mutex};

    use cutover_snapshot::spec::SerialSpec;

    use super::*;
    use crate::console::PENDING_MAX;
    use crate::event_loop::EventLoop;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;

    /// A guest's driver of the port: interrupt-driven for input, as Linux is.
    struct Guest {
        port: Arc<Mutex<SerialPort>>,
        interrupt: EventFd,
        events: Receiver<GuestEvent>,
        _event_loop: EventLoop,
    }

    impl Guest {
        fn with(console: Console) -> Self {
            let interrupt = EventFd::new(0).expect("an event descriptor");
            let raised = interrupt.try_clone().expect("the same one");
            let (sender, events) = channel();
            let sender = Mutex::new(sender);
            let sink: GuestEventSink = Arc::new(move |event| {
                sender.lock().unwrap().send(event).expect("the test listens");
            });
            let port = Arc::new(Mutex::new(SerialPort::new(raised, console, sink)));
            let event_loop = EventLoop::spawn("test", || {}).expect("a loop");
            event_loop.handle().add(port.clone()).expect("the loop runs");
            let guest = Self {
                port,
                interrupt,
                events,
                _event_loop: event_loop,
            };
            guest.port.lock().unwrap().write(INTERRUPT_ENABLE, &[1]);
            guest
        }

        fn on_socket(path: &Path) -> Self {
            Self::with(Console::open(&SerialSpec::Socket(path.to_owned())).expect("free path"))
        }

        fn print(&self, text: &[u8]) {
            for byte in text {
                self.port.lock().unwrap().write(DATA, &[*byte]);
            }
        }

        /// Reads `count` bytes, waiting for the interrupt whenever there are none.
        fn read(&self, count: usize) -> Vec<u8> {
            let mut bytes = Vec::new();
            while bytes.len() < count {
                let mut status = [0];
                self.port.lock().unwrap().read(LINE_STATUS, &mut status);
                if status[0] & DATA_READY == 0 {
                    self.interrupt.read().expect("an interrupt");
                    continue;
                }
                let mut byte = [0];
                self.port.lock().unwrap().read(DATA, &mut byte);
                bytes.push(byte[0]);
            }
            bytes
        }
    }

    /// Reads what a client gets until it has `count` bytes.
    fn seen(client: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        client.read_exact(&mut bytes).expect("bytes are there");
        bytes
    }

    #[test]
    fn a_client_of_the_socket_talks_with_the_guest() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console");
        let guest = Guest::on_socket(&path);
        guest.print(b"nobody hears this");
        let mut client = UnixStream::connect(&path).expect("the port listens");
        client.write_all(b"root\r").expect("room");
        assert_eq!(guest.read(5), b"root\r");
        guest.print(b"# ");
        assert_eq!(seen(&mut client, 2), b"# ");
    }

    #[test]
    fn the_next_client_is_served_when_one_leaves_and_gets_nothing_of_its_output() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console");
        let guest = Guest::on_socket(&path);
        let mut first = UnixStream::connect(&path).expect("the port listens");
        let mut second = UnixStream::connect(&path).expect("the port listens");
        first.write_all(b"1").expect("room");
        second.write_all(b"2").expect("room");
        assert_eq!(guest.read(1), b"1");
        guest.print(b"for the first");
        assert_eq!(seen(&mut first, 13), b"for the first");
        drop(first);
        assert_eq!(guest.read(1), b"2");
        guest.print(b"for the second");
        assert_eq!(seen(&mut second, 14), b"for the second");
    }

    #[test]
    fn a_client_that_left_unread_input_behind_makes_way_when_the_guest_prints() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("console");
        let guest = Guest::on_socket(&path);
        let mut first = UnixStream::connect(&path).expect("the port listens");
        first.write_all(&[b'x'; 1000]).expect("room");
        assert_eq!(guest.read(1), b"x");
        drop(first);
        let mut second = UnixStream::connect(&path).expect("the port listens");
        let reading = std::thread::spawn(move || seen(&mut second, 1));
        while !reading.is_finished() {
            guest.print(b".");
            std::thread::yield_now();
        }
        assert_eq!(reading.join().expect("no panic"), b".");
    }

    #[test]
    fn input_far_beyond_the_fifo_arrives_complete_and_in_order() {
        let (ours, mut theirs) = UnixStream::pair().expect("socket pair");
        let output = File::options().write(true).open("/dev/null").expect("Linux has it");
        let guest = Guest::with(Console::of(ours.into(), false, output.into()));
        let sent: Vec<u8> = (0..=250).cycle().take(10_000).collect();
        theirs.write_all(&sent).expect("a socket holds this much");
        assert_eq!(guest.read(sent.len()), sent);
    }

    #[test]
    fn a_file_as_input_reaches_the_guest_though_it_cannot_be_polled() {
        let mut file = tempfile::tempfile().expect("temporary file");
        let sent: Vec<u8> = (0..=250).cycle().take(1000).collect();
        file.write_all(&sent).expect("room");
        file.rewind().expect("a file");
        let (ours, mut theirs) = UnixStream::pair().expect("socket pair");
        let guest = Guest::with(Console::of(file.into(), false, ours.into()));
        assert_eq!(guest.read(sent.len()), sent);
        guest.print(b"still here");
        assert_eq!(seen(&mut theirs, 10), b"still here");
    }

    #[test]
    fn the_guest_lives_on_after_the_end_of_its_input() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let (output, mut reader) = UnixStream::pair().expect("socket pair");
        let guest = Guest::with(Console::of(ours.into(), false, output.into()));
        drop(theirs);
        guest.print(b"alive");
        assert_eq!(seen(&mut reader, 5), b"alive");
    }

    #[test]
    fn escapes_count_at_a_terminal_only() {
        for typed in [true, false] {
            let (ours, mut theirs) = UnixStream::pair().expect("socket pair");
            let (output, mut reader) = UnixStream::pair().expect("socket pair");
            let guest = Guest::with(Console::of(ours.into(), typed, output.into()));
            theirs.write_all(b"\x01ha\x01xb").expect("room");
            if typed {
                assert_eq!(guest.events.recv(), Ok(GuestEvent::ConsoleQuit));
                assert_eq!(guest.read(2), b"ab");
                assert_eq!(seen(&mut reader, HELP.len()), HELP.as_bytes());
            } else {
                assert_eq!(guest.read(6), b"\x01ha\x01xb");
                assert!(guest.events.try_recv().is_err());
            }
        }
    }

    #[test]
    fn output_a_slow_reader_leaves_waiting_is_sent_by_the_event_loop() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        ours.set_nonblocking(true).expect("a socket can be non-blocking");
        let input = File::open("/dev/null").expect("Linux has it");
        let guest = Guest::with(Console::of(input.into(), false, ours.into()));
        let sent: Vec<u8> = (0..=250).cycle().take(PENDING_MAX).collect();
        guest.print(&sent);
        let mut theirs = theirs;
        assert_eq!(seen(&mut theirs, sent.len()), sent);
    }

    #[test]
    fn accesses_beyond_the_registers_do_nothing() {
        let (input, output) = UnixStream::pair().expect("socket pair");
        let guest = Guest::with(Console::of(input.into(), false, output.into()));
        let mut data = [7; 2];
        guest.port.lock().unwrap().read(0x1_0000, &mut data);
        assert_eq!(data, [7; 2]);
        guest.port.lock().unwrap().write(u64::MAX, &[1]);
        guest.port.lock().unwrap().write(DATA, &[]);
    }
}
