//! Moves as people and programs ask for them: the command line, the events, and another monitor on the same host.

use std::path::Path;

use cutover_tests::{
    Exit, Guest, ManagedVm, Monitor, Network, Receiver, Vm, cli, poll_until, scratch, start_receiving,
};
use serde_json::{Value, json};

/// `cutover migrate` of the VM behind `socket`.
fn migrate(socket: &Path, to: &str, arguments: &[&str]) -> cli::Finished {
    cli::cutover(
        [
            "migrate".as_ref(),
            socket.as_os_str(),
            "--downtime".as_ref(),
            "5s".as_ref(),
            "--to".as_ref(),
            to.as_ref(),
        ]
        .into_iter()
        .chain(arguments.iter().map(AsRef::as_ref)),
    )
}

/// A guest under `cutover run`, with its memory in a file that can be handed over.
fn boot_shared(socket: &Path, network: &Network) -> Vm {
    let vm = Guest::micro()
        .net(network)
        .arguments(["--memory-shared".as_ref(), "--api-sock".as_ref(), socket.as_os_str()])
        .boot();
    vm.check(&network.guest_setup());
    vm.start_page_writer(16, Some(20_000));
    vm
}

#[test]
fn the_command_and_the_events_of_both_sides_tell_how_a_guest_moved() {
    let managed = Guest::micro().boot_managed(|_| {});
    managed.vm.start_page_writer(16, Some(2_000));
    let receiver = Receiver::start();
    let mut events = managed.api.events("/v1/events", None);
    let finished = migrate(
        managed.api.socket(),
        &format!("tcp://{}", receiver.address()),
        &["--insecure", "--json"],
    );
    assert_eq!(finished.exit, Exit::Shutdown, "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    let rounds = report["rounds"].as_array().unwrap();
    assert!(rounds.len() >= 2, "{report}");
    let total = |key: &str| report[key].as_u64().unwrap();
    assert!(total("wire_bytes") > 1 << 20, "{report}");
    let downtime = report["downtime"]["total_ns"].as_u64().unwrap();
    let parts =
        ["stop_ns", "pages_ns", "state_ns", "handoff_ns"].map(|part| report["downtime"][part].as_u64().unwrap());
    assert_eq!(parts.iter().sum::<u64>(), downtime, "{report}");
    assert!(downtime < total("total_ns"), "{report}");

    let names: Vec<String> = events.by_ref().map(|event| event.name).collect();
    for name in ["migration_started", "migration_round", "migration_finished"] {
        assert!(names.iter().any(|seen| seen == name), "{name} among {names:?}");
    }
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
    let mut there = receiver.managed.api.events("/v1/events", Some(0));
    let came = there.find(|event| event.name == "migrated");
    assert!(came.is_some());
    receiver.managed.check_goes_on();
}

#[test]
fn without_leave_nothing_goes_over_a_link_that_is_not_protected() {
    let managed = Guest::micro().boot_managed(|_| {});
    let refused = migrate(managed.api.socket(), "tcp://127.0.0.1:1", &[]);
    assert_eq!(refused.exit, Exit::Usage, "{refused:?}");
    assert!(refused.stderr.contains("--insecure"), "{refused:?}");
    let body = json!({ "to": "tcp://127.0.0.1:1" });
    managed.api.request("POST", "/v1/migration", Some(&body)).fault();
    let listening = cli::cutover(["receive", "--listen", "tcp://127.0.0.1:1"]);
    assert_eq!(listening.exit, Exit::Usage, "{listening:?}");
}

#[test]
fn a_guest_goes_to_another_monitor_on_its_host_without_its_memory_being_copied() {
    let (directory, network) = (scratch(), Network::new());
    let path = |name: &str| directory.path().join(name);
    let vm = boot_shared(&path("first"), &network);
    let second = upgrade(&vm, &path("first"), &path("meeting"));
    let third = upgrade(&second.vm, second.api.socket(), &path("meeting"));
    // The tap came along too.
    third.vm.check(&format!("ping -c 1 -W 60 {}", network.host()));
}

/// Has the guest go to another monitor of this host, without its memory.
#[track_caller]
fn upgrade(vm: &Vm, socket: &Path, meeting: &Path) -> ManagedVm {
    let mut command = Monitor::command();
    command.args(["receive", "--listen", &format!("unix:{}", meeting.display())]);
    let there = start_receiving(command);
    poll_until("the receiver listens", || meeting.exists().then_some(()));
    let finished = migrate(socket, &format!("unix:{}", meeting.display()), &["--json"]);
    assert_eq!(finished.exit, Exit::Shutdown, "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(report["pages"]["raw"], 0, "{report}");
    assert_eq!(vm.wait(), Exit::Shutdown);
    there.check_goes_on();
    there
}
