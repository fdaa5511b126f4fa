//! The API with a guest behind it, as Firecracker's clients use it, and as those do who mean harm.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::process::Command;

use cutover_tests::cli::cutover;
use cutover_tests::{Api, Disk, Exit, Guest, ManagedVm, Monitor, Signal, Vm, guest_file, monitor_binary, scratch};
use serde_json::{Value, json};

/// Bytes of what a disk of these tests begins with.
const MARK: usize = 6;

fn power_off(managed: &ManagedVm) {
    managed.vm.power_off();
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}

/// A disk of `size` bytes that begins with `mark`.
fn marked(size: usize, mark: &str) -> Disk {
    let mut contents = vec![0; size];
    contents[..MARK].copy_from_slice(mark.as_bytes());
    Disk::holding(&contents)
}

fn drive(api: &Api, id: &str, disk: &Disk) {
    api.put(
        &format!("/drives/{id}"),
        &json!({ "drive_id": id, "path_on_host": disk.path(), "is_root_device": false, "is_read_only": false }),
    );
}

#[test]
fn a_program_called_firecracker_is_configured_and_started_as_firecracker_is() {
    let directory = scratch();
    let program = directory.path().join("firecracker");
    symlink(monitor_binary(), &program).expect("a new directory takes a link");
    let root = Disk::holding(&[0; 4096]);
    let api = Api::new(&directory.path().join("firecracker.socket"));
    let mut command = Command::new(program);
    command
        .arg("--api-sock")
        .arg(api.socket())
        .args(["--id", "551e7604-e35c-42b3-b825-416853441234"]);
    let vm = Vm::start(command);
    api.wait_ready();

    let log = directory.path().join("firecracker.log");
    api.put(
        "/logger",
        &json!({ "log_path": log, "level": "Debug", "show_level": true, "show_log_origin": true }),
    );
    api.put(
        "/boot-source",
        &json!({
            "kernel_image_path": guest_file("micro/vmlinuz"), "initrd_path": guest_file("micro/initrd"),
            "boot_args": "console=ttyS0 reboot=k panic=1 quiet"
        }),
    );
    api.put(
        "/drives/rootfs",
        &json!({ "drive_id": "rootfs", "path_on_host": root.path(), "is_root_device": true, "is_read_only": false }),
    );
    assert_eq!(api.get("/")["state"], "Not started");
    api.put("/actions", &json!({ "action_type": "InstanceStart" }));
    vm.wait_agent();
    let instance = api.get("/");
    assert_eq!(
        (&instance["state"], &instance["id"]),
        (&json!("Running"), &json!("551e7604-e35c-42b3-b825-416853441234"))
    );
    let cmdline = vm.check("cat /proc/cmdline");
    assert!(cmdline.contains("reboot=k panic=1 quiet root=/dev/vda rw"), "{cmdline}");
    // A guest of Firecracker has no other way to shut down, so its clients expect no failure of it.
    vm.run_to_the_end("reboot -f");
    assert_eq!(vm.wait(), Exit::Shutdown);
    let log = fs::read_to_string(log).expect("it was made");
    assert!(log.contains("the VM has ended"), "{log}");
    assert!(!api.socket().exists());
}

#[test]
fn a_configuration_file_of_firecracker_boots_without_an_api() {
    let directory = scratch();
    let file = directory.path().join("vm.json");
    let disk = marked(1 << 20, "mark-a");
    let metrics = directory.path().join("metrics");
    let configuration = json!({
        "boot-source": {
            "kernel_image_path": guest_file("micro/vmlinuz"), "initrd_path": guest_file("micro/initrd"),
            "boot_args": "console=ttyS0 quiet panic=-1"
        },
        "drives": [{
            "drive_id": "data", "partuuid": null, "is_root_device": false, "cache_type": "Unsafe", "is_read_only": true,
            "path_on_host": disk.path(), "io_engine": "Sync", "rate_limiter": null, "socket": null
        }],
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false },
        "cpu-config": null, "balloon": null, "network-interfaces": [], "vsock": null, "logger": null,
        "metrics": { "metrics_path": metrics }, "mmds-config": null, "entropy": {}
    });
    fs::write(&file, configuration.to_string()).expect("a new directory takes a file");
    let mut command = Monitor::command();
    command.arg("vmm").arg("--no-api").arg("--config-file").arg(&file);
    let vm = Vm::start(command);
    vm.wait_agent();
    assert_eq!(vm.check("nproc"), "2\n");
    assert_eq!(vm.check(&format!("head -c {MARK} /dev/vda")), "mark-a");
    vm.check("test -c /dev/hwrng");
    vm.power_off();
    assert_eq!(vm.wait(), Exit::Shutdown);
    let lines = fs::read_to_string(metrics).expect("it was made");
    let line: Value = serde_json::from_str(lines.lines().next().expect("one was written at the start")).expect("JSON");
    assert!(line["block_data"].is_object(), "{line}");
    let line: Value = serde_json::from_str(lines.lines().last().expect("another at the end")).expect("JSON");
    assert!(line["vcpu"]["exit_io_out"].as_u64() > Some(0), "{line}");
}

#[test]
fn another_image_behind_a_drive_is_what_the_guest_reads_from_then_on() {
    let (small, large) = (marked(1 << 20, "mark-a"), marked(2 << 20, "mark-b"));
    let managed = Guest::micro().boot_managed(|api| drive(api, "scratch", &small));
    let read = format!("dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | head -c {MARK}");
    assert_eq!(managed.vm.check(&read), "mark-a");
    assert_eq!(managed.vm.check("cat /sys/block/vda/size"), "2048\n");

    let missing = managed.api.request(
        "PATCH",
        "/drives/scratch",
        Some(&json!({ "drive_id": "scratch", "path_on_host": "/nonexistent/image" })),
    );
    assert!(missing.fault().contains("/nonexistent/image"), "{missing:?}");
    assert_eq!(managed.vm.check(&read), "mark-a");

    managed.api.patch(
        "/drives/scratch",
        &json!({ "drive_id": "scratch", "path_on_host": large.path() }),
    );
    managed
        .vm
        .check("while test $(cat /sys/block/vda/size) != 4096; do sleep 1; done");
    assert_eq!(managed.vm.check(&read), "mark-b");
    managed.vm.check("echo mark-c | dd of=/dev/vda conv=fsync");
    assert_eq!(large.beginning(MARK), b"mark-c");
    assert_eq!(small.beginning(MARK), b"mark-a");
    let mut events = managed.api.events("/v1/events", None);
    let updated = events.find(|event| event.name == "drive_updated");
    assert_eq!(updated.expect("the stream goes on").data["drive"], "scratch");
    power_off(&managed);
}

#[test]
fn events_go_on_after_a_lost_connection_where_they_stopped() {
    let managed = Guest::micro().boot_managed(|_| {});
    let state = |state: &str| managed.api.patch("/vm", &json!({ "state": state }));
    state("Paused");
    let mut events = managed.api.events("/v1/events", None);
    let seen = loop {
        let event = events.next().expect("the stream goes on");
        if event.data["state"] == "paused" {
            break event.id.expect("every event has its number");
        }
    };
    drop(events);
    state("Resumed");
    state("Paused");
    state("Resumed");
    let missed = managed.api.events("/v1/events", Some(seen)).take(3);
    let missed: Vec<_> = missed.map(|event| (event.id, event.data["state"].clone())).collect();
    let states = ["running", "paused", "running"].map(Value::from);
    assert_eq!(missed, (seen + 1..).map(Some).zip(states).collect::<Vec<_>>());
    power_off(&managed);
}

#[test]
fn watchers_are_told_how_the_vm_ends_before_the_stream_does() {
    let managed = Guest::micro().boot_managed(|_| {});
    let events = managed.api.events("/v1/events", None);
    managed.vm.power_off();
    let kinds: Vec<_> = events.map(|event| event.name).collect();
    assert!(kinds.contains(&"guest_shutdown".to_owned()), "{kinds:?}");
    assert_eq!(kinds.last().map(String::as_str), Some("vm_ended"));
    assert_eq!(managed.vm.wait(), Exit::Shutdown);
}

#[test]
fn counters_grow_with_what_the_guest_does() {
    let disk = Disk::blank(1 << 20);
    let managed = Guest::micro().cpus(2).boot_managed(|api| drive(api, "data", &disk));
    let before = managed.api.get("/v1/stats");
    assert_eq!((&before["state"], &before["boots"]), (&json!("running"), &json!(1)));
    managed
        .vm
        .check("dd if=/dev/zero of=/dev/vda bs=4096 count=16 oflag=direct 2>/dev/null");
    let after = managed.api.get("/v1/stats");
    let grown = |path: &str| {
        let number = |stats: &Value| stats.pointer(path).and_then(Value::as_u64).expect("a number");
        number(&after) - number(&before)
    };
    assert!(grown("/disks/0/written_bytes") >= 16 * 4096, "{after}");
    assert!(grown("/disks/0/writes") >= 1, "{after}");
    assert!(
        grown("/uptime_ns") > 0 && grown("/cpus/0/time_ns") + grown("/cpus/1/time_ns") > 0,
        "{after}"
    );
    assert!(
        grown("/cpus/0/exits/io_out") + grown("/cpus/1/exits/io_out") > 0,
        "{after}"
    );
    assert_eq!(after["memory"]["size_bytes"], 128 << 20);
    let text = managed.api.request("GET", "/v1/metrics", None).success().body;
    assert!(text.ends_with("# EOF\n"), "{text}");
    power_off(&managed);
}

#[test]
fn hostile_clients_are_dropped_or_refused_while_the_guest_goes_on() {
    let managed = Guest::micro().boot_managed(|_| {});
    let vm = &managed.vm;
    let api = &managed.api;
    vm.check("(while :; do echo >> /tmp/ticks; sleep 1; done) >/dev/null 2>&1 &");

    let mut hanging = Vec::new();
    for beginning in [
        "",
        "PATCH /vm HTTP/1.1\r\nContent-",
        "PATCH /vm HTTP/1.1\r\nContent-Length: 99\r\n\r\n{\"state\"",
    ] {
        let mut connection = api.connect();
        connection.send(beginning.as_bytes());
        hanging.push(connection);
    }
    let mut garbage = api.connect();
    garbage.send(b"\x16\x03\x01 this is not HTTP\r\n\r\n");
    assert_eq!(garbage.answer().status, 400);
    assert!(garbage.is_ended());

    let huge = "x".repeat(10_000_000);
    let mut stream = UnixStream::connect(api.socket()).expect("the API listens");
    let head = format!(
        "PATCH /vm HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n",
        huge.len()
    );
    // A server that has heard enough hangs up.
    let _ = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(huge.as_bytes()));
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");

    for (method, path, body) in [
        ("PATCH", "/vm", json!({ "state": 7 })),
        ("PATCH", "/vm", json!({ "state": "Paused", "force": true })),
        ("PUT", "/v1/power", json!({ "action": "destroy", "timeout_ms": -1 })),
        ("PUT", "/actions", json!({ "action_type": "InstanceStart" })),
        ("PUT", "/pmem/p", json!({})),
    ] {
        api.request(method, path, Some(&body)).fault();
    }
    let (first, second) = (api.clone(), api.clone());
    let clients = [first, second].map(|api| {
        std::thread::spawn(move || {
            for state in ["Paused", "Resumed"].repeat(10) {
                api.patch("/vm", &json!({ "state": state }));
            }
        })
    });
    for client in clients {
        client.join().expect("both are served");
    }
    api.patch("/vm", &json!({ "state": "Resumed" }));

    let ticks = vm.check("wc -l < /tmp/ticks");
    vm.check(&format!(
        "while test $(wc -l < /tmp/ticks) -le {}; do sleep 1; done",
        ticks.trim()
    ));
    drop(hanging);
    power_off(&managed);
}

#[test]
fn the_socket_is_its_owners_replaces_a_dead_ones_and_leaves_a_live_ones_alone() {
    let directory = scratch();
    let socket = directory.path().join("api");
    let start = || {
        let mut command = Monitor::command();
        command.arg("vmm").arg("--api-sock").arg(&socket);
        Vm::start(command)
    };
    let killed = start();
    Api::new(&socket).wait_ready();
    killed.kill();
    killed.wait();
    let metadata = fs::metadata(&socket).expect("a killed process leaves its socket behind");
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    let live = start();
    Api::new(&socket).wait_ready();
    let other = cutover(["vmm".as_ref(), "--api-sock".as_ref(), socket.as_os_str()]);
    assert_eq!(other.exit, Exit::Error);
    assert!(other.stderr.contains("another process does"), "{}", other.stderr);
    assert_eq!(Api::new(&socket).get("/")["state"], "Not started");

    live.monitor().signal(Signal::TERM);
    assert_eq!(live.wait(), Exit::Forced);
    assert!(!socket.exists());
}
