//! Moves over TLS, between monitors that have certificates.

use std::net::SocketAddr;
use std::path::Path;

use cutover_tests::{
    Authority, Guest, ManagedVm, Monitor, free_address, listeners, scratch, start_receiving, wait_for_listener,
};
use serde_json::{Value, json};

/// A monitor that waits for a guest at `address`, and has the certificate in `tls_dir`.
fn receive(address: SocketAddr, tls_dir: &Path) -> ManagedVm {
    let mut command = Monitor::command();
    command.args(["receive", "--listen", &format!("tls://{address}"), "--tls-dir"]);
    let managed = start_receiving({
        command.arg(tls_dir);
        command
    });
    wait_for_listener(address, listeners);
    managed
}

/// The options of a move to `address` with the certificate in `tls_dir`.
fn over_tls(address: SocketAddr, tls_dir: &Path) -> Value {
    json!({ "to": format!("tls://{address}"), "insecure": false, "tls_dir": tls_dir })
}

#[test]
fn a_guest_moves_to_who_has_a_certificate_of_the_same_authority_and_to_nobody_else() {
    let (directory, address) = (scratch(), free_address());
    let host = address.ip().to_string();
    let ours = Authority::new(directory.path(), &host);
    ours.add("elsewhere");
    let strangers = Authority::new(directory.path(), "elsewhere");
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.start_page_writer(16, Some(2_000));
    let there = receive(address, &ours.host(&host));

    // The destination does not know the source, nor the source the destination.
    let fault = managed
        .migrate(address, &over_tls(address, &strangers.host("elsewhere")))
        .fault();
    assert!(fault.contains("certificate"), "{fault}");
    // Whoever does not speak TLS is not heard.
    managed.migrate(address, &json!({})).fault();
    managed.check_goes_on();

    managed
        .migrate(address, &over_tls(address, &ours.host("elsewhere")))
        .success();
    there.check_goes_on();
}

#[test]
fn a_certificate_for_another_host_is_none() {
    let (directory, address) = (scratch(), free_address());
    let ours = Authority::new(directory.path(), "other-name");
    ours.add("elsewhere");
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.start_page_writer(16, Some(2_000));
    let _there = receive(address, &ours.host("other-name"));
    let fault = managed
        .migrate(address, &over_tls(address, &ours.host("elsewhere")))
        .fault();
    assert!(fault.contains("certificate"), "{fault}");
    managed.check_goes_on();
}
