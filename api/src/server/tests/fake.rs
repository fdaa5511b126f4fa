//! A server with a VM that answers like one, by the rules of `lifecycle`, but has no guest.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cutover_devices::listener::Listener;
use cutover_devices::virtio::balloon::Statistics;
use cutover_migration::status::Phase;
use cutover_snapshot::spec::VmSpec;
use cutover_vmm::dirty::DirtyRate;
use cutover_vmm::migration::{MigrateRequest, MigrationProgress, MigrationReport};
use cutover_vmm::snapshot::{Kind, Method, SnapshotProgress, SnapshotReport, SnapshotRequest};
use cutover_vmm::{BalloonUpdate, Command, DiskUpdate, Error, EventLog, NetUpdate, Refusal, Reply, State};
use serde_json::Value;
use tempfile::TempDir;

use crate::log::{LogArgs, Logger};
use crate::metrics::testing;
use crate::plan::Plan;
use crate::server::instance::{Build, Builder, Built, Instance};
use crate::server::{BODY_MAX, Options, Server};

/// Longer than any answer takes, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, and what its VM was told.
pub struct Fake {
    pub directory: TempDir,
    pub events: EventLog,
    pub told: Arc<Mutex<Told>>,
    pub server: Server,
}

/// What the VM was told.
#[derive(Default)]
pub struct Told {
    pub spec: Option<VmSpec>,
    pub state: Option<State>,
    pub disks: HashMap<String, DiskUpdate>,
    pub nets: HashMap<String, NetUpdate>,
    pub balloon: Option<BalloonUpdate>,
    /// What a snapshot was asked for with, and whoever waits for it.
    pub snapshot: Option<(SnapshotRequest, Reply<SnapshotReport>)>,
    /// The same of a migration.
    pub migration: Option<(MigrateRequest, Reply<MigrationReport>)>,
    /// Told when one of them was asked for.
    work_asked: Option<Sender<()>>,
}

/// What a request was answered.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Fake {
    /// A VM that is built as soon as it is asked for.
    pub fn new() -> Self {
        let told = Arc::<Mutex<Told>>::default();
        let vm = told.clone();
        Self::with_builder(
            told,
            Box::new(move |build| (build.answer)(Ok(pretend(&vm, build.plan)))),
        )
    }

    /// A VM that is built when the test says so, by answering what comes out of the channel.
    pub fn built_by_hand() -> (Self, Receiver<Build>) {
        let (builds, asked): (Sender<Build>, _) = channel();
        let builder: Builder = Box::new(move |build| builds.send(build).expect("the test listens"));
        (Self::with_builder(Arc::default(), builder), asked)
    }

    fn with_builder(told: Arc<Mutex<Told>>, builder: Builder) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let listener = Listener::bind(&directory.path().join("api"), 16).expect("free path");
        let vmm_options = cutover_vmm::Options::default();
        let events = vmm_options.events.clone();
        let logger = Logger::open(&LogArgs::default()).expect("the standard error is there");
        let instance = Instance::new("test".to_owned(), builder, &vmm_options, logger).expect("the first subscriber");
        let options = Options {
            seccomp: false,
            body_max: BODY_MAX,
        };
        let server = Server::start(Some(listener), Arc::new(instance), options).expect("a thread is to be had");
        Self {
            directory,
            events,
            told,
            server,
        }
    }

    /// A connection on which nothing was sent yet.
    pub fn connect(&self) -> UnixStream {
        connect(&self.directory.path().join("api"))
    }

    /// Sends a request with this body, or none if it is empty, and waits for the answer.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Answer {
        let length = body.len();
        exchange(
            self.connect(),
            format!(
                "{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
            )
            .as_bytes(),
        )
    }

    /// `GET path`, which must be answered with JSON.
    pub fn get(&self, path: &str) -> Value {
        let answer = self.request("GET", path, "");
        assert_eq!(answer.status, 200, "{answer:?}");
        serde_json::from_str(&answer.body).expect("JSON")
    }

    /// A request that must be carried out.
    pub fn done(&self, method: &str, path: &str, body: &str) {
        let answer = self.request(method, path, body);
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (204, ""),
            "{method} {path} {body}"
        );
    }

    /// A request that must be refused; returns the reason.
    pub fn refused(&self, method: &str, path: &str, body: &str) -> String {
        let answer = self.request(method, path, body);
        assert_eq!(answer.status, 400, "{method} {path} {body}: {answer:?}");
        answer.fault()
    }

    /// Has somebody told when a snapshot or a migration is asked for. It is under way until the test ends it.
    pub fn work_asked(&self) -> Receiver<()> {
        let (asked, hear) = channel();
        self.told.lock().unwrap().work_asked = Some(asked);
        hear
    }

    /// Sends a request for work that takes long, and returns when the VM has been asked, with whoever waits for the
    /// answer.
    pub fn ask<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        (method, path, body): (&'scope str, &'scope str, &'scope str),
    ) -> thread::ScopedJoinHandle<'scope, Answer> {
        let asked = self.work_asked();
        let client = scope.spawn(move || self.request(method, path, body));
        asked.recv().expect("the VM is asked");
        client
    }

    /// Ends the snapshot that is under way; returns what was asked for.
    pub fn finish_snapshot(&self) -> SnapshotRequest {
        let (request, reply) = self.told.lock().unwrap().snapshot.take().expect("one is under way");
        reply.send(Ok(snapshot_report()));
        request
    }

    /// Ends the migration that is under way; returns what was asked for.
    pub fn finish_migration(&self, outcome: Result<MigrationReport, Error>) -> MigrateRequest {
        let (request, reply) = self.told.lock().unwrap().migration.take().expect("one is under way");
        reply.send(outcome);
        request
    }

    /// Configures a kernel and starts the VM.
    pub fn start(&self) {
        self.done("PUT", "/boot-source", r#"{"kernel_image_path":"vmlinux"}"#);
        self.done("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
    }
}

impl Told {
    fn tell_of_work(&self) {
        if let Some(asked) = &self.work_asked {
            asked.send(()).expect("the test listens");
        }
    }
}

impl Answer {
    /// The reason of a refusal, the body of which has nothing else.
    pub fn fault(&self) -> String {
        let body: HashMap<String, String> =
            serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert_eq!(body.len(), 1, "{self:?}");
        body["fault_message"].clone()
    }
}

/// A connection to the server at `socket`.
pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
    stream
}

/// Sends `request`, and reads until the server ends the connection.
pub fn exchange(mut stream: UnixStream, request: &[u8]) -> Answer {
    // A server that has heard enough answers before it has heard all.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    // A connection that is reset after the answer has given it all the same.
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Answer {
        status: status.unwrap_or_else(|| panic!("no status: {head}")),
        body: body.to_owned(),
    }
}

/// What comes of a snapshot.
pub fn snapshot_report() -> SnapshotReport {
    SnapshotReport {
        path: "store/name".into(),
        id: Some(uuid::Uuid::from_u128(7)),
        parent: None,
        kind: Kind::Full,
        method: Method::CopyOnWrite,
        method_reason: None,
        pause_ns: 1,
        total_ns: 2,
        memory_bytes: 3,
        disk_bytes: 4,
        file_bytes: 5,
    }
}

/// What a made-up snapshot says its VM consists of.
fn saved_spec() -> VmSpec {
    let spec = serde_json::json!({
        "name": "saved", "cpus": 3, "memory": { "size": "64M" }, "boot": { "kernel": "saved-kernel" },
        "disks": [{ "path": "saved.img" }],
    });
    serde_json::from_value(spec).expect("a VM")
}

/// A VM that keeps to the rules and notes down what it is told.
pub fn pretend(told: &Arc<Mutex<Told>>, plan: Plan) -> Built {
    let (spec, state) = match plan {
        Plan::Boot(spec) => (spec, State::Running),
        Plan::Restore(request) if request.paused => (saved_spec(), State::Paused),
        Plan::Restore(_) | Plan::Receive(..) => (saved_spec(), State::Running),
    };
    {
        let mut told = told.lock().unwrap();
        told.spec = Some(spec.clone());
        told.state = Some(state);
    }
    let told = told.clone();
    let vm = Box::new(move |command| serve(&mut told.lock().unwrap(), command));
    // What is asked of a controller is asked of a state driver, which there is none of.
    let controller = None;
    Built { spec, vm, controller }
}

fn serve(told: &mut Told, command: Command) {
    let state = told.state.expect("it was started");
    match command {
        Command::Lifecycle(request, reply) => reply.send(match state.after(request, Instant::now()) {
            Ok(step) => {
                told.state = Some(step.next);
                Ok(())
            }
            Err(refusal) => Err(refusal.into()),
        }),
        Command::State(reply) if state == State::Ended => reply.send(Err(Refusal::Ended.into())),
        Command::State(reply) => reply.send(Ok(state)),
        Command::UpdateDisk { update, reply, .. } if update.path == Some("missing".into()) => {
            reply.send(Err(Error::Refused(Refusal::Confined)));
        }
        Command::UpdateDisk { id, update, reply } => {
            told.disks.insert(id, update);
            reply.send(Ok(()));
        }
        Command::UpdateNet { id, update, reply } => {
            told.nets.insert(id, update);
            reply.send(Ok(()));
        }
        Command::UpdateBalloon { update, reply } => {
            told.balloon = Some(update);
            reply.send(Ok(()));
        }
        Command::BalloonStatistics(reply) => reply.send(Ok(Statistics {
            target_pages: 512,
            actual_pages: 256,
            ..Statistics::default()
        })),
        Command::Stats(reply) => reply.send(Ok(testing::stats(7))),
        Command::DirtyRate(reply) => reply.send(Ok(DirtyRate {
            pages: 300,
            interval: Duration::from_millis(1500),
        })),
        Command::Snapshot { reply, .. } if told.snapshot.is_some() => {
            reply.send(Err(Refusal::SnapshotUnderWay.into()));
        }
        Command::Snapshot { request, reply } => {
            told.snapshot = Some((request, reply));
            told.tell_of_work();
        }
        Command::SnapshotProgress(reply) => {
            let is_under_way = told.snapshot.is_some();
            reply.send(Ok(is_under_way.then_some(SnapshotProgress { done: 5, total: 10 })));
        }
        Command::CancelSnapshot(reply) => match told.snapshot.take() {
            Some((_, waiting)) => {
                waiting.send(Err(Error::SnapshotCancelled));
                reply.send(Ok(()));
            }
            None => reply.send(Err(Refusal::NoSnapshotUnderWay.into())),
        },
        Command::Migrate { reply, .. } if told.migration.is_some() => {
            reply.send(Err(Refusal::MigrationUnderWay.into()));
        }
        Command::Migrate { request, reply } => {
            told.migration = Some((request, reply));
            told.tell_of_work();
        }
        Command::MigrationProgress(reply) => reply.send(Ok(told.migration.as_ref().map(|_| MigrationProgress {
            phase: Phase::PreCopy,
            round: 2,
            pages_left: 7,
            expected_downtime: Some(Duration::from_millis(12)),
            ..MigrationProgress::default()
        }))),
        Command::CancelMigration(reply) => match told.migration.take() {
            Some((_, waiting)) => {
                waiting.send(Err(cutover_migration::Error::Cancelled.into()));
                reply.send(Ok(()));
            }
            None => reply.send(Err(Refusal::NoMigrationUnderWay.into())),
        },
        Command::RestoreProgress(reply) => reply.send(Ok(SnapshotProgress { done: 8, total: 8 })),
        // Its members are made up elsewhere.
        command @ (Command::Protect { .. }
        | Command::Protection(..)
        | Command::TakeCut { .. }
        | Command::ProtectionStatus(_)) => command.refuse(Refusal::NotProtected),
    }
}
