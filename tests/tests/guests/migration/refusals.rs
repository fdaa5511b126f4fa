//! Moves that are refused before a byte of memory has moved.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use cutover_tests::{
    Disk, Exit, Fault, Guest, Link, ManagedVm, Monitor, Network, Receiver, Signal, Toward, Vm, cli, free_address,
    listeners, scratch, tamper_with_reservation, wait_for_listener,
};
use serde_json::json;

fn guest() -> ManagedVm {
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.start_page_writer(16, Some(2_000));
    managed
}

#[test]
fn a_host_that_lacks_a_disk_and_a_tap_says_both_and_the_guest_goes_on_and_moves_later() {
    let (disk, network) = (Disk::blank(1 << 20), Network::new());
    let _tap = network.make_tap();
    let managed = Guest::micro().boot_managed(|api| {
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
        );
        api.put(
            "/network-interfaces/eth0",
            &json!({ "iface_id": "eth0", "host_dev_name": network.tap() }),
        );
    });
    managed.vm.start_page_writer(16, Some(2_000));
    // To the receiver the disk is elsewhere, and the tap is in use.
    let receiver = Receiver::start_with(["--disk", "data=/nowhere/disk"]);
    let fault = managed.migrate(receiver.address(), &json!({})).fault();
    assert!(fault.contains("/nowhere/disk"), "{fault}");
    assert!(fault.contains(network.tap()), "{fault}");
    assert_eq!(receiver.managed.vm.wait(), Exit::Error);
    managed.check_goes_on();

    let tap = Network::new();
    let receiver = Receiver::start_with(["--tap", &format!("eth0={}", tap.tap())]);
    managed.move_to(receiver, &json!({}));
}

#[test]
fn a_host_without_the_memory_for_it_refuses_the_guest() {
    let managed = Guest::micro().memory("1024M").boot_managed(|_| {});
    managed.vm.start_page_writer(16, Some(2_000));
    // Less than the guest has, and more than a monitor needs.
    let receiver = Receiver::limited_to_memory(512 << 20);
    let fault = managed.migrate(receiver.address(), &json!({})).fault();
    assert!(fault.contains("memory"), "{fault}");
    assert_eq!(receiver.managed.vm.wait(), Exit::Error);
    managed.check_goes_on();
}

#[test]
fn a_host_with_another_cpu_or_with_a_vm_of_that_name_refuses_the_guest() {
    const NAME: &str = "namesake";
    let vm = Guest::micro().arguments(["--name", NAME, "--api"]).boot();
    vm.start_page_writer(16, Some(2_000));
    let refuses = |arguments: &[&str], link: fn(SocketAddr) -> SocketAddr, reason: &str| {
        let address = free_address();
        let mut command = Monitor::command();
        command.args(["receive", "--insecure", "--listen", &format!("tcp://{address}")]);
        command.args(arguments);
        let receiver = Vm::start_restored(command);
        wait_for_listener(address, listeners);
        let to = format!("tcp://{}", link(address));
        let refused = cli::cutover(["migrate", NAME, "--insecure", "--to", &to]);
        assert_eq!(refused.exit, Exit::Error, "{refused:?}");
        assert!(refused.stderr.contains(reason), "{refused:?}");
        assert_eq!(receiver.wait(), Exit::Error, "{}", receiver.log());
        let pages = [vm.check_pages().pages, vm.check_pages().pages];
        assert!(pages[0] < pages[1], "{pages:?}");
    };
    refuses(&["--api"], |address| address, "a VM named namesake runs already");
    // Every feature there could be, where the guest was told of a hypervisor: so the number has as many digits.
    let features = |address| tamper_with_reservation(address, r#""register":"ecx","bits":"#, "4294967295");
    refuses(&[], features, "CPUID.(EAX=1H,ECX=0):ECX[");
    let maker = |address| tamper_with_reservation(address, r#""vendor":""#, "NoSuchVendor");
    refuses(&[], maker, "NoSuchVendor");
}

#[test]
fn a_guest_moves_to_one_place_at_a_time() {
    let managed = guest();
    let (receiver, other) = (Receiver::start(), Receiver::start());
    let link = Link::failing(receiver.address(), Toward::Destination, 1 << 20, Fault::Silence);
    let mut first = managed.begin_to_migrate(link.address(), &json!({}));
    link.wait_for_fault();
    let fault = managed.migrate(other.address(), &json!({})).fault();
    assert!(fault.contains("migrat"), "{fault}");
    link.heal();
    first.answer().success();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
    receiver.managed.check_goes_on();
}

#[test]
fn what_connects_and_is_no_monitor_is_turned_away_and_the_guest_can_still_come() {
    let receiver = Receiver::start();
    let mut stranger = TcpStream::connect(receiver.address()).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer);
    guest().move_to(receiver, &json!({}));
}

#[test]
fn a_cancelled_move_leaves_the_guest_where_it_is_and_nothing_where_it_was_to_be() {
    let managed = guest();
    // While it is negotiated, and while memory is sent.
    for (toward, byte) in [(Toward::Source, 0), (Toward::Destination, 4 << 20)] {
        let receiver = Receiver::start();
        let link = Link::failing(receiver.address(), toward, byte, Fault::Silence);
        let mut moving = managed.begin_to_migrate(link.address(), &json!({}));
        link.wait_for_fault();
        managed.api.request("DELETE", "/v1/migration", None).success();
        let fault = moving.answer().fault();
        assert!(fault.contains("cancelled"), "after {byte} bytes: {fault}");
        managed.check_goes_on();
        drop(link);
        receiver.check_given_up();
    }
    managed.move_to(Receiver::start(), &json!({}));
}

#[test]
fn a_receiver_that_is_cancelled_leaves_nothing_behind() {
    let directory = scratch();
    let disk = Disk::blank(8 << 20);
    let managed = Guest::micro().boot_managed(|api| {
        api.put(
            "/drives/data",
            &json!({ "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
        );
    });
    managed.vm.start_page_writer(16, Some(2_000));
    let receiver = Receiver::start_with(["--disks".as_ref(), directory.path().as_os_str()]);
    let link = Link::failing(receiver.address(), Toward::Destination, 4 << 20, Fault::Silence);
    let mut moving = managed.begin_to_migrate(link.address(), &json!({ "disks": "move" }));
    link.wait_for_fault();
    receiver.managed.vm.monitor().signal(Signal::TERM);
    assert_eq!(receiver.managed.vm.wait(), Exit::Error);
    link.heal();
    moving.answer().fault();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    managed.check_goes_on();
}
