//! The serial port with an interrupt-driven guest on one side and real sockets and files on the other.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use cutover_snapshot::spec::SerialSpec;
use proptest::prelude::*;

use super::*;
use crate::console::PENDING_MAX;
use crate::event_loop::EventLoop;
use crate::virtio::DeviceError;

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
        let guest = Self::in_state(console, None).expect("a new port");
        guest.port.lock().unwrap().write(INTERRUPT_ENABLE, &[1]);
        guest
    }

    /// A guest whose port was saved in `state`.
    fn in_state(console: Console, state: Option<&SerialState>) -> Result<Self, DeviceError> {
        let interrupt = EventFd::new(0).expect("an event descriptor");
        let raised = interrupt.try_clone().expect("the same one");
        let (sender, events) = channel();
        let sender = Mutex::new(sender);
        let sink: GuestEventSink = Arc::new(move |event| {
            sender.lock().unwrap().send(event).expect("the test listens");
        });
        let mut port = SerialPort::new(raised, console, sink);
        if let Some(state) = state {
            port.restore(state)?;
        }
        let port = Arc::new(Mutex::new(port));
        let event_loop = EventLoop::spawn("test", || {}).expect("a loop");
        event_loop.handle().add(port.clone()).expect("the loop runs");
        Ok(Self {
            port,
            interrupt,
            events,
            _event_loop: event_loop,
        })
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
fn the_escape_works_while_the_guest_does_not_read_and_nothing_typed_before_is_lost() {
    let (ours, mut theirs) = UnixStream::pair().expect("socket pair");
    let output = File::options().write(true).open("/dev/null").expect("Linux has it");
    let guest = Guest::with(Console::of(ours.into(), true, output.into()));
    let typed = b"x".repeat(4000);
    theirs.write_all(&typed).expect("a socket holds this much");
    theirs.write_all(b"\x01x").expect("a socket holds this much");
    assert_eq!(guest.events.recv(), Ok(GuestEvent::ConsoleQuit));
    assert_eq!(guest.read(typed.len()), typed);
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

proptest! {
    #[test]
    fn no_sequence_of_accesses_harms_the_monitor(
        accesses in prop::collection::vec((any::<bool>(), 0..10_u64, prop::collection::vec(any::<u8>(), 0..9)), 0..200)
    ) {
        let console = Console::open(&SerialSpec::Null).expect("nothing to open");
        let interrupt = EventFd::new(0).expect("an event descriptor");
        let mut port = SerialPort::new(interrupt, console, Arc::new(|_| {}));
        for (write, offset, mut data) in accesses {
            if write {
                port.write(offset, &data);
            } else {
                port.read(offset, &mut data);
            }
        }
        let mut status = [0];
        port.read(LINE_STATUS, &mut status);
        prop_assert_eq!(status[0] & 0x60, 0x60, "the transmitter is always ready");
    }
}

/// A console from one end of a socket to the other.
fn connected() -> (Console, UnixStream, UnixStream) {
    let (input, typist) = UnixStream::pair().expect("socket pair");
    let (output, reader) = UnixStream::pair().expect("socket pair");
    (Console::of(input.into(), false, output.into()), typist, reader)
}

#[test]
fn a_port_goes_on_with_its_registers_and_what_the_guest_has_not_read() {
    let (console, mut typist, _reader) = connected();
    let guest = Guest::with(console);
    for (register, value) in [(3, 0x83), (0, 12), (1, 1), (3, 3), (4, 0x0b), (7, 0x5a)] {
        guest.port.lock().unwrap().write(register, &[value]);
    }
    typist.write_all(b"half").expect("room");
    assert_eq!(guest.read(1), b"h");
    while guest.port.lock().unwrap().save().received != b"alf" {
        std::thread::yield_now();
    }
    let state = guest.port.lock().unwrap().save();

    let (console, mut typist, mut reader) = connected();
    typist.write_all(b" and half").expect("room");
    let restored = Guest::in_state(console, Some(&state)).expect("a state it was in");
    assert_eq!(restored.read(12), b"alf and half");
    restored.print(b"whole");
    assert_eq!(seen(&mut reader, 5), b"whole");
    let registers = [3, 4, 7].map(|register| {
        let mut value = [0];
        restored.port.lock().unwrap().read(register, &mut value);
        value[0]
    });
    assert_eq!(registers, [3, 0x0b, 0x5a]);
    assert_eq!(guest.read(3), b"alf", "the port it was saved from goes on, too");
}

#[test]
fn the_guest_is_interrupted_again_for_what_it_has_not_seen() {
    let (console, mut typist, _reader) = connected();
    let guest = Guest::with(console);
    typist.write_all(b"x").expect("room");
    guest.interrupt.read().expect("an interrupt");
    let state = guest.port.lock().unwrap().save();
    let (console, _typist, _reader) = connected();
    let restored = Guest::in_state(console, Some(&state)).expect("a state it was in");
    restored.interrupt.read().expect("an interrupt");
    restored.port.lock().unwrap().raise_again();
    restored.interrupt.read().expect("another");
    assert_eq!(restored.read(1), b"x");
}

#[test]
fn more_input_than_the_fifo_holds_is_no_state_of_a_port() {
    let (console, mut typist, _reader) = connected();
    let guest = Guest::with(console);
    typist.write_all(&[b'x'; 64]).expect("room");
    while guest.port.lock().unwrap().save().received.len() < 64 {
        std::thread::yield_now();
    }
    let mut state = guest.port.lock().unwrap().save();
    Guest::in_state(connected().0, Some(&state)).expect("a state it was in");
    state.received.push(b'x');
    let refused = Guest::in_state(connected().0, Some(&state))
        .err()
        .expect("one byte too many");
    assert_eq!(
        refused.to_string(),
        "the saved state of the serial port cannot be restored: 65 bytes are received, there is room for 64"
    );
}
