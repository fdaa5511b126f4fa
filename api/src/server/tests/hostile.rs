//! Clients that make mistakes, and such as mean harm: answered or dropped, and the others do not notice.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use serde_json::Value;
use tokio::sync::oneshot;

use super::fake::{Fake, connect, exchange};
use crate::server::http::Json;
use crate::server::{BODY_MAX, connection};

const AN_HOUR: Duration = Duration::from_secs(3600);

/// The server serves others as before.
fn is_well(fake: &Fake) {
    assert_eq!(fake.get("/")["id"], "test");
}

#[test]
fn bodies_of_the_wrong_form_are_refused_with_the_reason_as_json() {
    let fake = Fake::new();
    for (path, body, reason) in [
        ("/boot-source", "", "the request has no body"),
        ("/boot-source", "kernel", "expected value at line 1 column 1"),
        ("/boot-source", "{", "EOF while parsing"),
        ("/boot-source", "[]", "of the form that this path takes"),
        (
            "/boot-source",
            r#"{"kernel_image_path":7}"#,
            "invalid type: integer `7`, expected a string",
        ),
        (
            "/boot-source",
            r#"{"kernel_image_path":"k","kernal":1}"#,
            "unknown field `kernal`",
        ),
        (
            "/boot-source",
            r#"{"kernel_image_path":"k","kernel_image_path":"k"}"#,
            "duplicate field `kernel_image_path`",
        ),
        (
            "/machine-config",
            r#"{"vcpu_count":256,"mem_size_mib":64}"#,
            "invalid value: integer `256`",
        ),
        (
            "/machine-config",
            r#"{"vcpu_count":1.5,"mem_size_mib":64}"#,
            "invalid type: floating point",
        ),
        ("/actions", r#"{"action_type":"Explode"}"#, "unknown variant `Explode`"),
        (
            "/v1/power",
            r#"{"action":"shutdown","timeout_ms":-1}"#,
            "invalid value: integer `-1`",
        ),
    ] {
        let fault = fake.refused("PUT", path, body);
        assert!(fault.contains(reason), "{path} {body}: {fault}");
    }
    let deep = "[".repeat(BODY_MAX);
    assert!(fake.refused("PUT", "/entropy", &deep).contains("of the form"));
}

#[test]
fn paths_and_methods_that_are_not_there_are_refused_as_json() {
    let fake = Fake::new();
    for (method, path, reason) in [
        ("GET", "/nothing", "there is nothing at /nothing"),
        ("PUT", "/drives", "there is nothing at /drives"),
        ("PUT", "/drives/a/b", "there is nothing at /drives/a/b"),
        ("GET", "/v1/nothing", "there is nothing at /v1/nothing"),
        ("GET", "/pmem", "not supported: pmem devices"),
        ("PATCH", "/balloon/hinting/start", "not supported: free page hinting"),
        ("PUT", "/drives/%ff", "the id in the path is not text"),
    ] {
        let fault = fake.refused(method, path, "");
        assert!(fault.contains(reason), "{method} {path}: {fault}");
    }
    for (method, path) in [
        ("GET", "/actions"),
        ("POST", "/machine-config"),
        ("DELETE", "/drives/a"),
    ] {
        let answer = fake.request(method, path, "");
        assert_eq!(answer.status, 405, "{method} {path}");
        assert_eq!(answer.fault(), format!("{method} is not possible at {path}"));
    }
}

#[test]
fn a_body_of_ten_megabytes_is_refused_unread() {
    let fake = Fake::new();
    let body = "x".repeat(10_000_000);
    let answer = fake.request("PUT", "/boot-source", &body);
    assert_eq!(answer.status, 413, "{answer:?}");
    assert!(answer.fault().contains("the body is too long"));
    is_well(&fake);
}

#[test]
fn the_longest_body_is_read_and_one_byte_more_is_not() {
    let fake = Fake::new();
    let body = |length: usize| format!("{{}}{}", " ".repeat(length - 2));
    fake.done("PUT", "/entropy", &body(BODY_MAX));
    assert_eq!(fake.request("PUT", "/entropy", &body(BODY_MAX + 1)).status, 413);
}

#[test]
fn a_body_without_an_announced_length_is_limited_too() {
    let fake = Fake::new();
    let chunk = format!("{BODY_MAX:x}\r\n{}\r\n", "x".repeat(BODY_MAX));
    let request = format!("PUT /entropy HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{chunk}");
    assert_eq!(exchange(fake.connect(), request.as_bytes()).status, 413);
    is_well(&fake);
}

#[test]
fn what_is_no_http_is_refused_and_the_connection_ended() {
    let fake = Fake::new();
    for garbage in [
        &b"\0\x01\x02\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"PUT / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    ] {
        assert_eq!(exchange(fake.connect(), garbage).status, 400, "{garbage:?}");
    }
    let header = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    assert_eq!(exchange(fake.connect(), header.as_bytes()).status, 431);
    is_well(&fake);
}

#[test]
fn clients_that_hang_do_not_keep_others_waiting() {
    let fake = Fake::new();
    let silent = fake.connect();
    let mut half_a_header = fake.connect();
    half_a_header
        .write_all(b"PUT /boot-source HTTP/1.1\r\nContent-")
        .expect("sent");
    let mut half_a_body = fake.connect();
    half_a_body
        .write_all(b"PUT /boot-source HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{\"kernel")
        .expect("sent");
    is_well(&fake);
    drop((silent, half_a_header, half_a_body));
    is_well(&fake);
    assert!(
        fake.refused("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)
            .contains("no kernel")
    );
}

#[test]
fn two_clients_at_once_are_both_served() {
    let fake = Fake::new();
    std::thread::scope(|scope| {
        for id in ["a", "b"] {
            let fake = &fake;
            scope.spawn(move || {
                for _ in 0..50 {
                    let body = format!(r#"{{"drive_id":"{id}","path_on_host":"{id}","is_root_device":false}}"#);
                    fake.done("PUT", &format!("/drives/{id}"), &body);
                }
            });
        }
    });
    assert_eq!(fake.get("/vm/config")["drives"].as_array().map(Vec::len), Some(2));
}

#[test]
fn one_connection_serves_many_requests() {
    let fake = Fake::new();
    let request = "GET /version HTTP/1.1\r\nHost: h\r\n\r\n".repeat(9);
    let last = "GET /version HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let answers = exchange(fake.connect(), format!("{request}{last}").as_bytes());
    assert_eq!(answers.body.matches("firecracker_version").count(), 10);
}

/// Runs the connections of a server whose clock goes on as soon as nothing else does. Its client has sent all of `request`
/// before: the clock waits for nobody.
fn with_a_hasty_clock(request: &[u8], client: impl FnOnce(UnixStream) + Send + 'static) {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("api");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("free path");
    listener.set_nonblocking(true).expect("a socket");
    let mut stream = connect(&path);
    stream.write_all(request).expect("sent");
    let client = std::thread::spawn(move || client(stream));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build();
    let (stop, stopped) = oneshot::channel();
    let watcher = std::thread::spawn(move || {
        let result = client.join();
        // The server may have ended by itself.
        let _ = stop.send(());
        result
    });
    runtime.expect("a runtime").block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).expect("a listener");
        let router = Router::new()
            .route("/long", get(async || tokio::time::sleep(AN_HOUR).await))
            .fallback(async |Json(_): Json<Value>| StatusCode::NO_CONTENT);
        connection::serve(listener, router, stopped).await;
    });
    watcher.join().expect("joined").expect("the client is content");
}

#[test]
fn a_client_that_sends_half_a_header_is_dropped_in_time() {
    with_a_hasty_clock(b"PUT /boot-source HTTP/1.1\r\nContent-", |mut client| {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("the server ends the connection");
        assert_eq!(answer, b"");
    });
}

#[test]
fn a_client_that_sends_half_a_body_is_told_and_dropped_in_time() {
    let request = b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{";
    with_a_hasty_clock(request, |client| {
        let answer = exchange(client, b"");
        assert_eq!((answer.status, answer.fault().contains("has not arrived")), (408, true));
    });
}

#[test]
fn a_client_that_is_silent_is_dropped_in_time() {
    with_a_hasty_clock(b"", |mut client| {
        assert_eq!(client.read(&mut [0]).expect("the server ends the connection"), 0);
    });
}

#[test]
fn a_client_that_waits_for_an_answer_is_not_dropped_however_long_that_takes() {
    let request = b"GET /long HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    with_a_hasty_clock(request, |client| assert_eq!(exchange(client, b"").status, 200));
}
