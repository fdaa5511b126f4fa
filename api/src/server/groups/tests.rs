//! A coordinator's API over its socket, with hosts that nobody answers for.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use cutover_cluster::runtime::coordinator::{Coordinator, Options};
use cutover_cluster::runtime::journal::{LEASE, SqliteJournal};
use cutover_migration::transport::{Endpoint, Listener, Security};
use hyper::{Method, StatusCode};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

use super::events::EventLog;
use super::types::{FailoverV1, GroupMemberV1, GroupStateV1, GroupStatusV1, GroupTimingV1, GroupV1, IntervalV1};
use crate::client::{ClientError, Vm};

/// Longer than anything takes, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A coordinator that serves its API.
struct Served {
    folder: TempDir,
    client: Vm,
    runtime: Runtime,
    _stop: oneshot::Sender<()>,
}

impl Served {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("api");
        let listener = UnixListener::bind(&socket).expect("a free path");
        listener.set_nonblocking(true).expect("a socket");
        let coordinator = Arc::new(coordinator(&folder));
        let (stop, stopped) = oneshot::channel();
        let runtime = || Builder::new_current_thread().enable_all().build().expect("threads");
        thread::spawn(move || runtime().block_on(super::serve(listener, coordinator, EventLog::default(), stopped)));
        let name = "the coordinator".to_owned();
        Self {
            folder,
            client: Vm { name, socket },
            runtime: runtime(),
            _stop: stop,
        }
    }

    fn create(&self, group: &GroupV1) -> Result<(), ClientError> {
        let create = self.client.tell(Method::POST, "/v1/groups", group, PATIENCE);
        self.runtime.block_on(create)
    }

    fn status(&self, name: &str) -> Result<GroupStatusV1, ClientError> {
        self.runtime
            .block_on(self.client.get(&format!("/v1/groups/{name}"), PATIENCE))
    }

    /// A group of a VM on a host where there is no agent.
    fn group(&self, name: &str) -> GroupV1 {
        let host = |host| format!("unix:{}", self.folder.path().join(host).display());
        GroupV1 {
            name: name.to_owned(),
            members: vec![GroupMemberV1 {
                name: "vm".to_owned(),
                host: host("a"),
                restore: None,
            }],
            backups: vec![host("b")],
            interval: IntervalV1::Fixed { ms: 50 },
            timing: GroupTimingV1::default(),
        }
    }
}

fn coordinator(folder: &TempDir) -> Coordinator {
    let endpoint = Endpoint::Unix(folder.path().join("link"));
    let listener = Listener::bind(&endpoint, &Security::default()).expect("a free path");
    let path = folder.path().join("journal.db");
    let journal = SqliteJournal::open(&path, &endpoint.to_string(), LEASE).expect("a journal");
    let options = Options {
        security: Security::default(),
        observer: Box::new(|_, _| ()),
    };
    Coordinator::start(listener, Box::new(journal), options).expect("threads")
}

#[test]
fn a_group_is_created_shown_and_stopped() {
    let served = Served::start();
    served.create(&served.group("shop")).expect("there may be such a group");
    let status = served.status("shop").expect("there is one");
    assert_eq!((status.state, status.cuts), (GroupStateV1::Unprotected, 0));
    assert_eq!(status.members[0].name, "vm");
    assert!(!status.members[0].connected);
    let stop = served.client.delete("/v1/groups/shop", PATIENCE);
    served.runtime.block_on(stop).expect("there is one");
    let gone = served.status("shop").expect_err("it is a group no more");
    assert!(
        matches!(
            gone,
            ClientError::Refused {
                status: StatusCode::NOT_FOUND,
                ..
            }
        ),
        "{gone}"
    );
    served.create(&served.group("shop")).expect("the name is free again");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let served = Served::start();
    served.create(&served.group("shop")).expect("there may be such a group");
    let refused = |group: GroupV1, reason: &str| {
        let error = served.create(&group).expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    };
    refused(served.group("shop"), "there is one of that name");
    refused(served.group("a/b"), "its name has 1 to 64 letters");
    let mut nowhere = served.group("nowhere");
    nowhere.backups = vec!["host".to_owned()];
    refused(nowhere, "'host' is not an endpoint");
    let mut hasty = served.group("hasty");
    hasty.timing.suspicion_ms = 1;
    refused(hasty, "suspicion must come later");
    let mut secret = served.group("secret");
    secret.backups = vec!["tls://host:1".to_owned()];
    refused(secret, "takes a certificate");
    let body = FailoverV1 {
        member: "vm".to_owned(),
    };
    let path = "/v1/groups/shop/failover";
    let failover = served.client.tell(Method::POST, path, &body, PATIENCE);
    let error = served.runtime.block_on(failover).expect_err("it is not protected");
    assert!(error.to_string().contains("the group is not protected now"), "{error}");
}
