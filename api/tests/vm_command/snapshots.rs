//! `cutover snapshot create`: what a VM is asked, and what comes of its answers.

use serde_json::{Value, json};

use crate::fake::{Machine, taken_apart};
use crate::interrupt::check_interrupt;

const CREATE: [&str; 7] = ["snapshot", "create", "web", "--store", "/store", "--name", "monday"];

fn report() -> Value {
    json!({
        "path": "/store/monday", "id": "00000000-0000-0000-0000-000000000007", "kind": "full",
        "method": "copy_on_write", "pause_ns": 1_500_000, "total_ns": 2_000_000_000_u64, "memory_bytes": 128 << 20,
        "disk_bytes": 0, "file_bytes": 64 << 20,
    })
}

#[test]
fn the_vm_is_asked_once_and_its_report_is_shown_in_words_or_as_json() {
    let machine = Machine::new();
    let asked = machine.vm("web", |_, answer| answer.text(201, &report().to_string()));
    let output = machine.program().args(CREATE).output().expect("built for this test");
    let words = "/store/monday: 128 MiB of memory and 0 B of disks in files of 64 MiB\n\
                 made in 2.00s, for 1.50 ms of which the guest stood still\n";
    assert_eq!(taken_apart(output), (0, words.to_owned(), String::new()));
    let options = ["--incremental", "--reference-disks", "--compress", "3", "--json"];
    let output = machine.program().args(CREATE).args(options).output();
    let (code, out, errors) = taken_apart(output.expect("built for this test"));
    assert_eq!((code, errors.as_str()), (0, ""));
    assert_eq!(serde_json::from_str::<Value>(&out).expect("JSON"), report());
    let requests = asked.requests();
    assert_eq!(
        requests.len(),
        2,
        "nobody looks at the progress where there is no terminal"
    );
    assert_eq!(requests[0].line, "POST /v1/snapshots");
    assert_eq!(
        requests[0].body,
        json!({ "store": "/store", "name": "monday", "kind": "full", "disks": "copied" })
    );
    assert_eq!(
        requests[1].body,
        json!({
            "store": "/store", "name": "monday", "kind": "incremental", "disks": "referenced", "compress": 3,
        })
    );
}

#[test]
fn what_the_vm_refuses_is_told_with_its_name() {
    let machine = Machine::new();
    machine.vm("web", |_, answer| {
        answer.text(400, &json!({ "fault_message": "a snapshot is under way" }).to_string());
    });
    let output = machine.program().args(CREATE).output().expect("built for this test");
    let told = "cutover: error: web: a snapshot is under way\n";
    assert_eq!(taken_apart(output), (1, String::new(), told.to_owned()));
    let output = Machine::new().program().args(CREATE).output();
    let (code, _, errors) = taken_apart(output.expect("built for this test"));
    assert_eq!(code, 1);
    assert!(errors.contains("web: no VM listens on"), "{errors}");
}

#[test]
fn an_interrupt_cancels_the_snapshot_and_the_vms_answer_is_waited_for() {
    check_interrupt(&CREATE, "POST /v1/snapshots", "DELETE /v1/snapshots/current");
}
