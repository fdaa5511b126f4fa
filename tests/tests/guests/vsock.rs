//! The socket device: streams between programs of the guest and Unix sockets of the host.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cutover_guest::stream::{self, Summary};
use cutover_tests::{Exit, Guest, ManagedVm, Receiver, Shelf, Vm, scratch};
use serde_json::json;

const TRANSFER: u64 = 100 << 20;
const SMALL: u64 = 100_003;
const SEED: u64 = 0x50c7;
/// Ports of the host and of the guest at which somebody listens.
const HOST_PORT: u32 = 1000;
const GUEST_PORT: u32 = 52;

fn listener(uds: &Path) -> UnixListener {
    UnixListener::bind(format!("{}_{HOST_PORT}", uds.display())).unwrap()
}

/// Has a program of the guest wait for the host's clients.
fn serve(vm: &Vm) {
    vm.check(&format!(
        "mkfifo /tmp/up; vsock-stream serve {GUEST_PORT} > /tmp/up 2> /dev/null & head -n 1 /tmp/up"
    ));
}

/// A client of the guest's program at `port`; none if it is turned away.
fn client(uds: &Path, port: u32) -> Option<BufReader<UnixStream>> {
    let mut client = UnixStream::connect(uds).unwrap();
    writeln!(client, "CONNECT {port}").unwrap();
    let mut client = BufReader::new(client);
    let mut answer = String::new();
    client.read_line(&mut answer).unwrap();
    (!answer.is_empty()).then(|| {
        let port: u32 = answer.strip_prefix("OK ").unwrap().trim_end().parse().unwrap();
        assert!(port >= 1 << 30, "{answer}");
        client
    })
}

/// Sends a stream to the guest's program; returns what was sent and what the guest says of it.
fn transfer_to_server(uds: &Path, bytes: u64) -> (Summary, String) {
    let mut client = client(uds, GUEST_PORT).unwrap();
    let sent = stream::send(client.get_mut(), SEED, bytes).unwrap();
    client.get_mut().shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    (sent, answer)
}

/// The guest sends a stream to `listener`.
fn transfer_from_guest(vm: &Vm, listener: &UnixListener, bytes: u64) {
    std::thread::scope(|scope| {
        let received = scope.spawn(|| stream::receive(&mut listener.accept().unwrap().0).unwrap());
        let sent = vm.check(&format!("vsock-stream send {HOST_PORT} {SEED} {bytes}"));
        let received = received.join().unwrap();
        assert_eq!((received.bytes, sent), (bytes, format!("{received}\n")));
    });
}

/// The guest receives a stream from `listener`.
fn transfer_to_guest(vm: &Vm, listener: &UnixListener, bytes: u64) {
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| stream::send(&mut listener.accept().unwrap().0, SEED, bytes).unwrap());
        let received = vm.check(&format!("vsock-stream receive {HOST_PORT}"));
        assert_eq!(received, format!("{}\n", sent.join().unwrap()));
    });
}

/// Has the guest open a connection that lasts until somebody ends it, and returns the host's end.
fn held(vm: &Vm, listener: &UnixListener) -> UnixStream {
    vm.check(&format!(
        "rm -f /tmp/ended; mkfifo /tmp/ended; \
         (vsock-stream receive {HOST_PORT}; : > /tmp/ended) > /tmp/held 2>&1 &"
    ));
    let mut host = listener.accept().unwrap().0;
    // The guest has it once a byte has come through.
    host.write_all(b"x").unwrap();
    host
}

/// What became of the held connection in the guest.
fn end_of_held(vm: &Vm) -> String {
    vm.check("cat /tmp/ended /tmp/held")
}

const RESET: &str = "vsock-stream: Connection reset by peer (os error 104)\n";

#[test]
fn streams_go_both_ways_from_either_end_and_nobody_is_reached_where_nobody_listens() {
    let folder = scratch();
    let uds = folder.path().join("v.sock");
    let device = format!("cid=3,uds={}", uds.display());
    let vm = Guest::micro().arguments(["--vsock", device.as_str()]).boot();
    let listener = listener(&uds);
    transfer_from_guest(&vm, &listener, TRANSFER);
    transfer_to_guest(&vm, &listener, TRANSFER);

    assert!(client(&uds, GUEST_PORT).is_none(), "nobody listens in the guest yet");
    serve(&vm);
    let (sent, answer) = transfer_to_server(&uds, TRANSFER);
    assert_eq!(answer, format!("{sent}\n"));

    let refused = vm.run("vsock-stream receive 1001");
    assert_eq!((refused.exit_code, refused.stderr.as_str()), (1, RESET));
    vm.power_off();
    vm.wait();
    assert!(!uds.exists(), "the socket goes with the VM");
}

/// Checks that `vm`, which goes on elsewhere with a held connection, has lost that and can make others, at `uds`.
fn check_reset_and_new(vm: &Vm, uds: &Path, listener: &UnixListener) {
    assert_eq!(end_of_held(vm), RESET);
    transfer_to_guest(vm, listener, SMALL);
    let (sent, answer) = transfer_to_server(uds, SMALL);
    assert_eq!(answer, format!("{sent}\n"));
}

#[test]
fn connections_are_reset_where_a_vm_goes_on_after_a_snapshot_or_a_move_and_new_ones_are_made() {
    let (folder, shelf) = (scratch(), Shelf::new());
    let path = |name: &str| -> (PathBuf, String) {
        let path = folder.path().join(name);
        let option = format!("uds={}", path.display());
        (path, option)
    };
    let (uds, _) = path("first");
    let original = Guest::micro().boot_managed(|api| {
        api.put("/vsock", &json!({ "guest_cid": 3, "uds_path": uds }));
        let refused = api.request("PUT", "/vsock", Some(&json!({ "guest_cid": 2, "uds_path": uds })));
        assert_eq!(refused.status, 400);
    });
    assert_eq!(
        original.api.get("/vm/config")["vsock"],
        json!({ "guest_cid": 3, "uds_path": uds })
    );
    let at_first = listener(&uds);
    serve(&original.vm);
    let mut connection = held(&original.vm, &at_first);
    shelf.full(&original, "s0");
    // To the original it was a pause, and pauses are nothing to a connection.
    original.pause();
    connection.write_all(b"y").unwrap();
    drop(connection);
    original.resume();
    assert!(end_of_held(&original.vm).starts_with("2 "));

    let (uds, option) = path("second");
    let at_second = listener(&uds);
    let restored: ManagedVm = shelf.restore("s0").arguments(["--vsock", option.as_str()]).start();
    check_reset_and_new(&restored.vm, &uds, &at_second);
    assert_eq!(restored.api.get("/vm/config")["vsock"]["uds_path"], json!(uds));

    let connection = held(&restored.vm, &at_second);
    let receiver = Receiver::start();
    restored.migrate(receiver.address(), &json!({})).success();
    assert_eq!(restored.vm.wait(), Exit::Shutdown);
    let moved = receiver.managed;
    // It is at the same path, which its monitor before has let go of.
    check_reset_and_new(&moved.vm, &uds, &at_second);
    drop(connection);
    drop(original);
}
