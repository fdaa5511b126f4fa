//! Snapshots and restores: what reaches the VM, answers that take long, clients that do not wait for them.

use std::io::Write;
use std::thread;

use cutover_snapshot::spec::SerialSpec;
use cutover_vmm::snapshot::{ClockPolicy, Disks, Kind, SnapshotRequest, Source, Target};
use cutover_vmm::{Error, Refusal};
use serde_json::{Value, json};

use super::fake::{Fake, pretend, snapshot_report};
use crate::plan::Plan;
use crate::server::v1::types::SnapshotReportV1;

const SNAPSHOT: &str = r#"{"store":"/store","name":"monday"}"#;
const CREATE: &str = r#"{"snapshot_type":"Diff","snapshot_path":"state","mem_file_path":"memory"}"#;
const LOAD: &str =
    r#"{"snapshot_path":"state","mem_file_path":"memory","clock_realtime":true,"track_dirty_pages":true}"#;
const RESTORE: &str = r#"{"snapshot":"/store/monday","paused":true}"#;
const NOTHING_UNDER_WAY: &str = r#"{"under_way":false,"done_bytes":0,"total_bytes":0}"#;

fn progress(fake: &Fake) -> Value {
    fake.get("/v1/snapshots/current")
}

#[test]
fn a_snapshot_is_answered_when_it_is_permanent_and_everyone_else_is_served_meanwhile() {
    let fake = Fake::new();
    fake.start();
    thread::scope(|scope| {
        let client = fake.ask(scope, ("POST", "/v1/snapshots", SNAPSHOT));
        assert_eq!(
            progress(&fake),
            json!({ "under_way": true, "done_bytes": 5, "total_bytes": 10 })
        );
        assert_eq!(fake.get("/")["state"], "Running");
        let second = fake.refused("POST", "/v1/snapshots", SNAPSHOT);
        assert_eq!(second, Refusal::SnapshotUnderWay.to_string());
        let request = SnapshotRequest {
            target: Target::Store {
                store: "/store".into(),
                name: "monday".to_owned(),
            },
            kind: Kind::Full,
            disks: Disks::Copied,
            compress: None,
        };
        assert_eq!(fake.finish_snapshot(), request);
        let answer = client.join().expect("answered");
        assert_eq!(answer.status, 201, "{answer:?}");
        let report: SnapshotReportV1 = serde_json::from_str(&answer.body).expect("a report");
        assert_eq!(report, snapshot_report().into());
    });
    assert_eq!(progress(&fake).to_string(), ordered(NOTHING_UNDER_WAY));
}

/// The same JSON as a [`Value`] writes it.
fn ordered(json: &str) -> String {
    serde_json::from_str::<Value>(json).expect("JSON").to_string()
}

#[test]
fn a_snapshot_that_is_cancelled_is_refused_to_whoever_waits_for_it() {
    let fake = Fake::new();
    fake.start();
    let nothing = fake.refused("DELETE", "/v1/snapshots/current", "");
    assert_eq!(nothing, Refusal::NoSnapshotUnderWay.to_string());
    thread::scope(|scope| {
        let client = fake.ask(scope, ("POST", "/v1/snapshots", SNAPSHOT));
        fake.done("DELETE", "/v1/snapshots/current", "");
        let answer = client.join().expect("answered");
        assert_eq!(
            (answer.status, answer.fault()),
            (400, Error::SnapshotCancelled.to_string()),
            "{answer:?}"
        );
    });
    assert_eq!(fake.get("/")["state"], "Running");
}

#[test]
fn a_snapshot_goes_on_when_the_client_that_asked_for_it_goes_away() {
    let fake = Fake::new();
    fake.start();
    let asked = fake.work_asked();
    let mut client = fake.connect();
    let length = SNAPSHOT.len();
    write!(
        client,
        "POST /v1/snapshots HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n{SNAPSHOT}"
    )
    .expect("sent");
    asked.recv().expect("the VM is asked");
    drop(client);
    assert_eq!(progress(&fake)["under_way"], true);
    fake.finish_snapshot();
    thread::scope(|scope| {
        let next = fake.ask(scope, ("POST", "/v1/snapshots", SNAPSHOT));
        fake.finish_snapshot();
        assert_eq!(next.join().expect("answered").status, 201);
    });
}

#[test]
fn firecrackers_snapshot_takes_a_pause_and_leaves_the_vm_paused() {
    let fake = Fake::new();
    fake.start();
    let reason = fake.refused("PUT", "/snapshot/create", CREATE);
    assert!(reason.contains("has to be paused"), "{reason}");
    fake.done("PATCH", "/vm", r#"{"state":"Paused"}"#);
    thread::scope(|scope| {
        let client = fake.ask(scope, ("PUT", "/snapshot/create", CREATE));
        let request = fake.finish_snapshot();
        let files = Target::Files {
            state: "state".into(),
            memory: "memory".into(),
        };
        assert_eq!((request.target, request.kind), (files, Kind::Incremental));
        let answer = client.join().expect("answered");
        assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    });
    assert_eq!(fake.get("/")["state"], "Paused");
    fake.done("PUT", "/v1/power", r#"{"action":"destroy"}"#);
    let ended = fake.refused("PATCH", "/vm", r#"{"state":"Resumed"}"#);
    assert_eq!(ended, Refusal::Ended.to_string());
}

#[test]
fn a_loaded_vm_has_the_name_and_console_of_this_process_and_its_configuration_is_that_of_the_snapshot() {
    let (fake, asked) = Fake::built_by_hand();
    fake.done("PUT", "/serial", r#"{"serial_out_path":"console"}"#);
    thread::scope(|scope| {
        let told = &fake.told;
        scope.spawn(move || {
            let build = asked.recv().expect("asked for");
            let Plan::Restore(request) = &build.plan else {
                panic!("a snapshot is to be restored");
            };
            assert_eq!(
                request.source,
                Source::Files {
                    state: "state".into(),
                    memory: "memory".into()
                }
            );
            assert_eq!((request.clock, request.paused), (ClockPolicy::Corrected, true));
            assert_eq!(
                (request.name.as_deref(), &request.serial),
                (Some("test"), &SerialSpec::File("console".into()))
            );
            (build.answer)(Ok(pretend(told, build.plan)));
        });
        fake.done("PUT", "/snapshot/load", LOAD);
    });
    assert_eq!(fake.get("/")["state"], "Paused");
    let config = fake.get("/vm/config");
    assert_eq!(config["boot-source"]["kernel_image_path"], "saved-kernel");
    assert_eq!(config["drives"][0]["path_on_host"], "saved.img");
    assert_eq!(
        config["machine-config"],
        json!({ "vcpu_count": 3, "mem_size_mib": 64, "smt": false, "track_dirty_pages": true, "huge_pages": "None" })
    );
    fake.done("PATCH", "/vm", r#"{"state":"Resumed"}"#);
    assert_eq!(fake.get("/")["state"], "Running");
}

#[test]
fn a_vm_is_restored_from_a_store_and_tells_how_much_of_it_is_there() {
    let fake = Fake::new();
    fake.done("PUT", "/v1/restore", RESTORE);
    assert_eq!(fake.get("/v1/info")["state"], "paused");
    assert_eq!(fake.get("/v1/info")["cpus"], 3);
    assert_eq!(
        fake.get("/v1/restore"),
        json!({ "under_way": false, "done_bytes": 8, "total_bytes": 8 })
    );
    let again = fake.refused("PUT", "/v1/restore", RESTORE);
    assert!(again.contains("has been started"), "{again}");
}

#[test]
fn after_a_restore_that_failed_the_reason_is_told_and_another_can_be_tried() {
    let (fake, asked) = Fake::built_by_hand();
    thread::scope(|scope| {
        let told = &fake.told;
        scope.spawn(move || {
            let build = asked.recv().expect("asked for");
            (build.answer)(Err(Error::Refused(Refusal::Confined)));
            let build = asked.recv().expect("asked for again");
            (build.answer)(Ok(pretend(told, build.plan)));
        });
        assert_eq!(
            fake.refused("PUT", "/v1/restore", RESTORE),
            Refusal::Confined.to_string()
        );
        assert_eq!(fake.get("/")["state"], "Not started");
        fake.done("PUT", "/v1/restore", RESTORE);
    });
    assert_eq!(fake.get("/")["state"], "Paused");
}

#[test]
fn a_restore_takes_a_process_in_which_no_vm_is_described() {
    let fake = Fake::new();
    fake.done("PUT", "/boot-source", r#"{"kernel_image_path":"vmlinux"}"#);
    for (path, body) in [("/snapshot/load", LOAD), ("/v1/restore", RESTORE)] {
        let reason = fake.refused("PUT", path, body);
        assert!(reason.starts_with("a boot source is configured already"), "{reason}");
    }
    fake.done("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
}

#[test]
fn what_is_no_snapshot_is_refused_with_the_reason() {
    let fake = Fake::new();
    fake.start();
    for (body, reason) in [
        ("", "the request has no body"),
        (r#"{"store":"s"}"#, "missing field `name`"),
        (r#"{"store":"s","name":"n","kind":"half"}"#, "unknown variant `half`"),
        (
            r#"{"store":"s","name":"n","compress":20}"#,
            "compress: 20 is out of range",
        ),
        (r#"{"store":"s","name":"n","force":true}"#, "unknown field `force`"),
        (r#"{"store":7,"name":"n"}"#, "invalid type: integer `7`"),
    ] {
        let fault = fake.refused("POST", "/v1/snapshots", body);
        assert!(fault.contains(reason), "{body}: {fault}");
    }
    assert!(
        fake.told.lock().unwrap().snapshot.is_none(),
        "none of it reached the VM"
    );
}
