//! Guests with open connections.

use std::io::{self, Read};
use std::net::{IpAddr, TcpListener};
use std::sync::mpsc::{self, channel};
use std::thread::{self, JoinHandle};

use cutover_guest::stream::{self, Summary};
use cutover_tests::{Guest, Lan, Receiver, Vm};
use serde_json::json;

/// Bytes of each stream.
const TRANSFER: u64 = 32 << 20;
const SEED: u64 = 0xa5a5;

/// A stream from a guest and one to it, checked at both ends, of which the former is not over before it is told to be.
pub struct Streams {
    go_on: mpsc::Sender<()>,
    from_guest: JoinHandle<Summary>,
    to_guest: JoinHandle<Summary>,
}

/// What `inner` has: half of a stream, and the rest when told to. So the stream is open over whatever happens in between,
/// whoever is faster.
struct Halved<R> {
    inner: R,
    left: u64,
    go_on: mpsc::Receiver<()>,
}

impl Streams {
    /// Begins with both, between a guest and the host at `here`.
    #[track_caller]
    pub fn begin(vm: &Vm, here: impl Into<IpAddr>) -> Self {
        let listener = TcpListener::bind((here.into(), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (go_on, told) = channel();
        vm.check(&format!(
            "(tcp-stream send {address} {SEED} {TRANSFER} > /tmp/sent; touch /tmp/all-sent) >/dev/null 2>&1 &"
        ));
        let mut from = Halved {
            inner: listener.accept().unwrap().0,
            left: TRANSFER / 2,
            go_on: told,
        };
        vm.check(&format!(
            "(tcp-stream receive {address} > /tmp/received; touch /tmp/all-received) >/dev/null 2>&1 &"
        ));
        let mut to = listener.accept().unwrap().0;
        Self {
            go_on,
            from_guest: thread::spawn(move || stream::receive(&mut from).expect("the guest's stream")),
            to_guest: thread::spawn(move || stream::send(&mut to, SEED, TRANSFER).expect("the stream to the guest")),
        }
    }

    /// Lets them come to their ends, and compares what was sent and received.
    #[track_caller]
    pub fn check_ends(self, vm: &Vm) {
        self.go_on.send(()).unwrap();
        vm.check("while ! [ -e /tmp/all-sent ] || ! [ -e /tmp/all-received ]; do sleep 0.1; done");
        let (received, sent) = (self.from_guest.join().unwrap(), self.to_guest.join().unwrap());
        assert_eq!(vm.check("cat /tmp/sent"), format!("{received}\n"));
        assert_eq!(vm.check("cat /tmp/received"), format!("{sent}\n"));
    }
}

impl<R: Read> Read for Halved<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            self.go_on.recv().map_err(io::Error::other)?;
            self.left = u64::MAX;
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let length = self.inner.read(&mut buffer[..most])?;
        self.left -= u64::try_from(length).expect("a buffer is small");
        Ok(length)
    }
}

#[test]
fn tcp_streams_in_both_directions_go_on_when_the_guest_moves_there_and_back() {
    let mut lan = Lan::new();
    let taps = [lan.add_tap(), lan.add_tap()];
    let mut managed = Guest::micro().cpus(2).boot_managed(|api| {
        api.put(
            "/network-interfaces/eth0",
            &json!({ "iface_id": "eth0", "host_dev_name": taps[0] }),
        );
    });
    managed.vm.check(&lan.guest_setup());
    managed.vm.start_page_writer(16, Some(2_000));
    let streams = Streams::begin(&managed.vm, lan.host());
    for tap in [&taps[1], &taps[0]] {
        let receiver = Receiver::start_with(["--tap", &format!("eth0={tap}")]);
        (managed, _) = managed.move_to(receiver, &json!({}));
    }
    streams.check_ends(&managed.vm);
}
