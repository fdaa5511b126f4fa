//! `cutover migrate`: what a VM is asked, and what comes of its answers.

use serde_json::{Value, json};

use crate::fake::{Machine, taken_apart};
use crate::interrupt::check_interrupt;

const MIGRATE: [&str; 4] = ["migrate", "web", "--to", "unix:/run/host2"];

fn report() -> Value {
    let none = json!({ "zero": 0, "unchanged": 0, "delta": 0, "compressed": 0, "raw": 0 });
    json!({
        "preparation_ns": 1_000_000,
        "downtime": {
            "total_ns": 6_000_000, "stop_ns": 1_000_000, "pages_ns": 2_000_000, "state_ns": 2_000_000,
            "handoff_ns": 1_000_000,
        },
        "resume_ns": 0, "total_ns": 1_500_000_000_u64, "wire_bytes": 64 << 20,
        "pages": { "zero": 10, "unchanged": 0, "delta": 0, "compressed": 0, "raw": 100 },
        "duplicate_pages": 20, "deferred_pages_saved": 0, "pages_pulled": 0, "pull_ns_max": 0,
        "throttle_percent_max": 0, "throttled_ns": 0,
        "rounds": [{
            "took_ns": 1, "pages": none, "wire_bytes": 2, "deferred_pages": 0, "dirtied_pages": 0, "throttle_percent": 0,
        }],
    })
}

#[test]
fn the_vm_is_asked_once_and_its_report_is_shown_in_words_or_as_json() {
    let machine = Machine::new();
    let asked = machine.vm("web", |_, answer| answer.json(&report()));
    let output = machine.program().args(MIGRATE).output().expect("built for this test");
    let words = "it runs at unix:/run/host2, moved in 1.50s: 64 MiB were sent in 1 round\n\
                 the guest stood still for 6.00 ms: stopping 1.00 ms, last pages 2.00 ms, state 2.00 ms, handing over \
                 1.00 ms\n\
                 pages: 110 (100 as they are, 10 zero), 20 more than once\n";
    assert_eq!(taken_apart(output), (0, words.to_owned(), String::new()));
    let options = ["--bandwidth", "1M", "--post-copy", "allow", "--disks", "move", "--json"];
    let output = machine.program().args(MIGRATE).args(options).output();
    let (code, out, errors) = taken_apart(output.expect("built for this test"));
    assert_eq!((code, errors.as_str()), (0, ""));
    assert_eq!(serde_json::from_str::<Value>(&out).expect("JSON"), report());
    let requests = asked.requests();
    assert_eq!(
        requests.len(),
        2,
        "nobody looks at the progress where there is no terminal"
    );
    assert_eq!(requests[0].line, "POST /v1/migration");
    let mut body = json!({
        "to": "unix:/run/host2", "downtime_ms": 30, "streams": 1, "post_copy": "never", "compression": "auto",
        "throttle": true, "disks": "shared", "insecure": false,
    });
    assert_eq!(requests[0].body, body);
    body["bandwidth"] = json!(1 << 20);
    body["post_copy"] = json!("allow");
    body["disks"] = json!("move");
    assert_eq!(requests[1].body, body);
}

#[test]
fn a_refusal_and_a_vm_that_is_gone_for_good_have_codes_of_their_own() {
    for (status, code) in [(400, 1), (504, 7)] {
        let machine = Machine::new();
        machine.vm("web", move |_, answer| {
            answer.text(status, &json!({ "fault_message": "it could not be" }).to_string());
        });
        let output = machine.program().args(MIGRATE).output().expect("built for this test");
        let told = "cutover: error: web: it could not be\n";
        assert_eq!(taken_apart(output), (code, String::new(), told.to_owned()));
    }
}

#[test]
fn an_interrupt_cancels_the_migration_and_the_vms_answer_is_waited_for() {
    check_interrupt(&MIGRATE, "POST /v1/migration", "DELETE /v1/migration");
}
