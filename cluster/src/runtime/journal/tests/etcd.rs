//! An etcd of Debian's package `etcd-server`, on loopback, and what can happen to one.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cutover_migration::transport::HostPort;
use tempfile::TempDir;

use super::{PATIENCE, Place, record};
use crate::Error;
use crate::runtime::journal::location::{Cluster, Link};
use crate::runtime::journal::{Claim, EtcdJournal, Journal};

const HOST: &str = "127.0.0.1";

/// A member.
struct Server {
    process: Child,
    client: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().expect("it is ours");
        self.process.wait().expect("it was killed");
    }
}

/// A cluster, which is gone when it is dropped.
pub struct Etcd {
    servers: Vec<Server>,
    _folder: TempDir,
}

impl Default for Etcd {
    fn default() -> Self {
        Self::start(1)
    }
}

impl Etcd {
    /// Starts so many members; returns when they take what is written.
    pub fn start(members: usize) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let ports: Vec<(u16, u16)> = (0..members).map(|_| (free_port(), free_port())).collect();
        let all = ports.iter().enumerate();
        let all: Vec<_> = all
            .map(|(number, (_, peer))| format!("m{number}=http://{HOST}:{peer}"))
            .collect();
        let servers = ports.iter().enumerate().map(|(number, (client, peer))| {
            let (client_url, peer_url) = (format!("http://{HOST}:{client}"), format!("http://{HOST}:{peer}"));
            let name = format!("m{number}");
            let mut etcd = Command::new("etcd");
            etcd.arg("--data-dir")
                .arg(folder.path().join(&name))
                .args(["--name", &name]);
            etcd.args([
                "--listen-client-urls",
                &client_url,
                "--advertise-client-urls",
                &client_url,
            ]);
            etcd.args([
                "--listen-peer-urls",
                &peer_url,
                "--initial-advertise-peer-urls",
                &peer_url,
            ]);
            etcd.args(["--initial-cluster", &all.join(",")]);
            etcd.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
            let process = etcd
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            Server {
                process: process.expect("etcd is there: it is in Debian's package etcd-server"),
                client: *client,
            }
        });
        let started = Self {
            servers: servers.collect(),
            _folder: folder,
        };
        started.wait();
        started
    }

    /// Where it is reached.
    pub fn cluster(&self) -> Cluster {
        let server = |server: &Server| HostPort {
            host: HOST.to_owned(),
            port: server.client,
        };
        Cluster {
            servers: self.servers.iter().map(server).collect(),
            prefix: "test/groups".to_owned(),
            link: Link::Plain,
        }
    }

    fn wait(&self) {
        let until = Instant::now() + PATIENCE;
        let mut journal = EtcdJournal::open(&self.cluster(), "nobody", super::LEASE).expect("a journal");
        loop {
            match journal.claim().and_then(|_| journal.release()) {
                Ok(()) => return,
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kills the member that leads.
    fn kill_leader(&mut self) {
        let leads = |server: &Server| {
            let endpoint = format!("http://{HOST}:{}", server.client);
            let mut ask = Command::new("etcdctl");
            ask.args(["--endpoints", &endpoint, "endpoint", "status"])
                .env("ETCDCTL_API", "3");
            let output = ask.output().expect("etcdctl is there: it is in Debian's etcd-client");
            let status = String::from_utf8(output.stdout).expect("text");
            // endpoint, id, version, size, is leader, …
            status.split(", ").nth(4) == Some("true")
        };
        let leader = self.servers.iter().position(leads).expect("one of them leads");
        self.servers.remove(leader);
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((HOST, 0)).expect("a free port");
    listener.local_addr().expect("it has one").port()
}

#[test]
fn a_journal_outlives_the_leader_of_its_etcd() {
    let mut etcd = Etcd::start(3);
    let mut journal = EtcdJournal::open(&etcd.cluster(), "a", PATIENCE).unwrap();
    let record = record();
    assert_eq!(journal.claim().unwrap(), Claim::Granted);
    journal.put(&record).unwrap();
    etcd.kill_leader();
    for cut in 1..=50 {
        journal.put_cut(&record, cut).unwrap();
    }
    journal.renew().unwrap();
    assert_eq!(journal.records().unwrap()[0].permanent(), Some(50));
    let mut other = etcd.open("b", PATIENCE);
    assert_eq!(other.claim().unwrap(), Claim::Held { by: "a".to_owned() });
}

#[test]
fn an_etcd_without_a_majority_is_named_and_decides_nothing() {
    let mut etcd = Etcd::start(3);
    let mut journal = EtcdJournal::open(&etcd.cluster(), "a", super::LEASE).unwrap();
    let record = record();
    journal.claim().unwrap();
    journal.put(&record).unwrap();
    etcd.servers.truncate(1);
    let error = journal.put_cut(&record, 1).expect_err("there is no majority");
    let Error::Journal { journal, action, .. } = error else {
        panic!("{error}");
    };
    assert!(journal.starts_with("etcd://127.0.0.1:"), "{journal}");
    assert_eq!(action, "write that a cut is permanent");
}
