//! Guests with open connections.

use std::io::{self, Read};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver as Signal, channel};
use std::thread;

use cutover_guest::stream;
use cutover_tests::{Guest, Lan, Receiver};
use serde_json::json;

/// Bytes of each stream.
const TRANSFER: u64 = 48 << 20;
const SEED: u64 = 0xa5a5;

/// Passes on what `inner` has: half of a stream, and the rest when told to. So the stream is open over whatever happens in
/// between, whoever is faster.
struct Halved<R> {
    inner: R,
    left: u64,
    go_on: Signal<()>,
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
    let listener = TcpListener::bind((lan.host(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (go_on, told) = channel();
    let from_guest = {
        managed.vm.check(&format!(
            "(tcp-stream send {address} {SEED} {TRANSFER} > /tmp/sent; touch /tmp/all-sent) >/dev/null 2>&1 &"
        ));
        let (inner, _) = listener.accept().unwrap();
        let mut inner = Halved {
            inner,
            left: TRANSFER / 2,
            go_on: told,
        };
        thread::spawn(move || stream::receive(&mut inner).expect("the guest's stream"))
    };
    let to_guest = {
        managed.vm.check(&format!(
            "(tcp-stream receive {address} > /tmp/received; touch /tmp/all-received) >/dev/null 2>&1 &"
        ));
        let (mut connection, _) = listener.accept().unwrap();
        thread::spawn(move || stream::send(&mut connection, SEED, TRANSFER).expect("the stream to the guest"))
    };

    for tap in [&taps[1], &taps[0]] {
        let receiver = Receiver::start_with(["--tap", &format!("eth0={tap}")]);
        (managed, _) = managed.move_to(receiver, &json!({}));
    }
    go_on.send(()).unwrap();
    managed
        .vm
        .check("while ! [ -e /tmp/all-sent ] || ! [ -e /tmp/all-received ]; do sleep 0.1; done");
    let received = from_guest.join().unwrap();
    assert_eq!(managed.vm.check("cat /tmp/sent"), format!("{received}\n"));
    let sent = to_guest.join().unwrap();
    assert_eq!(managed.vm.check("cat /tmp/received"), format!("{sent}\n"));
}
