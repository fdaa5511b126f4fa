//! [`Api`]: a client of a monitor's API that hides nothing of what is on the wire.
//!
//! Written for the tests rather than taken from the `cutover` program, so that a fault is not made and overlooked on
//! both sides alike.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::environment::{PATIENCE, poll_until};

/// The API behind one Unix socket. Every request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

/// What a request was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP's status code.
    pub status: u16,
    /// What came with it.
    pub body: String,
}

/// One connection, for any number of requests.
pub struct Connection {
    stream: BufReader<UnixStream>,
}

/// A stream of server-sent events (HTML standard, "Server-sent events").
pub struct Events {
    lines: std::io::Lines<BufReader<UnixStream>>,
}

/// One server-sent event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its `id`, none if it had none.
    pub id: Option<u64>,
    /// Its `event`, empty if it had none.
    pub name: String,
    /// Its `data`.
    pub data: Value,
}

impl Api {
    /// The API at `socket`, which need not exist yet.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Waits until somebody listens.
    #[track_caller]
    pub fn wait_ready(&self) {
        poll_until("the API takes connections", || UnixStream::connect(&self.socket).ok());
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A connection on which nothing was sent yet.
    #[track_caller]
    pub fn connect(&self) -> Connection {
        self.try_connect()
            .unwrap_or_else(|error| panic!("cannot connect to {}: {error}", self.socket.display()))
    }

    /// The same, where there may be nobody who listens.
    ///
    /// # Errors
    /// Nobody does.
    pub fn try_connect(&self) -> std::io::Result<Connection> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Connection {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a request and waits for its answer.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.connect().request(method, path, body)
    }

    /// `GET path`, which must succeed with JSON.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.request("GET", path, None).success().json()
    }

    /// `PUT path`, which must succeed.
    #[track_caller]
    pub fn put(&self, path: &str, body: &Value) {
        self.request("PUT", path, Some(body)).success();
    }

    /// `PATCH path`, which must succeed.
    #[track_caller]
    pub fn patch(&self, path: &str, body: &Value) {
        self.request("PATCH", path, Some(body)).success();
    }

    /// `POST path`, which must succeed.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) {
        self.request("POST", path, Some(body)).success();
    }

    /// The events at `path`, those after event number `last` if it is given, otherwise from now on.
    #[track_caller]
    pub fn events(&self, path: &str, last: Option<u64>) -> Events {
        let mut connection = self.connect();
        let last = last.map_or_else(String::new, |id| format!("Last-Event-ID: {id}\r\n"));
        // Version 1.0 has no chunks: what follows the head is the stream itself.
        connection.send(
            format!("GET {path} HTTP/1.0\r\nHost: localhost\r\nAccept: text/event-stream\r\n{last}\r\n").as_bytes(),
        );
        let (status, _) = connection.head();
        assert_eq!(status, 200, "{path}");
        Events {
            lines: connection.stream.lines(),
        }
    }
}

impl Answer {
    /// Must be one that says that all went well.
    #[track_caller]
    pub fn success(self) -> Self {
        assert!((200..300).contains(&self.status), "{self:?}");
        self
    }

    /// Must refuse, with status code 400; returns the reason.
    #[track_caller]
    pub fn fault(&self) -> String {
        assert_eq!(self.status, 400, "{self:?}");
        let fault = &self.json()["fault_message"];
        fault
            .as_str()
            .unwrap_or_else(|| panic!("no reason given: {self:?}"))
            .to_owned()
    }

    /// The body, which must be JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Connection {
    /// Sends a request and waits for its answer.
    #[track_caller]
    pub fn request(&mut self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.ask(method, path, body);
        self.answer()
    }

    /// Sends a request.
    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) {
        let body = body.map_or_else(String::new, Value::to_string);
        let length = body.len();
        self.send(
            format!(
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
                 Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
            )
            .as_bytes(),
        );
    }

    /// Sends bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).expect("the server reads");
    }

    /// Waits for an answer to what was sent.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        let (status, length) = self.head();
        let mut body = vec![0; length];
        self.stream
            .read_exact(&mut body)
            .expect("the body is as long as announced");
        Answer {
            status,
            body: String::from_utf8(body).expect("UTF-8"),
        }
    }

    /// Whether the server ends the connection without another answer.
    #[track_caller]
    pub fn is_ended(&mut self) -> bool {
        match self.stream.fill_buf() {
            Ok(bytes) => bytes.is_empty(),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// The connection itself.
    pub fn into_stream(self) -> UnixStream {
        self.stream.into_inner()
    }

    /// Status code and length of the body, 0 if it is not told.
    #[track_caller]
    fn head(&mut self) -> (u16, usize) {
        let mut line = || {
            let mut line = String::new();
            self.stream.read_line(&mut line).expect("a line of the answer's head");
            assert!(line.ends_with("\r\n"), "the connection ended after '{line}'");
            line.trim_end().to_owned()
        };
        let start = line();
        let status = start.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("not an answer: {start}"));
        let mut length = 0;
        loop {
            let header = line();
            match header.split_once(':') {
                None => return (status, length),
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().expect("a length");
                }
                Some(_) => {}
            }
        }
    }
}

impl Iterator for Events {
    type Item = Event;

    /// The next event; none when the stream has ended.
    fn next(&mut self) -> Option<Event> {
        let mut event = Event {
            id: None,
            name: String::new(),
            data: Value::Null,
        };
        loop {
            let line = self.lines.next()?.expect("an event in time");
            match line.split_once(':').map(|(field, value)| (field, value.trim_start())) {
                Some(("id", id)) => event.id = Some(id.parse().expect("a number")),
                Some(("event", name)) => event.name = name.to_owned(),
                Some(("data", data)) => event.data = serde_json::from_str(data).expect("JSON"),
                // The blank line at the end of an event, unless it only follows a comment.
                None if !event.data.is_null() => return Some(event),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use serde_json::json;

    use super::*;

    /// What `client` makes of a server that answers any request by `answer`.
    fn answered<T>(answer: &'static str, client: impl FnOnce(&Api) -> T) -> T {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let head = BufReader::new(stream.try_clone().unwrap()).lines();
            assert!(head.map_while(Result::ok).any(|line| line.is_empty()));
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let result = client(&Api::new(&socket));
        server.join().unwrap();
        result
    }

    #[test]
    fn an_answer_is_read_up_to_its_length() {
        let fault = "HTTP/1.1 400 Bad Request\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}next";
        assert_eq!(answered(fault, |api| api.request("GET", "/", None).fault()), "no");
    }

    #[test]
    fn events_are_read_one_by_one_and_comments_passed_over() {
        let stream = "HTTP/1.0 200 OK\r\n\r\n:alive\n\nid: 7\nevent: state\ndata: {\"a\":1}\n\ndata: 2\n\n";
        let events: Vec<_> = answered(stream, |api| api.events("/", None).collect());
        let event = |id, name: &str, data| Event {
            id,
            name: name.to_owned(),
            data,
        };
        assert_eq!(
            events,
            [event(Some(7), "state", json!({"a": 1})), event(None, "", json!(2))]
        );
    }
}
