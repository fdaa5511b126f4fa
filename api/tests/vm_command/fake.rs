//! Made-up VMs: servers that answer as a test says, in a runtime directory of the test's own.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

/// A directory of made-up VMs.
pub struct Machine {
    directory: TempDir,
}

/// What a client asked.
#[derive(Clone, Debug)]
pub struct Request {
    /// Method and path.
    pub line: String,
    /// The header of reconnecting event clients.
    pub last_event_id: Option<String>,
    /// The body; null if there is none.
    pub body: Value,
}

/// What a VM was asked, in order.
#[derive(Clone, Default)]
pub struct Asked(Arc<Mutex<Vec<Request>>>);

impl Asked {
    /// Method and path of each request.
    pub fn lines(&self) -> Vec<String> {
        self.requests().into_iter().map(|request| request.line).collect()
    }

    /// All requests.
    pub fn requests(&self) -> Vec<Request> {
        self.0.lock().expect("no test panics with it").clone()
    }
}

/// The connection of a client that has asked.
pub struct Answer<'a> {
    stream: &'a mut UnixStream,
    machine: PathBuf,
}

impl Answer<'_> {
    /// Answers with `status` and `body`.
    pub fn text(&mut self, status: u16, body: &str) {
        self.raw(&format!(
            "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        ));
    }

    /// Answers with `body`.
    pub fn json(&mut self, body: &Value) {
        self.text(200, &body.to_string());
    }

    /// Accepts without a word.
    pub fn done(&mut self) {
        self.raw("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    }

    /// Begins a stream of events.
    pub fn begin_events(&mut self) {
        self.raw("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n");
    }

    /// An event of the stream; `more` has its kind and what belongs to it.
    pub fn event(&mut self, sequence: u64, more: &str) {
        let data = format!(
            "{{\"sequence\":{sequence},\"unix_time_ns\":{},{more}}}",
            sequence * 1_000_000
        );
        self.raw(&format!("id: {sequence}\ndata: {data}\n\n"));
    }

    /// Sends `text` as it is.
    pub fn raw(&mut self, text: &str) {
        // A client that has gone away is what some tests are about.
        let _ = self.stream.write_all(text.as_bytes());
    }

    /// The VM called `name` is gone, with its socket, as after its process has ended.
    pub fn vm_is_gone(&self, name: &str) {
        fs::remove_file(socket(&self.machine, name)).expect("it was there");
    }
}

impl Machine {
    /// A machine without VMs.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("folder");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).expect("ours");
        Self { directory }
    }

    /// Where the VM called `name` listens.
    pub fn socket(&self, name: &str) -> PathBuf {
        socket(self.directory.path(), name)
    }

    /// Has a VM called `name` answer as `answer` does, for as long as the test runs.
    pub fn vm(&self, name: &str, answer: impl Fn(&Request, &mut Answer<'_>) + Send + Sync + 'static) -> Asked {
        let listener = self.silent_vm(name);
        let (asked, answer) = (Asked::default(), Arc::new(answer));
        let (record, machine) = (asked.clone(), self.directory.path().to_owned());
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let (record, answer, machine) = (record.clone(), answer.clone(), machine.clone());
                thread::spawn(move || {
                    let Some(request) = read_request(&stream) else { return };
                    record.0.lock().expect("no test panics with it").push(request.clone());
                    answer(
                        &request,
                        &mut Answer {
                            stream: &mut stream,
                            machine,
                        },
                    );
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        asked
    }

    /// A VM that runs well, and can tell what it is.
    pub fn running_vm(&self, name: &'static str) -> Asked {
        self.vm(name, move |request, answer| match request.line.as_str() {
            "GET /v1/info" => answer.json(&info(name)),
            "PATCH /vm" => answer.done(),
            line => panic!("nobody should ask {line}"),
        })
    }

    /// A VM that accepts connections as long as the result lives, and never says a word.
    pub fn silent_vm(&self, name: &str) -> UnixListener {
        UnixListener::bind(self.socket(name)).expect("a free name")
    }

    /// `cutover vm` with `arguments`, on this machine: exit code, standard output, standard error.
    pub fn cutover(&self, arguments: &[&str]) -> (i32, String, String) {
        taken_apart(self.command(arguments).output().expect("built for this test"))
    }

    /// `cutover vm` with `arguments`, on this machine.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program();
        command.arg("vm").args(arguments);
        command
    }

    /// `cutover`, on this machine.
    pub fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cutover"));
        command
            .env("CUTOVER_RUNTIME_DIR", self.directory.path())
            .stdin(Stdio::null());
        command
    }
}

/// Exit code, standard output, standard error.
pub fn taken_apart(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).expect("it is text");
    let code = output.status.code().expect("it was not killed");
    (code, text(output.stdout), text(output.stderr))
}

/// What a small VM called `name` says of itself.
pub fn info(name: &str) -> Value {
    json!({
        "id": name, "version": "1.2.3", "pid": 42, "state": "running", "cpus": 2, "memory_bytes": 256 << 20,
        "kernel": "vmlinux", "cmdline": "console=ttyS0", "disks": [{ "id": "root", "path": "a.img", "readonly": true }],
        "nets": [], "rng": true, "serial": { "kind": "null" }, "last_event": 3,
    })
}

fn socket(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

/// The request that comes over `stream`; none if its client leaves before the end.
fn read_request(stream: &UnixStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut next = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        Some(line.trim_end().to_owned())
    };
    let line = next()?.strip_suffix(" HTTP/1.1")?.to_owned();
    let mut headers = Vec::new();
    loop {
        match next()? {
            header if header.is_empty() => break,
            header => headers.push(header),
        }
    }
    let header = |name: &str| {
        let pairs = headers.iter().filter_map(|header| header.split_once(": "));
        let mut found = pairs.filter(|(key, _)| key.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value.to_owned())
    };
    let length = header("content-length").map_or(0, |length| length.parse().expect("a number"));
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request {
        line,
        last_event_id: header("last-event-id"),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    })
}
