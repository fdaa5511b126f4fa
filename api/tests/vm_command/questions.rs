//! What VMs are and use: list, info, stats, metrics, console.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::thread;

use serde_json::{Value, json};

use crate::fake::{Machine, info};

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

#[test]
fn the_list_has_the_vms_that_run_and_none_that_have_died() {
    let machine = Machine::new();
    machine.running_vm("web");
    machine.running_vm("database");
    drop(machine.silent_vm("dead"));
    let (code, table, errors) = machine.cutover(&["list"]);
    assert_eq!((code, errors.as_str()), (0, ""));
    assert_eq!(
        table,
        "NAME      STATE    CPUS   MEMORY  PID  VERSION\n\
         database  running     2  256 MiB   42  1.2.3\n\
         web       running     2  256 MiB   42  1.2.3\n"
    );
    assert!(!machine.socket("dead").exists());
}

#[test]
fn a_machine_without_vms_has_an_empty_list() {
    let machine = Machine::new();
    let (code, table, _) = machine.cutover(&["list"]);
    assert_eq!((code, table.lines().count()), (0, 1));
    assert_eq!(machine.cutover(&["list", "--json"]), (0, String::new(), String::new()));
    assert_eq!(machine.cutover(&["pause", "--all"]), (0, String::new(), String::new()));
}

#[test]
fn a_vm_that_hangs_neither_stops_the_others_nor_goes_unnoticed() {
    let machine = Machine::new();
    machine.running_vm("web");
    let _hanging = machine.silent_vm("hanging");
    let (code, table, errors) = machine.cutover(&["list", "--timeout", "200ms"]);
    assert_eq!(
        (code, errors.as_str()),
        (6, "cutover: error: hanging: no answer within 200ms\n")
    );
    assert!(
        table.contains("hanging  no answer     -") && table.contains("web      running"),
        "{table}"
    );
    let (code, out, _) = machine.cutover(&["info", "hanging", "web", "--json", "--timeout", "200ms"]);
    assert_eq!(code, 6);
    let lines = json_lines(&out);
    assert_eq!(
        lines[0],
        json!({ "vm": "hanging", "ok": false, "error": "no answer within 200ms" })
    );
    assert_eq!((&lines[1]["vm"], &lines[1]["result"]), (&json!("web"), &info("web")));
}

#[test]
fn info_has_a_line_for_each_part() {
    let machine = Machine::new();
    machine.running_vm("web");
    let (code, out, _) = machine.cutover(&["info", machine.socket("web").to_str().expect("text")]);
    assert_eq!(code, 0);
    for line in [
        "state     running",
        "memory    256 MiB",
        "disk      root a.img (read-only)",
        "console   none",
    ] {
        assert!(out.lines().any(|found| found == line), "{line}\n{out}");
    }
}

#[test]
fn a_vm_that_is_not_there_is_told_by_its_socket() {
    let machine = Machine::new();
    let (code, out, errors) = machine.cutover(&["info", "web"]);
    assert_eq!((code, out.as_str()), (1, ""));
    let socket = machine.socket("web").display().to_string();
    assert_eq!(
        errors,
        format!("cutover: error: web: no VM listens on {socket}: `cutover vm list` shows those that do\n")
    );
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    let machine = Machine::new();
    machine.vm("text", |_, answer| answer.text(200, "hello"));
    machine.vm("noise", |_, answer| answer.raw("SSH-2.0-OpenSSH_9\r\n"));
    machine.vm("mute", |_, _| {});
    machine.vm("escape", |_, answer| {
        answer.text(400, &json!({ "fault_message": "no\u{1b}[2J\n" }).to_string());
    });
    machine.vm("endless", |_, answer| {
        answer.raw("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n");
        (0..5000).for_each(|_| answer.raw(&" ".repeat(1024)));
    });
    for (name, part) in [
        ("text", "an answer that makes no sense: expected value"),
        ("noise", "the connection failed: "),
        ("mute", "the connection failed: "),
        ("escape", "escape: no\\u{1b}[2J\\n\n"),
        ("endless", "an answer of more than 4194304 bytes"),
    ] {
        let (code, out, errors) = machine.cutover(&["info", name]);
        assert_eq!((code, out.as_str()), (1, ""), "{name}");
        assert!(errors.contains(part) && errors.lines().count() == 1, "{errors}");
    }
}

#[test]
fn stats_have_a_table_for_each_kind_of_part() {
    let machine = Machine::new();
    machine.vm("web", |request, answer| {
        assert_eq!(request.line, "GET /v1/stats");
        answer.json(&json!({
            "state": "running", "boots": 1, "uptime_ns": 61_000_000_000_u64,
            "cpus": [{ "cpu": 0, "time_ns": 1_500_000_000_u64, "exits": { "io_in": 3, "mmio_write": 4 } }],
            "memory": { "size_bytes": 256 << 20, "resident_bytes": 64 << 20 },
            "disks": [{
                "id": "root", "reads": 10, "writes": 20, "flushes": 30, "discards": 40, "read_bytes": 4096,
                "written_bytes": 1536, "failed": 0, "throttled": 5,
            }],
            "nets": [],
        }));
    });
    let (code, out, _) = machine.cutover(&["stats", "web"]);
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "web: running, up 1m 1s, memory 256 MiB of which 64 MiB resident\n\
         \x20 VCPU   TIME  EXITS\n\
         \x20    0  1.50s  io_in 3, mmio_write 4\n\
         \x20 DISK  READS   READ  WRITES  WRITTEN  FLUSHES  FAILED  THROTTLED\n\
         \x20 root     10  4 KiB      20  1.5 KiB       30       0          5\n"
    );
}

#[test]
fn metrics_are_passed_on_as_they_come() {
    let machine = Machine::new();
    let asked = machine.vm("web", |_, answer| {
        answer.text(200, "# TYPE a counter\na_total 1\n# EOF\n")
    });
    let (code, out, _) = machine.cutover(&["metrics", "web"]);
    assert_eq!((code, out.as_str()), (0, "# TYPE a counter\na_total 1\n# EOF\n"));
    assert_eq!(asked.lines(), ["GET /v1/metrics"]);
}

#[test]
fn a_console_on_a_socket_is_connected_with_standard_input_and_output() {
    let machine = Machine::new();
    let socket = machine.socket("web-console");
    let console = UnixListener::bind(&socket).expect("a free name");
    machine.vm("web", move |_, answer| {
        let mut info = info("web");
        info["serial"] = json!({ "kind": "socket", "path": socket });
        answer.json(&info);
    });
    let guest = thread::spawn(move || {
        let (mut client, _) = console.accept().expect("a client");
        let mut typed = [0; 3];
        client.read_exact(&mut typed).expect("what is typed");
        client.write_all(b"a.img\n").expect("it listens");
        typed
    });
    let mut client = machine
        .command(&["console", "web"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("built for this test");
    let mut input = client.stdin.take().expect("piped");
    input.write_all(b"ls\n").expect("it reads");
    drop(input);
    let output = client.wait_with_output().expect("the guest ends it");
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), &b"a.img\n"[..])
    );
    assert_eq!(&guest.join().expect("it has read"), b"ls\n");
}

#[test]
fn a_console_that_is_no_socket_is_refused_with_what_to_do() {
    let machine = Machine::new();
    machine.running_vm("web");
    let (code, _, errors) = machine.cutover(&["console", "web"]);
    assert_eq!(code, 1);
    assert!(errors.contains("--serial socket=FILE"), "{errors}");
}
