//! Following events: without a gap, whatever happens to the connection.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::mpsc::channel;

use serde_json::{Value, json};

use crate::fake::{Machine, info};

/// The numbers of the events in `out`, which is JSON.
fn sequences(out: &str) -> Vec<u64> {
    let event = |line: &str| serde_json::from_str::<Value>(line).expect(line)["event"]["sequence"].clone();
    out.lines()
        .map(|line| event(line).as_u64().expect("a number"))
        .collect()
}

const PAUSED: &str = r#""kind":"vm_state","state":"paused""#;
const RUNNING: &str = r#""kind":"vm_state","state":"running""#;
const ENDED: &str = r#""kind":"vm_state","state":"ended""#;

#[test]
fn a_client_that_loses_its_connection_misses_nothing_and_sees_nothing_twice() {
    let machine = Machine::new();
    let asked = machine.vm("web", |request, answer| {
        if request.line == "GET /v1/info" {
            return answer.json(&info("web"));
        }
        answer.begin_events();
        match request.last_event_id.as_deref() {
            Some("3") => {
                answer.event(4, RUNNING);
                // The connection breaks within an event.
                answer.raw("id: 5\ndata: {\"sequence\":5,\"unix_ti");
            }
            Some("4") => {
                answer.event(4, RUNNING);
                answer.event(5, PAUSED);
            }
            Some("5") => {
                answer.event(6, ENDED);
                answer.vm_is_gone("web");
            }
            other => panic!("nobody has seen {other:?}"),
        }
    });
    let (code, out, errors) = machine.cutover(&["events", "web", "--json"]);
    assert_eq!((code, errors.as_str()), (0, ""));
    assert_eq!(sequences(&out), [4, 5, 6]);
    let seen: Vec<_> = asked
        .requests()
        .into_iter()
        .map(|request| request.last_event_id)
        .collect();
    let seen: Vec<_> = seen.iter().flatten().map(String::as_str).collect();
    assert_eq!(seen, ["3", "4", "5"]);
}

#[test]
fn a_gap_is_told() {
    let machine = Machine::new();
    machine.vm("web", |request, answer| match request.line.as_str() {
        "GET /v1/info" => answer.json(&info("web")),
        _ => {
            assert_eq!(request.last_event_id.as_deref(), Some("1"));
            answer.begin_events();
            answer.event(90, r#""kind":"gap""#);
            answer.event(91, RUNNING);
            answer.event(92, r#""kind":"checkpoint","epoch":7"#);
            answer.event(93, ENDED);
            answer.vm_is_gone("web");
        }
    });
    let (code, out, _) = machine.cutover(&["events", "web", "--since", "1"]);
    assert_eq!(code, 0);
    assert_eq!(
        out,
        "1970-01-01T00:00:00.090Z web gap: the events up to 90 are lost\n\
         1970-01-01T00:00:00.091Z web 91 vm_state state=running\n\
         1970-01-01T00:00:00.092Z web 92 checkpoint epoch=7\n\
         1970-01-01T00:00:00.093Z web 93 vm_state state=ended\n"
    );
}

#[test]
fn waiting_for_a_state_ends_when_every_vm_has_it() {
    let machine = Machine::new();
    let paused = machine.vm("paused", |_, answer| {
        let mut info = info("paused");
        info["state"] = json!("paused");
        answer.json(&info);
    });
    machine.vm("running", |request, answer| match request.line.as_str() {
        "GET /v1/info" => answer.json(&info("running")),
        _ => {
            answer.begin_events();
            answer.event(4, RUNNING);
            answer.event(5, PAUSED);
            answer.event(6, RUNNING);
        }
    });
    let (code, out, _) = machine.cutover(&["events", "paused", "running", "--until", "paused", "--json"]);
    assert_eq!(code, 0);
    assert_eq!(sequences(&out), [4, 5]);
    assert_eq!(paused.lines(), ["GET /v1/info"], "it is in that state already");
}

#[test]
fn a_vm_that_ends_before_it_has_the_state_is_a_failure() {
    let machine = Machine::new();
    machine.vm("web", |request, answer| match request.line.as_str() {
        "GET /v1/info" => answer.json(&info("web")),
        _ => {
            answer.begin_events();
            answer.event(4, ENDED);
            answer.vm_is_gone("web");
        }
    });
    let (code, _, errors) = machine.cutover(&["events", "web", "--until", "paused"]);
    assert_eq!((code, errors.as_str()), (1, "cutover: error: web: the VM has ended\n"));
}

#[test]
fn a_stream_that_breaks_again_and_again_is_given_up() {
    let machine = Machine::new();
    machine.vm("web", |request, answer| match request.line.as_str() {
        "GET /v1/info" => answer.json(&info("web")),
        _ => answer.begin_events(),
    });
    let (code, _, errors) = machine.cutover(&["events", "web"]);
    assert_eq!(code, 1);
    assert_eq!(errors, "cutover: error: web: the connection broke 10 times in a row\n");
}

#[test]
fn events_are_shown_as_they_come() {
    let machine = Machine::new();
    let (go_on, wait) = channel();
    let wait = Mutex::new(wait);
    machine.vm("web", move |request, answer| match request.line.as_str() {
        "GET /v1/info" => answer.json(&info("web")),
        _ => {
            answer.begin_events();
            answer.event(4, PAUSED);
            wait.lock().unwrap().recv().expect("the test goes on");
            answer.event(5, ENDED);
            answer.vm_is_gone("web");
        }
    });
    let mut client = machine
        .command(&["events", "web"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("built for this test");
    let mut lines = BufReader::new(client.stdout.take().expect("piped")).lines();
    let first = lines.next().expect("a line").expect("text");
    assert!(first.ends_with("web 4 vm_state state=paused"), "{first}");
    go_on.send(()).expect("the VM waits");
    let second = lines.next().expect("a line").expect("text");
    assert!(second.ends_with("web 5 vm_state state=ended"), "{second}");
    assert!(lines.next().is_none());
    assert!(client.wait().expect("it ends").success());
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let machine = Machine::new();
    machine.vm("web", |request, answer| match request.line.as_str() {
        "GET /v1/info" => answer.json(&info("web")),
        _ => {
            answer.begin_events();
            (4..10_000).for_each(|sequence| answer.event(sequence, PAUSED));
        }
    });
    let mut client = machine
        .command(&["events", "web"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("built for this test");
    let mut first = String::new();
    let mut output = BufReader::new(client.stdout.take().expect("piped"));
    output.read_line(&mut first).expect("a line");
    drop(output);
    assert!(client.wait().expect("it ends").success());
}
