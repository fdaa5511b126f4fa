//! What is said to etcd: transactions, in the JSON that its gateway takes.
//!
//! Keys and values are in base64, 64-bit numbers are text, and what is 0 or empty is left out (etcd v3 API,
//! `api_grpc_gateway`; protobuf, "ProtoJSON format").

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::gateway::Failed;

/// A revision of etcd's store; each change has the next.
pub type Revision = i64;

/// What of a key is compared.
#[derive(Clone, Copy, Debug)]
pub enum Compared {
    /// The revision at which it was made; 0 if there is none.
    Created,
    /// That at which it was last changed.
    Modified,
}

/// What came of a transaction.
#[derive(Debug)]
pub struct Answer {
    /// Whether all comparisons held.
    pub succeeded: bool,
    /// That of the store, which is the one of what was written.
    pub revision: Revision,
    responses: Vec<Value>,
}

/// A key, as it was found.
#[derive(Debug)]
pub struct KeyValue {
    /// Its name.
    pub key: String,
    /// When it was made.
    pub created: Revision,
    /// When it was last changed.
    pub modified: Revision,
    /// The lease that it depends on; 0 if on none.
    pub lease: String,
    value: Vec<u8>,
}

/// Whether something of `key` is `revision`.
pub fn compare(key: &str, what: Compared, revision: Revision) -> Value {
    let (target, field) = match what {
        Compared::Created => ("CREATE", "create_revision"),
        Compared::Modified => ("MOD", "mod_revision"),
    };
    json!({"key": encode(key), "target": target, "result": "EQUAL", field: revision.to_string()})
}

/// Has `key` be `value`, for as long as a lease runs, if one is given.
pub fn put(key: &str, value: &str, lease: Option<&str>) -> Value {
    json!({"request_put": {"key": encode(key), "value": encode(value), "lease": lease.unwrap_or("0")}})
}

/// Has there be no `key`.
pub fn delete(key: &str) -> Value {
    json!({"request_delete_range": {"key": encode(key)}})
}

/// Asks for `key`.
pub fn get(key: &str) -> Value {
    json!({"request_range": {"key": encode(key)}})
}

/// Asks for all keys that begin with `prefix`, which ends in '/'.
pub fn get_all(prefix: &str) -> Value {
    // The first key that does not begin so: with the character after '/'.
    let end = format!("{}0", prefix.trim_end_matches('/'));
    json!({"request_range": {"key": encode(prefix), "range_end": encode(&end)}})
}

/// A transaction: one or the other, by whether all comparisons hold.
pub fn txn(compares: &[Value], then: &[Value], otherwise: &[Value]) -> Value {
    json!({"compare": compares, "success": then, "failure": otherwise})
}

fn encode(text: &str) -> String {
    STANDARD.encode(text)
}

/// What 64-bit numbers are written as; what is 0 is left out.
#[derive(Debug, Default, Deserialize)]
#[serde(transparent)]
struct Number(Option<String>);

impl Number {
    fn get(&self) -> Result<i64, Failed> {
        let text = self.0.as_deref().unwrap_or("0");
        text.parse()
            .map_err(|error| Failed(format!("etcd says '{text}': {error}")))
    }
}

#[derive(Debug, Deserialize)]
struct Header {
    #[serde(default)]
    revision: Number,
}

#[derive(Debug, Deserialize)]
struct TxnResponse {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
struct RangeResponse {
    #[serde(default)]
    kvs: Vec<Kv>,
}

#[derive(Debug, Deserialize)]
struct Kv {
    key: String,
    #[serde(default)]
    create_revision: Number,
    #[serde(default)]
    mod_revision: Number,
    #[serde(default)]
    lease: Number,
    #[serde(default)]
    value: String,
}

impl Answer {
    /// What etcd's answer to a transaction says.
    pub fn read(answer: Value) -> Result<Self, Failed> {
        let read: TxnResponse = serde_json::from_value(answer).map_err(Failed::unexpected)?;
        Ok(Self {
            succeeded: read.succeeded,
            revision: read.header.revision.get()?,
            responses: read.responses,
        })
    }

    /// What its request number `index` found.
    pub fn kvs(&self, index: usize) -> Result<Vec<KeyValue>, Failed> {
        let response = self
            .responses
            .get(index)
            .and_then(|response| response.get("response_range"));
        let response = response.cloned().unwrap_or_default();
        let range: Option<RangeResponse> = serde_json::from_value(response).map_err(Failed::unexpected)?;
        range.unwrap_or_default().kvs.into_iter().map(KeyValue::read).collect()
    }
}

impl KeyValue {
    fn read(kv: Kv) -> Result<Self, Failed> {
        let decode = |text: &str| STANDARD.decode(text).map_err(Failed::unexpected);
        Ok(Self {
            key: String::from_utf8(decode(&kv.key)?).map_err(Failed::unexpected)?,
            created: kv.create_revision.get()?,
            modified: kv.mod_revision.get()?,
            lease: kv.lease.get()?.to_string(),
            value: decode(&kv.value)?,
        })
    }

    /// Its value.
    ///
    /// # Errors
    /// It is no text.
    pub fn text(&self) -> Result<String, Failed> {
        String::from_utf8(self.value.clone()).map_err(Failed::unexpected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_of_an_answer_is_nothing() {
        let answer = Answer::read(json!({"header": {"revision": "7"}, "responses": [{"response_range": {}}]})).unwrap();
        assert!(!answer.succeeded);
        assert_eq!(answer.revision, 7);
        assert!(answer.kvs(0).unwrap().is_empty());
        assert!(answer.kvs(1).unwrap().is_empty());
    }

    #[test]
    fn an_answer_that_is_none_is_an_error() {
        assert!(Answer::read(json!({"header": {"revision": "x"}})).is_err());
        assert!(Answer::read(json!("ok")).is_err());
        let kvs = json!({"header": {}, "responses": [{"response_range": {"kvs": [{"key": "?"}]}}]});
        assert!(Answer::read(kvs).unwrap().kvs(0).is_err());
    }
}
