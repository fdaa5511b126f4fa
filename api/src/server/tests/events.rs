//! Those who watch: what they are sent, what they miss, how they come back.

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::net::UnixStream;

use cutover_vmm::events::{EVENTS_MAX, EventKind};

use super::fake::{Fake, exchange};
use crate::server::v1::events::WATCHERS_MAX;
use crate::server::v1::types::{EventKindV1, EventV1};

/// A client that watches.
struct Watcher(Lines<BufReader<UnixStream>>);

impl Watcher {
    /// Watches from the event after number `last` on, or from the first.
    fn new(fake: &Fake, last: Option<u64>) -> Self {
        let mut stream = fake.connect();
        let last = last.map_or(String::new(), |last| format!("Last-Event-ID: {last}\r\n"));
        write!(stream, "GET /v1/events HTTP/1.0\r\n{last}\r\n").expect("sent");
        let mut lines = BufReader::new(stream).lines();
        let status = lines.next().expect("an answer").expect("text");
        assert!(status.contains("200"), "{status}");
        assert!(
            lines.any(|line| line.expect("text").is_empty()),
            "the header has an end"
        );
        Self(lines)
    }
}

impl Iterator for Watcher {
    type Item = EventV1;

    /// The next event, the fields of which have to agree with its data; none at the end of the stream.
    fn next(&mut self) -> Option<EventV1> {
        let (mut id, mut name) = (String::new(), String::new());
        loop {
            let line = self.0.next()?.expect("text");
            match line.split_once(": ") {
                Some(("id", text)) => id = text.to_owned(),
                Some(("event", text)) => name = text.to_owned(),
                Some(("data", text)) => {
                    let event: EventV1 = serde_json::from_str(text).expect(text);
                    assert_eq!(id, event.sequence.to_string());
                    assert!(text.contains(&format!(r#""kind":"{name}""#)), "{name}: {text}");
                    return Some(event);
                }
                _ => {}
            }
        }
    }
}

fn sequences(watcher: &mut Watcher, count: usize) -> Vec<u64> {
    watcher.take(count).map(|event| event.sequence).collect()
}

#[test]
fn a_client_is_sent_what_has_happened_and_then_what_happens() {
    let fake = Fake::new();
    fake.events.push(EventKind::GuestReset);
    let mut watcher = Watcher::new(&fake, None);
    assert_eq!(
        watcher.next().map(|event| (event.sequence, event.kind)),
        Some((1, EventKindV1::GuestReset))
    );
    fake.events.push(EventKind::GuestPanic);
    fake.events.push(EventKind::GuestShutdown);
    let kinds: Vec<_> = watcher.take(2).map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKindV1::GuestPanic, EventKindV1::GuestShutdown]);
}

#[test]
fn a_client_that_comes_back_has_missed_nothing() {
    let fake = Fake::new();
    let mut watcher = Watcher::new(&fake, None);
    fake.events.push(EventKind::GuestReset);
    assert_eq!(sequences(&mut watcher, 1), [1]);
    drop(watcher);
    for _ in 0..3 {
        fake.events.push(EventKind::GuestReset);
    }
    assert_eq!(sequences(&mut Watcher::new(&fake, Some(1)), 3), [2, 3, 4]);
    assert_eq!(sequences(&mut Watcher::new(&fake, Some(3)), 1), [4]);
}

#[test]
fn a_client_that_was_away_for_too_long_is_told_of_the_gap() {
    let fake = Fake::new();
    for _ in 0..EVENTS_MAX + 5 {
        fake.events.push(EventKind::GuestReset);
    }
    let mut watcher = Watcher::new(&fake, Some(2));
    let gap = watcher.next().expect("a gap");
    assert_eq!((gap.sequence, gap.kind), (5, EventKindV1::Gap));
    assert_eq!(sequences(&mut watcher, 1), [6]);
}

#[test]
fn a_client_that_comes_from_another_process_is_told_of_the_gap_and_gets_everything() {
    let fake = Fake::new();
    fake.events.push(EventKind::GuestReset);
    let mut watcher = Watcher::new(&fake, Some(1000));
    assert_eq!(watcher.next().map(|event| event.kind), Some(EventKindV1::Gap));
    assert_eq!(sequences(&mut watcher, 1), [1]);
}

#[test]
fn the_stream_ends_with_the_server_after_the_last_event() {
    let fake = Fake::new();
    let watcher = Watcher::new(&fake, None);
    fake.events.push(EventKind::GuestReset);
    fake.events.push(EventKind::GuestShutdown);
    fake.server.stop();
    let kinds: Vec<_> = watcher.map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKindV1::GuestReset, EventKindV1::GuestShutdown]);
}

#[test]
fn more_clients_than_may_watch_are_refused_until_one_leaves() {
    let fake = Fake::new();
    fake.events.push(EventKind::GuestReset);
    let mut watchers: Vec<_> = (0..WATCHERS_MAX).map(|_| Watcher::new(&fake, None)).collect();
    let answer = fake.request("GET", "/v1/events", "");
    assert_eq!(answer.status, 429, "{answer:?}");
    assert!(answer.fault().contains("watch the events already"));
    drop(watchers.pop());
    // The server notices that one is gone when it has something to send, or when it looks at the connection.
    while fake.request("HEAD", "/v1/events", "").status == 429 {
        fake.events.push(EventKind::GuestReset);
    }
}

#[test]
fn what_is_no_number_of_an_event_is_refused() {
    let fake = Fake::new();
    for id in ["x", "-1", "18446744073709551616", "\u{e9}"] {
        let request = format!("GET /v1/events HTTP/1.1\r\nHost: h\r\nConnection: close\r\nLast-Event-ID: {id}\r\n\r\n");
        let answer = exchange(fake.connect(), request.as_bytes());
        assert_eq!(
            (answer.status, answer.fault().contains("Last-Event-ID")),
            (400, true),
            "{id}"
        );
    }
}
