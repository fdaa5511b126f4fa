//! Frames reach the host and come back whole.

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;

use cutover_guest::stream::{self, Summary};
use cutover_tests::{Guest, Network};

/// Bytes of a transfer.
const TRANSFER: u64 = 100 << 20;
/// Fixes the bytes of a transfer.
const SEED: u64 = 0x5eed;

/// Receives what one client sends.
fn receive(listener: TcpListener) -> Summary {
    stream::receive(&mut listener.accept().unwrap().0).unwrap()
}

/// Sends the transfer to one client.
fn send(listener: TcpListener) -> Summary {
    stream::send(&mut listener.accept().unwrap().0, SEED, TRANSFER).unwrap()
}

#[test]
fn a_hundred_mebibytes_arrive_whole_in_both_directions() {
    let network = Network::new();
    let vm = Guest::micro().memory("256M").net(&network).boot();
    vm.check(&network.guest_setup());
    let listen = || {
        let listener = TcpListener::bind((network.host(), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    };

    let (listener, address) = listen();
    let host = thread::spawn(move || receive(listener));
    let sent = vm.check(&format!("tcp-stream send {address} {SEED} {TRANSFER}"));
    assert!(sent.starts_with(&format!("{TRANSFER} ")), "{sent}");
    assert_eq!(sent, format!("{}\n", host.join().unwrap()));

    let (listener, address) = listen();
    let host = thread::spawn(move || send(listener));
    let received = vm.check(&format!("tcp-stream receive {address}"));
    assert_eq!(received, format!("{}\n", host.join().unwrap()));
    assert_eq!(received, sent, "both directions carried the same stream");
}

#[test]
fn each_interface_has_its_own_address_mtu_and_network() {
    let (first, second) = (Network::new(), Network::new());
    let vm = Guest::micro()
        .arguments(["--net", &format!("{},mac=02:00:00:00:00:17,mtu=1400", first.argument())])
        .net(&second)
        .boot();
    assert_eq!(vm.check("cat /sys/class/net/eth0/address"), "02:00:00:00:00:17\n");
    assert_eq!(
        vm.check("cat /sys/class/net/eth0/mtu /sys/class/net/eth1/mtu"),
        "1400\n1500\n"
    );
    let made_up = vm.check("cat /sys/class/net/eth1/address");
    let first_byte = u8::from_str_radix(&made_up[..2], 16).unwrap();
    assert_eq!(
        first_byte & 3,
        2,
        "{made_up} is not a locally administered unicast address"
    );

    vm.check(&first.guest_setup());
    vm.check(&second.guest_setup().replace("eth0", "eth1"));
    for network in [&first, &second] {
        vm.check(&format!("ping -c 2 {}", network.host()));
    }
    // Full-sized frames, not to be fragmented: 28 bytes are headers.
    vm.check(&format!("ping -c 2 -s 1372 {}", first.host()));
    vm.check(&format!("ping -c 2 -s 1472 {}", second.host()));
}

#[track_caller]
fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip runs (package iproute2)");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn an_open_tap_device_is_inherited_by_its_descriptor() {
    let network = Network::new();
    let tap = network.open_tap();
    ip(&format!("address add {}/24 dev {}", network.host(), network.tap()));
    ip(&format!("link set {} up", network.tap()));
    let argument = format!("fd={}", tap.as_raw_fd());
    let vm = Guest::micro().arguments(["--net", &argument]).boot();
    drop(tap);
    vm.check(&network.guest_setup());
    vm.check(&format!("ping -c 2 {}", network.host()));
}

#[test]
fn a_tap_device_made_beforehand_is_used_and_left_behind() {
    let network = Network::new();
    let tap = network.tap();
    ip(&format!("tuntap add dev {tap} mode tap"));
    ip(&format!("address add {}/24 dev {tap}", network.host()));
    ip(&format!("link set {tap} up"));

    let vm = Guest::micro().arguments(["--net", &format!("tap={tap}")]).boot();
    vm.check(&network.guest_setup());
    vm.check(&format!("ping -c 2 {}", network.host()));
    drop(vm);
    ip(&format!("tuntap del dev {tap} mode tap"));
}
