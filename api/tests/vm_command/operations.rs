//! What changes the state of VMs: pause, resume, shutdown, reboot, cycle, destroy.

use std::sync::Mutex;
use std::sync::mpsc::channel;

use serde_json::json;

use crate::fake::{Answer, Machine, Request, info};

const RUNNING: &str = r#""kind":"vm_state","state":"running""#;
const BUILT: &str = r#""kind":"vm_state","state":"built""#;
const SHUTTING_DOWN: &str = r#""kind":"vm_state","state":"shutting_down""#;
const ENDED: &str = r#""kind":"vm_state","state":"ended""#;
const GUEST_SHUTDOWN: &str = r#""kind":"guest_shutdown""#;

/// A VM that accepts what is asked of it, and to which `events` happen then.
fn power(name: &'static str, events: fn(&mut Answer<'_>)) -> impl Fn(&Request, &mut Answer<'_>) + Send + Sync {
    move |request, answer| match request.line.as_str() {
        "GET /v1/info" => answer.json(&info(name)),
        "PUT /v1/power" => answer.done(),
        "GET /v1/events" => {
            answer.begin_events();
            events(answer);
        }
        line => panic!("nobody should ask {line}"),
    }
}

#[test]
fn each_vm_of_a_list_has_its_line_and_the_exit_code_tells_how_many_did() {
    let machine = Machine::new();
    let web = machine.running_vm("web");
    machine.running_vm("database");
    machine.vm("busy", |_, answer| {
        answer.text(400, &json!({ "fault_message": "the VM is already paused" }).to_string());
    });
    assert_eq!(
        machine.cutover(&["pause", "web", "database"]),
        (0, "web       paused\ndatabase  paused\n".to_owned(), String::new())
    );
    let request = &web.requests()[0];
    assert_eq!(
        (request.line.as_str(), &request.body),
        ("PATCH /vm", &json!({ "state": "Paused" }))
    );
    assert_eq!(
        machine.cutover(&["resume", "busy", "web"]),
        (
            6,
            "web   running\n".to_owned(),
            "cutover: error: busy: the VM is already paused\n".to_owned()
        )
    );
    let (code, out, _) = machine.cutover(&["pause", "busy", "--json"]);
    assert_eq!(code, 1);
    assert_eq!(
        out,
        "{\"error\":\"the VM is already paused\",\"ok\":false,\"vm\":\"busy\"}\n"
    );
    let (code, out, _) = machine.cutover(&["pause", "--all"]);
    assert_eq!((code, out.as_str()), (6, "database  paused\nweb       paused\n"));
}

#[test]
fn all_vms_are_asked_at_the_same_time() {
    let machine = Machine::new();
    let (first, second) = (channel(), channel());
    // Each answers only when the other has been asked.
    for (name, tell, wait) in [("a", first.0, second.1), ("b", second.0, first.1)] {
        let wait = Mutex::new(wait);
        machine.vm(name, move |_, answer| {
            tell.send(()).expect("the other waits");
            wait.lock().unwrap().recv().expect("the other is asked");
            answer.done();
        });
    }
    let (code, out, _) = machine.cutover(&["pause", "a", "b"]);
    assert_eq!((code, out.as_str()), (0, "a  paused\nb  paused\n"));
}

#[test]
fn a_shutdown_is_done_when_the_vm_is_gone() {
    let machine = Machine::new();
    let asked = machine.vm(
        "web",
        power("web", |answer| {
            answer.event(4, SHUTTING_DOWN);
            answer.event(5, GUEST_SHUTDOWN);
            answer.event(6, ENDED);
            answer.vm_is_gone("web");
        }),
    );
    let (code, out, errors) = machine.cutover(&["shutdown", "web", "--timeout", "1m"]);
    assert_eq!((code, out.as_str(), errors.as_str()), (0, "web  shut down\n", ""));
    assert_eq!(asked.lines(), ["GET /v1/info", "PUT /v1/power", "GET /v1/events"]);
    let requests = asked.requests();
    assert_eq!(requests[1].body, json!({ "action": "shutdown", "timeout_ms": 60_000 }));
    assert_eq!(
        requests[2].last_event_id.as_deref(),
        Some("3"),
        "nothing after the request is missed"
    );
}

#[test]
fn a_shutdown_by_force_is_told() {
    let machine = Machine::new();
    machine.vm(
        "web",
        power("web", |answer| {
            answer.event(4, SHUTTING_DOWN);
            answer.event(5, ENDED);
            answer.vm_is_gone("web");
        }),
    );
    let (code, out, _) = machine.cutover(&["shutdown", "web"]);
    assert_eq!(
        (code, out.as_str()),
        (0, "web  ended by force: the guest did not shut down in time\n")
    );
}

#[test]
fn a_reboot_is_done_when_the_vm_runs_again() {
    let machine = Machine::new();
    machine.vm(
        "web",
        power("web", |answer| {
            answer.event(4, SHUTTING_DOWN);
            answer.event(5, GUEST_SHUTDOWN);
            answer.event(6, BUILT);
            answer.event(7, RUNNING);
        }),
    );
    let asked = machine.vm(
        "failing",
        power("failing", |answer| {
            answer.event(4, BUILT);
            answer.event(5, ENDED);
        }),
    );
    let (code, out, errors) = machine.cutover(&["reboot", "web", "failing"]);
    assert_eq!(code, 6);
    assert_eq!(out, "web      rebooted\n");
    assert_eq!(errors, "cutover: error: failing: the VM is ended instead\n");
    assert_eq!(
        asked.requests()[1].body,
        json!({ "action": "reboot", "timeout_ms": 30_000 })
    );
}

#[test]
fn force_has_no_time_limit_and_need_not_be_waited_for() {
    let machine = Machine::new();
    let asked = machine.vm("web", power("web", |_| panic!("nobody waits")));
    for action in ["destroy", "cycle"] {
        let (code, out, _) = machine.cutover(&[action, "web", "--no-wait"]);
        assert_eq!((code, out.as_str()), (0, "web  accepted\n"));
    }
    let bodies: Vec<_> = asked.requests().into_iter().map(|request| request.body).collect();
    assert_eq!(bodies[1], json!({ "action": "destroy" }));
    assert_eq!(bodies[3], json!({ "action": "cycle" }));
}

#[test]
fn what_names_no_vm_is_wrong_usage() {
    let machine = Machine::new();
    for arguments in [
        &["pause"][..],
        &["pause", "web", "--all"],
        &["pause", "../web,"],
        &["pause", "-"],
        &["shutdown", "web", "--timeout", "soon"],
        &["events", "web", "--until", "asleep"],
        &["walk", "web"],
    ] {
        // A path may be anything, and is not there.
        let expected = if arguments[1..] == ["../web,"] { 1 } else { 2 };
        assert_eq!(machine.cutover(arguments).0, expected, "{arguments:?}");
    }
}
