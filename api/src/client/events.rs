//! What happens to a VM, without a gap: a stream of events that survives the loss of its connection.
//!
//! ```text
//!  open ── since N ──► events N+1, N+2 … ──✂── open again, since the last one seen ──► … ──► the VM is gone
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::Value;

use super::error::ClientError;
use super::http::Vm;
use super::sse::{EVENT_MAX, Parser};
use crate::server::v1::types::{EventKindV1, EventV1, StateV1};

/// Where events are.
const PATH: &str = "/v1/events";
/// Says after which event to begin.
const LAST_EVENT_ID: &str = "Last-Event-ID";
/// Most connections in a row over which nothing comes.
const FRUITLESS_MAX: u32 = 10;
/// Time before a connection is made again after one over which nothing came.
const RETRY: Duration = Duration::from_millis(100);

/// An event, as far as this client understands it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Its number.
    pub sequence: u64,
    /// When it happened, in nanoseconds since 1970-01-01 00:00 UTC.
    pub unix_time_ns: u64,
    /// What happened, as far as this client knows it.
    pub kind: EventKindV1,
    /// All of it, as it came.
    pub json: Value,
}

impl Seen {
    /// The state the VM has from then on.
    pub fn state(&self) -> Option<StateV1> {
        match &self.kind {
            EventKindV1::VmState { state } => Some(*state),
            _ => None,
        }
    }

    fn is_gap(&self) -> bool {
        self.kind == EventKindV1::Gap
    }
}

/// Follows the events of a VM.
pub struct Follower {
    vm: Vm,
    /// How long to wait for a connection.
    limit: Duration,
    connection: Option<(Incoming, Parser)>,
    /// The last event seen.
    last: u64,
    /// Came, and not handed out yet.
    waiting: VecDeque<Seen>,
    /// Connections since something came.
    fruitless: u32,
    /// The VM has, which its process may survive by a moment.
    has_ended: bool,
}

impl Follower {
    /// Follows `vm` from the event after number `since` on.
    ///
    /// # Errors
    /// The VM cannot be asked, does not answer within `limit`, or refuses.
    pub async fn open(vm: Vm, since: u64, limit: Duration) -> Result<Self, ClientError> {
        let mut follower = Self {
            vm,
            limit,
            connection: None,
            last: since,
            waiting: VecDeque::new(),
            fruitless: 0,
            has_ended: false,
        };
        follower.connect().await?;
        Ok(follower)
    }

    /// The next event, however long it takes; none when the VM is gone.
    ///
    /// # Errors
    /// The VM is there, but of no use.
    pub async fn next(&mut self) -> Result<Option<Seen>, ClientError> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Ok(Some(event));
            }
            let Some((body, parser)) = &mut self.connection else {
                match self.reconnect().await {
                    Err(ClientError::NotThere(_)) => return Ok(None),
                    result => result?,
                }
                continue;
            };
            let Some(Ok(frame)) = body.frame().await else {
                // Whether it broke or was ended in order, the way on is the same.
                self.connection = None;
                continue;
            };
            let bytes = frame.into_data().unwrap_or_default();
            let messages = parser.feed(&bytes);
            let messages = messages.map_err(|_| ClientError::TooLong(EVENT_MAX))?;
            for message in messages {
                self.take(seen(&message.data)?);
            }
        }
    }

    async fn connect(&mut self) -> Result<(), ClientError> {
        let since = (LAST_EVENT_ID, self.last.to_string());
        let body = self.vm.open(PATH, &[since], self.limit).await?;
        self.connection = Some((body, Parser::default()));
        Ok(())
    }

    async fn reconnect(&mut self) -> Result<(), ClientError> {
        if self.fruitless == FRUITLESS_MAX {
            return Err(if self.has_ended {
                ClientError::NotThere(self.vm.socket.clone())
            } else {
                ClientError::Unstable(self.fruitless)
            });
        }
        if self.fruitless > 0 {
            tokio::time::sleep(RETRY).await;
        }
        self.fruitless += 1;
        match self.connect().await {
            // Tried again.
            Err(ClientError::Connection(_)) => Ok(()),
            result => result,
        }
    }

    fn take(&mut self, event: Seen) {
        // What a server repeats after a reconnection is known already; a gap may lead back to the first event of
        // another process that has the VM's name now.
        if event.sequence > self.last || event.is_gap() {
            self.last = event.sequence;
            self.has_ended |= event.state() == Some(StateV1::Ended);
            self.fruitless = 0;
            self.waiting.push_back(event);
        }
    }
}

fn seen(data: &str) -> Result<Seen, ClientError> {
    let answer = |error: serde_json::Error| ClientError::Answer(error.to_string());
    let json: Value = serde_json::from_str(data).map_err(answer)?;
    let event = EventV1::deserialize(&json).map_err(answer)?;
    Ok(Seen {
        sequence: event.sequence,
        unix_time_ns: event.unix_time_ns,
        kind: event.kind,
        json,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_a_later_version_is_passed_on_as_it_came() {
        let event =
            seen(r#"{"sequence":7,"unix_time_ns":5,"kind":"moved","to":"elsewhere"}"#).expect("it has a number");
        assert_eq!(
            (event.sequence, event.unix_time_ns, &event.kind),
            (7, 5, &EventKindV1::Unknown)
        );
        assert_eq!(event.json["to"], "elsewhere");
        let known =
            seen(r#"{"sequence":8,"unix_time_ns":5,"kind":"vm_state","state":"paused","why":"?"}"#).expect("valid");
        assert_eq!(known.state(), Some(StateV1::Paused));
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for data in ["", "7", "{}", r#"{"sequence":1,"kind":"gap"}"#] {
            assert!(matches!(seen(data), Err(ClientError::Answer(_))), "{data}");
        }
    }
}
