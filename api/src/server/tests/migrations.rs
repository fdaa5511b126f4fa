//! Migrations: what reaches the VM, what is told on the way, and VMs that arrive.

use std::thread;

use cutover_migration::transport::Endpoint;
use cutover_vmm::lifecycle::Handover;
use cutover_vmm::migration::MigrationReport;
use cutover_vmm::{Refusal, State};
use serde_json::{Value, json};

use super::fake::{Fake, pretend};
use crate::plan::Plan;
use crate::server::v1::types::MigrationReportV1;

const MIGRATION: &str = "/v1/migration";
const TO_HOST2: (&str, &str, &str) = ("POST", MIGRATION, r#"{"to":"unix:/run/vm.migrate"}"#);
const RECEPTION: &str = r#"{"listen":"unix:/run/vm.migrate","taps":{"net0":"tap7"}}"#;

fn report() -> MigrationReport {
    MigrationReport {
        total_ns: 5,
        ..MigrationReport::default()
    }
}

#[test]
fn a_migration_is_answered_when_the_vm_runs_elsewhere_and_told_of_meanwhile() {
    let fake = Fake::new();
    fake.start();
    assert_eq!(fake.get(MIGRATION), json!({}));
    thread::scope(|scope| {
        let client = fake.ask(scope, TO_HOST2);
        let under_way = &fake.get(MIGRATION)["under_way"];
        assert_eq!(
            (&under_way["phase"], &under_way["round"], &under_way["pages_left"]),
            (&json!("pre_copy"), &json!(2), &json!(7))
        );
        assert_eq!(under_way["expected_downtime_ns"], 12_000_000);
        let second = fake.refused("POST", MIGRATION, TO_HOST2.2);
        assert_eq!(second, Refusal::MigrationUnderWay.to_string());
        let request = fake.finish_migration(Ok(report()));
        assert_eq!(request.to, Endpoint::Unix("/run/vm.migrate".into()));
        let answer = client.join().expect("answered");
        assert_eq!(answer.status, 200, "{answer:?}");
        let answered: MigrationReportV1 = serde_json::from_str(&answer.body).expect("a report");
        assert_eq!(answered, (&report()).into());
    });
    let last = &fake.get(MIGRATION)["last"];
    assert_eq!(
        (&last["outcome"], &last["report"]["total_ns"]),
        (&json!("moved"), &json!(5))
    );
}

#[test]
fn a_migration_that_is_cancelled_is_refused_to_whoever_waits_for_it_and_the_vm_stays() {
    let fake = Fake::new();
    fake.start();
    let nothing = fake.refused("DELETE", MIGRATION, "");
    assert_eq!(nothing, Refusal::NoMigrationUnderWay.to_string());
    thread::scope(|scope| {
        let client = fake.ask(scope, TO_HOST2);
        fake.done("DELETE", MIGRATION, "");
        let answer = client.join().expect("answered");
        assert_eq!(
            (answer.status, answer.fault().as_str()),
            (400, "the migration was cancelled")
        );
    });
    let status = fake.get(MIGRATION);
    assert_eq!(
        status,
        json!({ "last": { "outcome": "failed", "reason": "the migration was cancelled" } })
    );
    assert_eq!(fake.get("/v1/info")["state"], "running");
}

#[test]
fn a_vm_that_was_handed_over_and_not_heard_of_has_a_status_of_its_own_and_can_be_had_back() {
    let fake = Fake::new();
    fake.start();
    thread::scope(|scope| {
        let client = fake.ask(scope, TO_HOST2);
        let handed_over = [Handover::Begin, Handover::Commit]
            .into_iter()
            .try_fold(State::Running, |state, step| {
                state.after_handover(step).map(|step| step.next)
            });
        fake.told.lock().unwrap().state = Some(handed_over.expect("it runs"));
        fake.finish_migration(Err(cutover_migration::Error::OutcomeUnknown("cut".to_owned()).into()));
        let answer = client.join().expect("answered");
        assert_eq!(answer.status, 504, "{answer:?}");
    });
    assert_eq!(fake.get("/v1/info")["state"], "handed_over");
    assert_eq!(fake.get("/")["state"], "Paused");
    let resumed = fake.refused("PATCH", "/vm", r#"{"state":"Resumed"}"#);
    assert_eq!(resumed, Refusal::HandedOver.to_string());
    fake.done("PUT", "/v1/migration/reclaim", "");
    assert_eq!(fake.get("/v1/info")["state"], "paused");
    let again = fake.refused("PUT", "/v1/migration/reclaim", "");
    assert_eq!(again, Refusal::NotHandedOver.to_string());
}

#[test]
fn what_is_no_migration_is_refused_with_the_reason() {
    let fake = Fake::new();
    assert_eq!(fake.get(MIGRATION), json!({}));
    let early = fake.refused("POST", MIGRATION, TO_HOST2.2);
    assert!(early.contains("has not been started"), "{early}");
    fake.start();
    for (body, reason) in [
        ("", "the request has no body"),
        ("{}", "missing field `to`"),
        (r#"{"to":"host2"}"#, "'host2' is not an endpoint"),
        (r#"{"to":"tcp://host2:7000"}"#, "use tls://, or set insecure"),
        (r#"{"to":"unix:a","streams":0}"#, "streams: 0 is out of range"),
        (r#"{"to":"unix:a","streams":300}"#, "invalid value: integer `300`"),
        (r#"{"to":"unix:a","downtime_ms":-1}"#, "invalid value: integer `-1`"),
        (r#"{"to":"unix:a","post_copy":"maybe"}"#, "unknown variant `maybe`"),
        (r#"{"to":"unix:a","force":true}"#, "unknown field `force`"),
    ] {
        let fault = fake.refused("POST", MIGRATION, body);
        assert!(fault.contains(reason), "{body}: {fault}");
    }
    assert!(
        fake.told.lock().unwrap().migration.is_none(),
        "none of it reached the VM"
    );
}

#[test]
fn a_vm_arrives_in_a_process_without_one_and_has_its_name() {
    let (fake, asked) = Fake::built_by_hand();
    thread::scope(|scope| {
        let client = scope.spawn(|| fake.request("PUT", "/v1/migration/receive", RECEPTION));
        let build = asked.recv().expect("asked for");
        let Plan::Receive(request, _) = &build.plan else {
            panic!("a VM is to arrive");
        };
        assert_eq!(request.listen, Endpoint::Unix("/run/vm.migrate".into()));
        assert_eq!(request.name.as_deref(), Some("test"));
        assert_eq!(request.nets["net0"].tap.as_deref(), Some("tap7"));
        assert_eq!(fake.get(MIGRATION)["under_way"]["phase"], "connecting");
        assert_eq!(fake.get("/v1/info")["state"], "arriving");
        (build.answer)(Ok(pretend(&fake.told, build.plan)));
        assert_eq!(client.join().expect("answered").status, 204);
    });
    assert_eq!(fake.get("/v1/info")["state"], "running");
    assert_eq!(fake.get("/v1/info")["cpus"], 3);
    assert_eq!(fake.get(MIGRATION), json!({}));
}

#[test]
fn waiting_for_a_vm_can_be_given_up_and_begun_again() {
    let (fake, asked) = Fake::built_by_hand();
    thread::scope(|scope| {
        let client = scope.spawn(|| fake.request("PUT", "/v1/migration/receive", RECEPTION));
        let build = asked.recv().expect("asked for");
        let Plan::Receive(_, status) = &build.plan else {
            panic!("a VM is to arrive");
        };
        fake.done("DELETE", MIGRATION, "");
        assert!(status.is_cancelled());
        (build.answer)(Err(cutover_migration::Error::Cancelled.into()));
        let answer = client.join().expect("answered");
        assert_eq!(
            (answer.status, answer.fault().as_str()),
            (400, "the migration was cancelled")
        );
    });
    let status: Value = fake.get(MIGRATION);
    assert_eq!(status["last"]["reason"], "the migration was cancelled");
    assert_eq!(status.get("under_way"), None);
    assert_eq!(fake.get("/v1/info")["state"], "not_started");
    fake.refused("DELETE", MIGRATION, "");
}
