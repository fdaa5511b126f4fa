//! Requests to the servers of an etcd cluster, by its JSON gateway, which every server has at the port of its clients.
//!
//! A request goes to the server that answered last, and on to the others in turn, as long as it may take: a server that
//! is gone, and a cluster that elects a leader, are waited for.

use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use cutover_migration::transport::tls::{CA_FILE, HOST_FILE, HOST_KEY_FILE};
use reqwest::{Certificate, Client, Identity};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use super::api::Answer;
use crate::error::in_full;
use crate::runtime::journal::location::{Cluster, Link};

/// How long one server has to answer before another is asked.
const ATTEMPT_MAX: Duration = Duration::from_secs(1);
/// How long to wait when all have failed.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// gRPC's code for a server that cannot answer now, but may soon (gRPC "Status codes"): UNAVAILABLE.
const UNAVAILABLE: u64 = 14;
/// The same: DEADLINE_EXCEEDED.
const DEADLINE_EXCEEDED: u64 = 4;
/// The same: NOT_FOUND.
const NOT_FOUND: u64 = 5;
/// Most bytes of an answer: all records there can be, in base64.
const ANSWER_BYTES_MAX: usize = 1 << 30;

/// Why something could not be done.
#[derive(Debug)]
pub struct Failed(pub String);

impl Failed {
    /// An answer that cannot be.
    pub fn unexpected(error: impl std::fmt::Display) -> Self {
        Self(format!("etcd's answer makes no sense: {error}"))
    }
}

/// Why a server did not do it.
enum Refused {
    /// Another may, or this one later.
    Now(String),
    /// Nobody will.
    Ever { code: u64, reason: String },
}

/// See the module.
#[derive(Debug)]
pub struct Gateway {
    client: Client,
    runtime: Runtime,
    servers: Vec<String>,
    /// Which of them answered last.
    preferred: usize,
    patience: Duration,
}

impl Gateway {
    /// The servers of `cluster`, each request to which may take as long as `patience` in all.
    pub fn new(cluster: &Cluster, patience: Duration) -> Result<Self, Failed> {
        let scheme = match cluster.link {
            Link::Plain => "http",
            Link::Tls(_) => "https",
        };
        let servers = cluster.servers.iter().map(|at| format!("{scheme}://{at}/v3"));
        let runtime = Builder::new_current_thread().enable_all().build();
        Ok(Self {
            client: client(&cluster.link)?,
            runtime: runtime.map_err(|error| Failed(error.to_string()))?,
            servers: servers.collect(),
            preferred: 0,
            patience,
        })
    }

    /// Makes a transaction.
    pub fn txn(&mut self, body: &Value) -> Result<Answer, Failed> {
        Answer::read(self.call("kv/txn", body)?)
    }

    /// A new lease: its number, and how long etcd has it run, in whole seconds.
    pub fn grant(&mut self, duration: Duration) -> Result<(String, Duration), Failed> {
        let seconds = duration.as_secs().max(1);
        let answer = self.call("lease/grant", &json!({"TTL": seconds.to_string()}))?;
        match (&answer["ID"], time_left(&answer)) {
            (Value::String(id), Some(left)) => Ok((id.clone(), left)),
            _ => Err(Failed::unexpected(answer)),
        }
    }

    /// Has a lease run from now on anew; says whether it still did.
    pub fn keep_alive(&mut self, lease: &str) -> Result<bool, Failed> {
        let answer = self.call("lease/keepalive", &json!({"ID": lease}))?;
        Ok(time_left(&answer["result"]).is_some())
    }

    /// Ends a lease.
    pub fn revoke(&mut self, lease: &str) -> Result<(), Failed> {
        match self.ask("lease/revoke", &json!({"ID": lease})) {
            Ok(_) | Err(Refused::Ever { code: NOT_FOUND, .. }) => Ok(()),
            Err(Refused::Now(reason) | Refused::Ever { reason, .. }) => Err(Failed(reason)),
        }
    }

    fn call(&mut self, path: &str, body: &Value) -> Result<Value, Failed> {
        self.ask(path, body).map_err(|refused| match refused {
            Refused::Now(reason) | Refused::Ever { reason, .. } => Failed(reason),
        })
    }

    fn ask(&mut self, path: &str, body: &Value) -> Result<Value, Refused> {
        let until = Instant::now() + self.patience;
        let body = body.to_string();
        loop {
            for _ in 0..self.servers.len() {
                let url = format!("{}/{path}", self.servers[self.preferred]);
                match self.runtime.block_on(post(&self.client, &url, &body)) {
                    Err(Refused::Now(reason)) if Instant::now() >= until => return Err(Refused::Now(reason)),
                    Err(Refused::Now(_)) => self.preferred = (self.preferred + 1) % self.servers.len(),
                    answered => return answered,
                }
            }
            thread::sleep(RETRY_AFTER);
        }
    }
}

/// What is left of a lease, if it runs.
fn time_left(lease: &Value) -> Option<Duration> {
    let seconds = lease["TTL"].as_str()?.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

fn client(link: &Link) -> Result<Client, Failed> {
    // Whoever came first has installed a provider that is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = Client::builder().timeout(ATTEMPT_MAX).no_proxy();
    if let Link::Tls(directory) = link {
        let read = |file: &str| {
            let path = directory.join(file);
            fs::read(&path).map_err(|error: io::Error| Failed(format!("{}: {error}", path.display())))
        };
        let unusable = |error: reqwest::Error| Failed(format!("{}: {}", directory.display(), in_full(&error)));
        let mut identity = read(HOST_FILE)?;
        identity.extend(read(HOST_KEY_FILE)?);
        let authority = Certificate::from_pem(&read(CA_FILE)?).map_err(unusable)?;
        builder = builder
            .tls_certs_only([authority])
            .identity(Identity::from_pem(&identity).map_err(unusable)?);
    }
    builder.build().map_err(|error| Failed(in_full(&error)))
}

async fn post(client: &Client, url: &str, body: &str) -> Result<Value, Refused> {
    let now = |error: reqwest::Error| Refused::Now(in_full(&error));
    let mut response = client.post(url).body(body.to_owned()).send().await.map_err(now)?;
    let status = response.status();
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(now)? {
        if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(Refused::Now(format!("{url}: its answer is too large")));
        }
        bytes.extend_from_slice(&chunk);
    }
    let answer: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Refused::Now(format!("{url}: {status}, and what it says is no JSON: {error}")))?;
    if status.is_success() && answer.get("error").is_none() {
        return Ok(answer);
    }
    let reason = answer["message"].as_str().or_else(|| answer["error"].as_str());
    let reason = format!("{url}: {}", reason.unwrap_or(status.as_str()));
    match answer["code"].as_u64() {
        Some(UNAVAILABLE | DEADLINE_EXCEEDED) => Err(Refused::Now(reason)),
        code => Err(Refused::Ever {
            code: code.unwrap_or_default(),
            reason,
        }),
    }
}
