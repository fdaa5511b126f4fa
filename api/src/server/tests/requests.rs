//! Requests in the order in which clients send them, and out of order.

use cutover_snapshot::size::ByteSize;
use cutover_vmm::{BalloonUpdate, Error, Refusal};
use serde_json::json;
use utoipa::OpenApi;

use super::fake::{Fake, pretend};
use crate::server::openapi::Api;
use crate::server::v1::types::StatsV1;

const START: &str = r#"{"action_type":"InstanceStart"}"#;

#[test]
fn the_sequence_of_firecrackers_getting_started_configures_and_starts_a_vm() {
    let fake = Fake::new();
    assert_eq!(fake.get("/")["state"], "Not started");
    assert_eq!(fake.get("/machine-config")["mem_size_mib"], 128);
    for (path, body) in [
        (
            "/logger",
            r#"{"level":"Debug","show_level":true,"show_log_origin":true}"#,
        ),
        (
            "/boot-source",
            r#"{"kernel_image_path":"./vmlinux-6.1","boot_args":"console=ttyS0 reboot=k panic=1"}"#,
        ),
        (
            "/drives/rootfs",
            r#"{"drive_id":"rootfs","path_on_host":"./ubuntu.ext4","is_root_device":true,"is_read_only":false}"#,
        ),
        (
            "/network-interfaces/net1",
            r#"{"iface_id":"net1","guest_mac":"06:00:AC:10:00:02","host_dev_name":"tap0"}"#,
        ),
        ("/actions", START),
    ] {
        fake.done("PUT", path, body);
    }
    assert_eq!(fake.get("/")["state"], "Running");
    let spec = fake.told.lock().unwrap().spec.clone().expect("it was started");
    assert_eq!(spec.name.as_deref(), Some("test"));
    assert_eq!(spec.boot.cmdline, "console=ttyS0 reboot=k panic=1 root=/dev/vda rw");
    assert_eq!((spec.disks.len(), spec.nets.len()), (1, 1));
}

#[test]
fn a_vm_is_paused_and_resumed_any_number_of_times() {
    let fake = Fake::new();
    fake.start();
    for (state, told) in [
        ("Paused", "Paused"),
        ("Paused", "Paused"),
        ("Resumed", "Running"),
        ("Resumed", "Running"),
    ] {
        fake.done("PATCH", "/vm", &format!(r#"{{"state":"{state}"}}"#));
        assert_eq!(fake.get("/")["state"], told);
    }
}

#[test]
fn what_needs_a_vm_is_refused_before_there_is_one() {
    let fake = Fake::new();
    for (method, path, body) in [
        ("PATCH", "/vm", r#"{"state":"Paused"}"#),
        ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#),
        ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#),
        ("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":"b"}"#),
        (
            "PUT",
            "/snapshot/create",
            r#"{"snapshot_path":"s","mem_file_path":"m"}"#,
        ),
        ("PUT", "/v1/power", r#"{"action":"destroy"}"#),
        ("POST", "/v1/snapshots", r#"{"store":"s","name":"n"}"#),
        ("GET", "/v1/snapshots/current", ""),
        ("DELETE", "/v1/snapshots/current", ""),
        ("GET", "/v1/restore", ""),
        ("GET", "/v1/stats", ""),
        ("GET", "/v1/stats/dirty-rate", ""),
    ] {
        let reason = fake.refused(method, path, body);
        assert!(reason.contains("has not been started"), "{path}: {reason}");
    }
    assert_eq!(fake.get("/v1/info")["state"], "not_started");
}

#[test]
fn what_describes_a_vm_is_refused_once_it_is_started() {
    let fake = Fake::new();
    fake.start();
    for (method, path, body) in [
        ("PUT", "/boot-source", r#"{"kernel_image_path":"k"}"#),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":64}"#),
        ("PATCH", "/machine-config", r#"{"vcpu_count":1}"#),
        (
            "PUT",
            "/drives/a",
            r#"{"drive_id":"a","path_on_host":"b","is_root_device":false}"#,
        ),
        (
            "PUT",
            "/network-interfaces/e",
            r#"{"iface_id":"e","host_dev_name":"t"}"#,
        ),
        ("PUT", "/entropy", "{}"),
        ("PUT", "/serial", "{}"),
        ("PUT", "/logger", "{}"),
        ("PUT", "/metrics", r#"{"metrics_path":"m"}"#),
        ("PUT", "/snapshot/load", r#"{"snapshot_path":"s","mem_file_path":"m"}"#),
        ("PUT", "/v1/restore", r#"{"snapshot":"s"}"#),
        ("PUT", "/actions", START),
    ] {
        let reason = fake.refused(method, path, body);
        assert!(reason.contains("has been started"), "{path}: {reason}");
    }
}

#[test]
fn drives_and_interfaces_change_while_the_vm_runs_and_the_configuration_says_so() {
    let fake = Fake::new();
    fake.done(
        "PUT",
        "/drives/d",
        r#"{"drive_id":"d","path_on_host":"old","is_root_device":false}"#,
    );
    fake.done(
        "PUT",
        "/network-interfaces/e",
        r#"{"iface_id":"e","host_dev_name":"t"}"#,
    );
    fake.start();
    fake.done("PATCH", "/drives/d", r#"{"drive_id":"d","path_on_host":"new"}"#);
    let limiter = json!({ "ops": { "size": 5, "refill_time": 10 } });
    let patch = json!({ "iface_id": "e", "rx_rate_limiter": limiter }).to_string();
    fake.done("PATCH", "/network-interfaces/e", &patch);
    {
        let told = fake.told.lock().unwrap();
        assert_eq!(told.disks["d"].path, Some("new".into()));
        assert_eq!(
            told.nets["e"]
                .rx_rate_limiter
                .and_then(|limiter| limiter.ops)
                .expect("a limit")
                .size,
            5
        );
    }
    let config = fake.get("/vm/config");
    assert_eq!(config["drives"][0]["path_on_host"], "new");
    assert_eq!(config["network-interfaces"][0]["rx_rate_limiter"], limiter);
    assert_eq!(fake.get("/v1/info")["disks"][0]["path"], "new");
}

#[test]
fn a_change_that_the_vm_refuses_leaves_the_configuration_as_it_was() {
    let fake = Fake::new();
    fake.done(
        "PUT",
        "/drives/d",
        r#"{"drive_id":"d","path_on_host":"old","is_root_device":false}"#,
    );
    fake.start();
    fake.refused("PATCH", "/drives/d", r#"{"drive_id":"d","path_on_host":"missing"}"#);
    assert_eq!(fake.get("/vm/config")["drives"][0]["path_on_host"], "old");
    for (path, body, reason) in [
        (
            "/drives/x",
            r#"{"drive_id":"x","path_on_host":"a"}"#,
            "there is no drive \"x\"",
        ),
        (
            "/drives/d",
            r#"{"drive_id":"x","path_on_host":"a"}"#,
            "the path is that of \"d\"",
        ),
        ("/drives/d", r#"{"drive_id":"d"}"#, "there is nothing to change"),
    ] {
        let fault = fake.refused("PATCH", path, body);
        assert!(fault.contains(reason), "{fault}");
    }
}

#[test]
fn power_operations_reach_the_vm_and_an_ended_vm_says_so() {
    let fake = Fake::new();
    fake.start();
    fake.done("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#);
    fake.done("PUT", "/v1/power", r#"{"action":"shutdown","timeout_ms":1000}"#);
    assert_eq!(fake.get("/v1/info")["state"], "shutting_down");
    fake.done("PUT", "/v1/power", r#"{"action":"destroy"}"#);
    assert_eq!(fake.get("/v1/info")["state"], "ended");
    assert_eq!(
        fake.refused("PATCH", "/vm", r#"{"state":"Paused"}"#),
        "the VM has ended"
    );
}

#[test]
fn after_a_start_that_failed_the_reason_is_told_and_it_can_be_tried_again() {
    let (fake, asked) = Fake::built_by_hand();
    fake.done("PUT", "/boot-source", r#"{"kernel_image_path":"vmlinux"}"#);
    std::thread::scope(|scope| {
        let told = &fake.told;
        scope.spawn(move || {
            let build = asked.recv().expect("asked for");
            (build.answer)(Err(Error::Refused(Refusal::Confined)));
            let build = asked.recv().expect("asked for again");
            (build.answer)(Ok(pretend(told, build.plan)));
        });
        assert_eq!(fake.refused("PUT", "/actions", START), Refusal::Confined.to_string());
        assert_eq!(fake.get("/")["state"], "Not started");
        fake.done("PUT", "/actions", START);
    });
    assert_eq!(fake.get("/")["state"], "Running");
}

#[test]
fn a_start_goes_on_when_the_client_that_asked_for_it_goes_away() {
    use std::io::Write;

    let (fake, asked) = Fake::built_by_hand();
    fake.done("PUT", "/boot-source", r#"{"kernel_image_path":"vmlinux"}"#);
    let mut client = fake.connect();
    let length = START.len();
    write!(
        client,
        "PUT /actions HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n{START}"
    )
    .expect("sent");
    let build = asked.recv().expect("asked for");
    assert_eq!(fake.refused("PUT", "/actions", START), "the VM is being started");
    drop(client);
    (build.answer)(Ok(pretend(&fake.told, build.plan)));
    assert_eq!(fake.get("/")["state"], "Running");
}

#[test]
fn metrics_are_written_to_the_file_that_was_named_when_a_client_asks_for_it() {
    let fake = Fake::new();
    let file = fake.directory.path().join("metrics");
    let body = json!({ "metrics_path": file, "emit_id": true, "properties": { "zone": "a" } }).to_string();
    fake.done("PUT", "/metrics", &body);
    assert_eq!(fake.refused("PUT", "/metrics", &body), "metrics are configured already");
    fake.start();
    fake.done("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#);
    let lines = std::fs::read_to_string(file).expect("it was made");
    let line: serde_json::Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    assert_eq!(
        (&line["id"], &line["properties"]["zone"]),
        (&json!("test"), &json!("a"))
    );
}

#[test]
fn without_a_metrics_file_there_is_nothing_to_flush() {
    let fake = Fake::new();
    fake.start();
    let reason = fake.refused("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#);
    assert!(reason.contains("there is no metrics file"), "{reason}");
    let missing = fake.refused("PUT", "/metrics", r#"{"metrics_path":"/nonexistent/metrics"}"#);
    assert!(missing.contains("has been started"), "{missing}");
}

#[test]
fn the_dirty_rate_is_told_in_pages_and_bytes() {
    let fake = Fake::new();
    fake.start();
    assert_eq!(
        fake.get("/v1/stats/dirty-rate"),
        json!({ "interval_ns": 1_500_000_000, "pages": 300, "pages_per_second": 200, "bytes_per_second": 819_200 })
    );
}

#[test]
fn counters_are_told_in_our_form_and_in_that_of_prometheus() {
    let fake = Fake::new();
    fake.start();
    let expected = StatsV1::from(crate::metrics::testing::stats(7));
    assert_eq!(fake.get("/v1/stats"), serde_json::to_value(expected).expect("JSON"));
    let text = fake.request("GET", "/v1/metrics", "");
    assert_eq!(text.status, 200);
    assert!(text.body.ends_with("# EOF\n"), "{}", text.body);
}

#[test]
fn the_socket_is_gone_with_the_server() {
    let Fake { server, directory, .. } = Fake::new();
    server.stop();
    assert!(!directory.path().join("api").exists());
}

#[test]
fn every_operation_of_the_document_is_served() {
    let fake = Fake::new();
    let document = serde_json::to_value(Api::openapi()).expect("JSON");
    let mut operations = 0;
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let path = path.replace("{drive_id}", "x").replace("{iface_id}", "x");
        // Its answer does not end.
        if path == "/v1/events" {
            continue;
        }
        for method in methods.as_object().expect("methods").keys() {
            let answer = fake.request(&method.to_uppercase(), &path, "");
            assert_ne!(answer.status, 405, "{method} {path}");
            assert!(
                !answer.body.contains("there is nothing at"),
                "{method} {path}: {answer:?}"
            );
            operations += 1;
        }
    }
    assert!(operations > 20, "{operations}");
}

#[test]
fn a_balloon_is_asked_for_other_amounts_and_tells_what_it_has() {
    let fake = Fake::new();
    let refused = |method: &str, path: &str, body: &str, reason: &str| {
        let fault = fake.refused(method, path, body);
        assert!(fault.contains(reason), "{method} {path} {body}: {fault}");
    };
    refused("GET", "/balloon", "", "no balloon");
    let body = r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":5}"#;
    fake.done("PUT", "/balloon", body);
    refused("PATCH", "/balloon", r#"{"amount_mib":2}"#, "not been started");
    refused("GET", "/balloon/statistics", "", "not been started");
    fake.start();
    refused("PUT", "/balloon", body, "cannot be configured any more");
    fake.done("PATCH", "/balloon", r#"{"amount_mib":2}"#);
    let asked = BalloonUpdate {
        amount: Some(ByteSize::from_mib(2)),
        stats_interval_s: None,
    };
    assert_eq!(fake.told.lock().unwrap().balloon, Some(asked));
    fake.done("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":1}"#);
    let balloon = json!({
        "amount_mib": 2, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_reporting": false,
        "free_page_hinting": false
    });
    assert_eq!(fake.get("/balloon"), balloon);
    assert_eq!(fake.get("/vm/config")["balloon"], balloon);
    let told = json!({ "target_pages": 512, "actual_pages": 256, "target_mib": 2, "actual_mib": 1 });
    assert_eq!(fake.get("/balloon/statistics"), told);
}

#[test]
fn a_balloon_without_statistics_tells_none() {
    let fake = Fake::new();
    fake.done("PUT", "/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#);
    fake.start();
    let fault = fake.refused("GET", "/balloon/statistics", "");
    assert!(fault.contains("stats_polling_interval_s"), "{fault}");
}
