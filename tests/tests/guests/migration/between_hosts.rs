//! Guests that move between two hosts, which have nothing in common but a network: each has a kernel and clocks of its
//! own, and can lose its power.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::Command;

use cutover_tests::{
    Authority, Disk, Exit, Guest, Monitor, OtherHost, Vm, cli, legacy, poll_until, scratch, wait_for_listener,
};
use serde_json::Value;

use super::network::Streams;

/// The name of the VM under either monitor.
const NAME: &str = "mover";
/// Makes the VM's tap on a host.
const MAKE_TAP: &str = "ip link show mover0 >/dev/null 2>&1 ||
    { ip tuntap add dev mover0 mode tap vnet_hdr && ip link set mover0 master lan up; }";
/// Where monitors listen for the VM.
const PORT: u16 = 7000;
/// Bytes a second at which there is time to do something before the VM has moved.
const SLOW: &str = "4M";

/// One of the two hosts, as a place for a monitor.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Host {
    Here,
    There,
}
use Host::{Here, There};

impl Host {
    fn address(self) -> Ipv4Addr {
        match self {
            Here => OtherHost::HERE,
            There => OtherHost::THERE,
        }
    }

    fn other(self) -> Self {
        match self {
            Here => There,
            There => Here,
        }
    }

    /// `cutover`, to be completed with arguments.
    fn cutover(self) -> Command {
        match self {
            Here => Monitor::command(),
            There => OtherHost::monitor(),
        }
    }

    #[track_caller]
    fn shell(self, script: &str) -> String {
        let finished = match self {
            Here => {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", script]);
                cli::finish(command)
            }
            There => OtherHost::run(script),
        };
        assert_eq!(finished.exit, Exit::Shutdown, "'{script}': {finished:?}");
        finished.stdout
    }
}

/// Certificates of both hosts, where both have them.
fn certificates() -> Authority {
    let authority = Authority::new(&legacy(), &Here.address().to_string());
    authority.add(&There.address().to_string());
    authority
}

/// A guest on `host`, with the network of both and a program that notices lost memory.
fn boot(host: Host, change: impl FnOnce(Guest) -> Guest) -> Vm {
    for host in [Here, There] {
        host.shell(MAKE_TAP);
    }
    let mut guest = Guest::micro().arguments(["--name", NAME, "--api", "--net", "tap=mover0"]);
    if host == There {
        guest = guest.through(OtherHost::wrapper());
    }
    let vm = change(guest).boot();
    vm.check(&format!(
        "ip address add {}/24 dev eth0 && ip link set eth0 up",
        OtherHost::GUEST
    ));
    vm.start_page_writer(16, Some(2_000));
    vm
}

/// A monitor on `host` that waits for the guest.
fn receive<S: AsRef<OsStr>>(host: Host, authority: &Authority, arguments: impl IntoIterator<Item = S>) -> Vm {
    let address = host.address();
    let mut command = host.cutover();
    command.args([
        "receive",
        "--name",
        NAME,
        "--api",
        "--listen",
        &format!("tls://{address}:{PORT}"),
        "--tls-dir",
    ]);
    command.arg(authority.host(&address.to_string())).args(arguments);
    let vm = Vm::start_restored(command);
    wait_for_listener((address, PORT).into(), || host.shell("cat /proc/net/tcp"));
    vm
}

/// The command by which the guest on `host` moves to the other.
fn migrate(host: Host, authority: &Authority, arguments: &[&str]) -> Command {
    let to = format!("tls://{}:{PORT}", host.other().address());
    let mut command = host.cutover();
    command.args(["migrate", NAME, "--json", "--downtime", "5s", "--to", &to, "--tls-dir"]);
    command.arg(authority.host(&host.address().to_string())).args(arguments);
    command
}

/// Waits until memory is being sent.
fn wait_until_it_moves(host: Host) {
    let look = "curl --silent --unix-socket /run/cutover/mover.sock http://localhost/v1/migration";
    poll_until("memory is being sent", || {
        let status: Value = serde_json::from_str(&host.shell(look)).ok()?;
        (status["under_way"]["phase"] == "pre_copy").then_some(())
    });
}

fn check_goes_on(vm: &Vm) {
    let first = vm.check_pages();
    let second = vm.check_pages();
    assert!(second.pages > first.pages, "{first} and then {second}");
}

#[test]
fn a_guest_goes_to_another_host_and_comes_back_with_its_streams_and_its_time() {
    let authority = certificates();
    let mut vm = boot(Here, |guest| guest);
    let streams = Streams::begin(&vm, OtherHost::HERE);
    for host in [Here, There] {
        let there = receive(host.other(), &authority, [""; 0]);
        let moved = cli::finish(migrate(host, &authority, &[]));
        assert_eq!(moved.exit, Exit::Shutdown, "{moved:?}");
        assert_eq!(vm.wait(), Exit::Shutdown);
        vm = there;
        check_goes_on(&vm);
    }
    streams.check_ends(&vm);
}

#[test]
fn a_disk_comes_along_to_a_host_that_has_none() {
    let (authority, disk) = (certificates(), Disk::blank(32 << 20));
    let vm = boot(Here, |guest| guest.disk(&disk));
    vm.write_chunk(0);
    let there = receive(There, &authority, ["--disks", "/dev/shm"]);
    let moved = cli::finish(migrate(Here, &authority, &["--disks", "move"]));
    assert_eq!(moved.exit, Exit::Shutdown, "{moved:?}");
    there.write_chunk(1);
    there.check_chunks(2);
    drop(disk);

    // And back, to where it is not any more.
    let directory = scratch();
    let here = receive(Here, &authority, ["--disks".as_ref(), directory.path().as_os_str()]);
    let moved = cli::finish(migrate(There, &authority, &["--disks", "move"]));
    assert_eq!(moved.exit, Exit::Shutdown, "{moved:?}");
    here.check_chunks(2);
    check_goes_on(&here);
}

#[test]
fn a_destination_without_power_leaves_the_guest_where_it_is() {
    let authority = certificates();
    let vm = boot(Here, |guest| guest);
    let there = receive(There, &authority, [""; 0]);
    let moving = Monitor::start(migrate(Here, &authority, &["--bandwidth", SLOW]));
    wait_until_it_moves(Here);
    OtherHost::cut_power();
    assert_eq!(moving.wait(), Exit::Error, "{}", moving.log());
    check_goes_on(&vm);
    drop(there);
}

#[test]
fn a_source_without_power_takes_its_guest_along() {
    let authority = certificates();
    let vm = boot(There, |guest| guest);
    let here = receive(Here, &authority, [""; 0]);
    let moving = Monitor::start(migrate(There, &authority, &["--bandwidth", SLOW]));
    wait_until_it_moves(There);
    OtherHost::cut_power();
    assert_eq!(here.wait(), Exit::Error, "{}", here.log());
    assert_eq!(here.console().text(), "");
    drop((vm, moving));
}

#[test]
fn a_cable_that_is_out_for_three_seconds_only_delays_the_guest() {
    let authority = certificates();
    let vm = boot(Here, |guest| guest);
    let there = receive(There, &authority, [""; 0]);
    let moving = Monitor::start(migrate(Here, &authority, &["--bandwidth", SLOW]));
    wait_until_it_moves(Here);
    Here.shell("ip link set eth0 down; sleep 3; ip link set eth0 up");
    assert_eq!(moving.wait(), Exit::Shutdown, "{}", moving.log());
    assert_eq!(vm.wait(), Exit::Shutdown);
    check_goes_on(&there);
}
