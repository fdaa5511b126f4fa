//! What is answered to which request: the rules of MMDS, in both versions.
//!
//! Version 2 gives metadata only to who has a token, which takes a PUT that no proxy, and no page that a browser of the
//! guest shows, can be made to send by accident. Version 1 gives them to everybody.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cutover_snapshot::spec::{MmdsSpec, MmdsVersion};
use serde_json::Value;

use super::http::{Answer, Method, Received, Request};
use super::metadata::Metadata;
use super::tokens::{TTL_SECONDS, Tokens};
use crate::stats::MmdsCounters;

const OK: &str = "200 OK";
const BAD_REQUEST: &str = "400 Bad Request";
const UNAUTHORIZED: &str = "401 Unauthorized";
const NOT_FOUND: &str = "404 Not Found";
const METHOD_NOT_ALLOWED: &str = "405 Method Not Allowed";
const UNAVAILABLE: &str = "503 Service Unavailable";
const NOT_IMPLEMENTED: &str = "501 Not Implemented";
const JSON: &str = "application/json";
const TOKEN_PATH: &str = "/latest/api/token";

/// The service of one VM, at all its interfaces.
pub struct Service {
    version: MmdsVersion,
    imds_compat: bool,
    metadata: Arc<Metadata>,
    tokens: Mutex<Tokens>,
    counters: Arc<MmdsCounters>,
}

impl Service {
    /// The service that `spec` describes, of `metadata`. No tokens have been given out.
    pub fn new(spec: &MmdsSpec, metadata: Arc<Metadata>) -> Self {
        Self {
            version: spec.version,
            imds_compat: spec.imds_compat,
            metadata,
            tokens: Mutex::default(),
            counters: Arc::default(),
        }
    }

    /// What it has done.
    pub fn counters(&self) -> &Arc<MmdsCounters> {
        &self.counters
    }

    /// What is in the metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The answer to what was received, unless that is only a part; `now` is the time for tokens.
    pub fn answer(&self, received: Received, now: Instant) -> Option<Answer> {
        let request = match received {
            Received::Part => return None,
            Received::Nonsense => {
                return Some(Answer::text(
                    BAD_REQUEST,
                    "This is no HTTP request, or too long a one.\n",
                ));
            }
            Received::Request(request) => request,
        };
        self.counters.requests.add(1);
        Some(match request.method {
            Method::Get => self.refusal(&request, now).unwrap_or_else(|| self.look_up(&request)),
            Method::Put => self.new_token(&request, now),
            Method::Other => Answer {
                field: Some(("Allow", "GET, PUT".to_owned())),
                ..Answer::text(METHOD_NOT_ALLOWED, "Only GET and PUT are possible.\n")
            },
        })
    }

    /// Why `request` gets no metadata, if it does not.
    fn refusal(&self, request: &Request, now: Instant) -> Option<Answer> {
        let reason = match &request.token {
            None => {
                self.counters.no_token.add(1);
                "There is no token: PUT /latest/api/token gives one, for the header X-metadata-token.\n"
            }
            Some(token) if !self.tokens(|tokens| tokens.is_good(token, now)) => {
                self.counters.invalid_token.add(1);
                "The token is not good, or not any more.\n"
            }
            Some(_) => return None,
        };
        match self.version {
            MmdsVersion::V1 => None,
            MmdsVersion::V2 => Some(Answer::text(UNAUTHORIZED, reason)),
        }
    }

    fn look_up(&self, request: &Request) -> Answer {
        let pointer = pointer(&request.path);
        let as_json = !self.imds_compat && request.accept.as_deref().is_some_and(accepts_json);
        let answer = self.metadata.look_up(&pointer, |value| match as_json {
            true => Answer {
                content_type: JSON,
                ..Answer::text(OK, value.to_string())
            },
            false => listing(value),
        });
        answer.unwrap_or_else(|| Answer::text(NOT_FOUND, "There are no metadata at this path.\n"))
    }

    fn new_token(&self, request: &Request, now: Instant) -> Answer {
        if pointer(&request.path) != TOKEN_PATH {
            return Answer::text(
                NOT_FOUND,
                "Only a token can be asked for by PUT, at /latest/api/token.\n",
            );
        }
        if request.is_forwarded {
            return Answer::text(
                BAD_REQUEST,
                "Tokens are not given to proxies: X-Forwarded-For is not allowed.\n",
            );
        }
        let ttl = request
            .ttl
            .as_ref()
            .and_then(|(name, ttl)| Some((*name, ttl.parse().ok()?)));
        let Some((name, ttl)) = ttl.filter(|(_, ttl)| TTL_SECONDS.contains(ttl)) else {
            let (least, most) = (TTL_SECONDS.start(), TTL_SECONDS.end());
            let reason = format!("X-metadata-token-ttl-seconds has to be a number from {least} to {most}.\n");
            return Answer::text(BAD_REQUEST, reason);
        };
        match self.tokens(|tokens| tokens.issue(ttl, now)) {
            Some(token) => Answer {
                // EC2's own clients look for it.
                field: Some((name, ttl.to_string())),
                ..Answer::text(OK, token)
            },
            None => Answer::text(UNAVAILABLE, "There are no random numbers now.\n"),
        }
    }

    fn tokens<T>(&self, use_them: impl FnOnce(&mut Tokens) -> T) -> T {
        use_them(&mut self.tokens.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The JSON pointer that `path` is, with however many slashes between names and at the end.
fn pointer(path: &str) -> String {
    let names = path.split('/').filter(|name| !name.is_empty());
    names.flat_map(|name| ["/", name]).collect()
}

/// Whether an `Accept` field asks for JSON; who takes anything gets what EC2 has.
fn accepts_json(accept: &str) -> bool {
    let mut types = accept.split(',').filter_map(|range| range.split(';').next());
    types.any(|name| name.trim().eq_ignore_ascii_case(JSON))
}

/// `value` as EC2's service has it: text as it is, of an object its names, those of objects with a slash behind them.
fn listing(value: &Value) -> Answer {
    match value {
        Value::String(text) => Answer::text(OK, text.as_str()),
        Value::Object(members) => {
            let names = members.iter().map(|(name, member)| match member {
                Value::Object(_) => format!("{name}/"),
                _ => name.clone(),
            });
            Answer::text(OK, names.collect::<Vec<_>>().join("\n"))
        }
        _ => Answer::text(
            NOT_IMPLEMENTED,
            "This is neither text nor an object: ask for it with Accept: application/json.\n",
        ),
    }
}
