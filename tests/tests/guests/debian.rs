//! A whole distribution.

use std::io::{Read, Write};
use std::net::TcpStream;

use cutover_tests::{Disk, Exit, Guest, Network, Signal, Ssh};

#[test]
fn debian_reaches_its_login_prompt_serves_the_network_and_obeys_the_power_button() {
    let root = Disk::debian_root();
    let network = Network::new();
    let vm = Guest::debian(&root, &network).arguments(["--rng"]).boot();

    let ssh = Ssh::to(network.guest());
    assert_eq!(ssh.check("cat /proc/1/comm"), "systemd\n");
    let state = ssh.run("systemctl is-system-running --wait");
    assert_eq!(
        state.stdout,
        "running\n",
        "{}",
        ssh.run("systemctl --failed --no-legend").stdout
    );

    let mut page = String::new();
    let mut web = TcpStream::connect((network.guest(), 80)).unwrap();
    web.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    web.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert_eq!(ssh.check("redis-cli set key value && redis-cli get key"), "OK\nvalue\n");

    vm.monitor().signal(Signal::TERM);
    assert_eq!(vm.wait(), Exit::Shutdown);
}
