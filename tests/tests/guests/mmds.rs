//! The metadata service: what a guest reads of itself, and what goes on beside that at the same interface.

use std::fs;
use std::net::TcpListener;
use std::thread;

use cutover_guest::stream;
use cutover_tests::{Exit, Guest, Lan, ManagedVm, Network, Receiver, Shelf, Vm, scratch};
use serde_json::json;

const TRANSFER: u64 = 16 << 20;
const SEED: u64 = 0x33d5;
const ROUTE: &str = "ip route add 169.254.169.254 dev eth0";

/// A token, asked for in the guest.
fn token(vm: &Vm) -> String {
    let answer = vm.check(
        "printf 'PUT /latest/api/token HTTP/1.1\\r\\nX-metadata-token-ttl-seconds: 600\\r\\n\\r\\n' \
         | busybox nc 169.254.169.254 80",
    );
    let (head, token) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert_eq!(token.len(), 64, "{answer}");
    token.to_owned()
}

fn get(fields: &str, path: &str) -> String {
    format!("busybox wget -q -O - {fields} http://169.254.169.254{path}")
}

/// With `token`, and what more `wget` is to be told.
fn with(token: &str, more: &str) -> String {
    format!("--header 'X-metadata-token: {token}' {more}")
}

/// The error with which the guest is refused what it asks for.
fn refusal(vm: &Vm, command: &str) -> String {
    let refused = vm.run(command);
    assert_ne!(refused.exit_code, 0, "{command}");
    refused.stderr
}

#[test]
fn a_guest_reads_with_a_token_beside_its_traffic_and_wherever_it_goes_on() {
    let (mut lan, shelf) = (Lan::new(), Shelf::new());
    let taps = [lan.add_tap(), lan.add_tap(), lan.add_tap()];
    let original = Guest::micro().boot_managed(|api| {
        api.put(
            "/network-interfaces/eth0",
            &json!({ "iface_id": "eth0", "host_dev_name": taps[0] }),
        );
        let unknown = json!({ "network_interfaces": ["eth1"] });
        assert_eq!(api.request("PUT", "/mmds/config", Some(&unknown)).status, 400);
        api.put(
            "/mmds/config",
            &json!({ "version": "V2", "network_interfaces": ["eth0"] }),
        );
        api.request("PATCH", "/mmds", Some(&json!({}))).fault();
        api.put(
            "/mmds",
            &json!({ "latest": { "meta-data": { "name": "first", "key": "k" } } }),
        );
    });
    let (vm, api) = (&original.vm, &original.api);
    vm.check(&format!("{} && {ROUTE}", lan.guest_setup()));

    let listener = TcpListener::bind((lan.host(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    vm.check(&format!(
        "mkfifo /tmp/all; (tcp-stream send {address} {SEED} {TRANSFER} > /tmp/sent; : > /tmp/all) >/dev/null 2>&1 &"
    ));
    let mut stream = listener.accept().unwrap().0;
    let host = thread::spawn(move || stream::receive(&mut stream).unwrap());
    assert!(refusal(vm, &get("", "/latest/meta-data/name")).contains("401 Unauthorized"));
    assert!(refusal(vm, &get(&with("guess", ""), "/latest/meta-data/name")).contains("401 Unauthorized"));
    let good = token(vm);
    assert_eq!(vm.check(&get(&with(&good, ""), "/latest/meta-data")), "key\nname");
    assert_eq!(vm.check(&get(&with(&good, ""), "/latest/meta-data/name")), "first");
    api.patch(
        "/mmds",
        &json!({ "latest": { "meta-data": { "name": "changed", "key": null } } }),
    );
    let json = with(&good, "--header 'Accept: application/json'");
    assert_eq!(vm.check(&get(&json, "/latest")), r#"{"meta-data":{"name":"changed"}}"#);
    assert_eq!(
        api.get("/mmds"),
        json!({ "latest": { "meta-data": { "name": "changed" } } })
    );
    assert_eq!(
        vm.check("cat /tmp/all /tmp/sent"),
        format!("{}\n", host.join().unwrap())
    );

    shelf.full(&original, "s0");
    drop(original);
    let option = format!("eth0={}", taps[1]);
    let restored: ManagedVm = shelf.restore("s0").arguments(["--net", option.as_str()]).start();
    let vm = &restored.vm;
    assert_eq!(restored.api.get("/vm/config")["mmds-config"]["version"], "V2");
    assert!(refusal(vm, &get(&with(&good, ""), "/")).contains("401 Unauthorized"));
    let good = token(vm);
    assert!(
        refusal(vm, &get(&with(&good, ""), "/")).contains("404 Not Found"),
        "a clone has what it is given"
    );
    restored.api.put("/mmds", &json!({ "name": "clone" }));
    assert_eq!(vm.check(&get(&with(&good, ""), "/name")), "clone");

    let receiver = Receiver::start_with(["--tap", &format!("eth0={}", taps[2])]);
    restored.migrate(receiver.address(), &json!({})).success();
    assert_eq!(restored.vm.wait(), Exit::Shutdown);
    let vm = &receiver.managed.vm;
    let good = token(vm);
    assert_eq!(vm.check(&get(&with(&good, ""), "/name")), "clone");
    vm.check(&format!("ping -c 2 {}", lan.host()));
}

#[test]
fn version_1_asks_for_no_token_and_tells_what_a_file_says() {
    let (network, folder) = (Network::new(), scratch());
    let file = folder.path().join("metadata.json");
    // More than goes into one segment, or one buffer.
    let long = "long ".repeat(10_000);
    fs::write(&file, json!({ "user-data": long }).to_string()).unwrap();
    let file = file.display().to_string();
    let arguments = [
        "--mmds",
        "version=V1,address=169.254.170.2",
        "--metadata",
        file.as_str(),
    ];
    let vm = Guest::micro().net(&network).arguments(arguments).boot();
    vm.check(&format!(
        "{} && ip route add default via {}",
        network.guest_setup(),
        network.host()
    ));
    // It is found behind a router as well.
    let got = vm.check("busybox wget -q -O - http://169.254.170.2/user-data | md5sum");
    let expected = vm.check("i=0; while [ $i -lt 10000 ]; do printf 'long '; i=$((i + 1)); done | md5sum");
    assert_eq!(got, expected);
    vm.check(&format!("ping -c 2 {}", network.host()));
}
