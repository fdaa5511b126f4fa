//! Clients that nobody here wrote drive guests over the API.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use cutover_tests::{
    Api, Bridge, Disk, Exit, Guest, Monitor, Network, Ssh, Vm, foreign_client, guest_file, monitor_binary, scratch,
};
use serde_json::{Value, json};

/// What firecracker-python is told to do.
const DRIVE: &str = include_str!("drive.py");

/// Schemathesis: what it checks of each answer. That refusals are documented and well-formed is part of it.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";

/// What ends the guest or replaces files if it is accepted, and what never ends itself.
const NOT_WITH_A_GUEST: [&str; 4] = ["/actions", "/snapshot/create", "/v1/power", "/v1/events"];

#[test]
fn the_firecracker_client_of_pypi_takes_a_debian_from_boot_to_shutdown() {
    let directory = scratch();
    let (socket, log) = (directory.path().join("api"), directory.path().join("log"));
    // Started as such clients start Firecracker: by that name, and with these arguments.
    let program = directory.path().join("firecracker");
    symlink(monitor_binary(), &program).unwrap();
    let mut command = Command::new(&program);
    command.arg("--api-sock").arg(&socket).args(["--id", "debian-1"]);
    command.arg("--log-path").arg(&log);
    let vm = Vm::start(command);
    Api::new(&socket).wait_ready();

    let (root, network) = (Disk::debian_root(), Network::new());
    let _tap = network.make_tap();
    let boot_args = format!(
        "console=ttyS0 reboot=k panic=1 pci=off quiet rw cutover.ip={}/24 cutover.gw={}",
        network.guest(),
        network.host()
    );
    let mut client = foreign_client("python", directory.path())
        .args(["-c", DRIVE])
        // Relative to the directory: the library that it uses makes the path a host name, in small letters.
        .arg("api")
        .args([guest_file("debian/vmlinuz"), guest_file("debian/initrd")])
        .arg(boot_args)
        .arg(root.path())
        .arg(network.tap())
        .arg(&log)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut go_on = client.stdin.take().unwrap();
    let lines = BufReader::new(client.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    // The package prints this and that when it is loaded.
    let mut lines = lines.filter_map(|line| line.strip_prefix("drive: ").map(str::to_owned));
    let mut expect = |line: &str| assert_eq!(lines.next().as_deref(), Some(line));

    expect("started");
    vm.console().wait_for("login: ");
    let ssh = Ssh::to(network.guest());
    assert_eq!(ssh.check("nproc; findmnt -no SOURCE /"), "2\n/dev/vda\n");
    ssh.check("sha256sum /bin/* > /var/tmp/before");
    writeln!(go_on).unwrap();
    expect("paused");
    writeln!(go_on).unwrap();
    expect("resumed");
    ssh.check("sha256sum --check --quiet /var/tmp/before");
    writeln!(go_on).unwrap();
    expect("asked to shut down");
    writeln!(go_on).unwrap();
    assert!(client.wait().unwrap().success());
    assert_eq!(vm.wait(), Exit::Shutdown);
}

#[test]
fn schemathesis_meets_no_server_error_before_boot() {
    let directory = scratch();
    let socket = directory.path().join("api");
    let mut command = Monitor::command();
    command
        .arg("vmm")
        .arg("--api-sock")
        .arg(&socket)
        .current_dir(directory.path());
    let monitor = Monitor::start(command);
    let api = Api::new(&socket);
    api.wait_ready();
    examine(&api, &["/v1/events"]);
    assert_eq!(api.get("/")["state"], "Not started", "{}", monitor.log());
}

#[test]
fn schemathesis_meets_no_server_error_with_a_guest_running_which_does_not_notice() {
    let disk = Disk::blank(1 << 20);
    let managed = Guest::micro().boot_managed(|api| {
        let drive = json!({
            "drive_id": "data", "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false
        });
        api.put("/drives/data", &drive);
    });
    managed
        .vm
        .check("head -c 8m /dev/urandom > /tmp/data; sha256sum /tmp/data > /tmp/sum");
    examine(&managed.api, &NOT_WITH_A_GUEST);
    // It may have left the guest paused.
    if managed.api.get("/")["state"] == "Paused" {
        managed.api.patch("/vm", &json!({ "state": "Resumed" }));
    }
    managed.vm.check("sha256sum -c /tmp/sum");
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}

/// Has schemathesis send what the API's own description allows, and what it does not.
fn examine(api: &Api, excluded: &[&str]) {
    let directory = scratch();
    let bridge = Bridge::to(api.socket());
    let description: Value = api.get("/openapi.json");
    let file = directory.path().join("openapi.json");
    std::fs::write(&file, description.to_string()).unwrap();
    let mut command = foreign_client("st", directory.path());
    command.args(["--no-color", "run"]).arg(&file);
    command.args(["--url", &format!("http://{}", bridge.address())]);
    command.args(["--checks", CHECKS, "--phases", "examples,coverage,fuzzing"]);
    // The same requests each time.
    command.args(["--max-examples", "10", "--seed", "1", "--generation-deterministic"]);
    command.args(["--suppress-health-check", "all"]);
    for path in excluded {
        command.args(["--exclude-path", path]);
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
