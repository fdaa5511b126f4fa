//! HTTP/1.1 with one VM over its socket: a connection for each request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::error::ClientError;
use crate::server::v1::types::Fault;
use crate::text::escaped;

/// Where a VM says what it is.
pub const INFO: &str = "/v1/info";
/// Most bytes of an answer.
pub const ANSWER_MAX: usize = 4 << 20;
/// Time until a VM with which no connection came about is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// A VM's API, as seen from outside.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vm {
    /// What to call it in front of people.
    pub name: String,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Vm {
    /// What `path` has to say, within `limit`.
    ///
    /// # Errors
    /// The VM cannot be asked, does not answer in time, refuses, or its answer is no `T`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str, limit: Duration) -> Result<T, ClientError> {
        let text = self.get_text(path, limit).await?;
        serde_json::from_str(&text).map_err(|error| ClientError::Answer(error.to_string()))
    }

    /// As [`get`](Self::get), unread.
    ///
    /// # Errors
    /// The VM cannot be asked, does not answer in time, or refuses.
    pub async fn get_text(&self, path: &str, limit: Duration) -> Result<String, ClientError> {
        let ask = self.exchange(Method::GET, path, Bytes::new());
        timeout(limit, ask).await.unwrap_or(Err(ClientError::Timeout(limit)))
    }

    /// Has the VM do what `body` says, within `limit`.
    ///
    /// # Errors
    /// The VM cannot be asked, does not answer in time, or refuses.
    pub async fn tell(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(), ClientError> {
        let answer = timeout(limit, self.exchange(method, path, written(body)?)).await;
        answer.unwrap_or(Err(ClientError::Timeout(limit))).map(drop)
    }

    /// Has the VM do what `body` says, however long it takes; returns what it has to say when that is done.
    ///
    /// # Errors
    /// The VM cannot be asked, refuses, fails, or its answer is no `T`.
    pub async fn have<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let text = self.exchange(Method::POST, path, written(body)?).await?;
        serde_json::from_str(&text).map_err(|error| ClientError::Answer(error.to_string()))
    }

    /// Has the VM do away with what is at `path`, within `limit`.
    ///
    /// # Errors
    /// The VM cannot be asked, does not answer in time, or refuses.
    pub async fn delete(&self, path: &str, limit: Duration) -> Result<(), ClientError> {
        let answer = timeout(limit, self.exchange(Method::DELETE, path, Bytes::new())).await;
        answer.unwrap_or(Err(ClientError::Timeout(limit))).map(drop)
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<String, ClientError> {
        text_of(self.send(method, path, &[], body).await?).await
    }

    /// Begins to read what `path` says for as long as the VM says something; the headers come within `limit`.
    ///
    /// # Errors
    /// The VM cannot be asked, does not answer in time, or refuses.
    pub async fn open(&self, path: &str, headers: &[(&str, String)], limit: Duration) -> Result<Incoming, ClientError> {
        let ask = async {
            let response = self.send(Method::GET, path, headers, Bytes::new()).await?;
            if response.status().is_success() {
                return Ok(response.into_body());
            }
            Err(match text_of(response).await {
                Ok(text) => ClientError::Answer(text),
                Err(error) => error,
            })
        };
        timeout(limit, ask).await.unwrap_or(Err(ClientError::Timeout(limit)))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, String)],
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = connect(&self.socket).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // How the connection fares shows in the answer.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json");
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| ClientError::Answer(error.to_string()))?;
        Ok(sender.send_request(request).await?)
    }
}

fn written(body: &impl Serialize) -> Result<Bytes, ClientError> {
    let body = serde_json::to_vec(body).map_err(|error| ClientError::Answer(error.to_string()))?;
    Ok(body.into())
}

/// Connects, waiting while that cannot be told to succeed or fail.
async fn connect(socket: &Path) -> Result<UnixStream, ClientError> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            // It has as many clients waiting as it takes, or has just stopped listening.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionReset) => {
                tokio::time::sleep(RETRY).await;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Err(ClientError::NotThere(socket.to_owned()));
            }
            Err(source) => {
                return Err(ClientError::Connect {
                    socket: socket.to_owned(),
                    source,
                });
            }
        }
    }
}

/// The text of a successful answer, the reason of any other.
async fn text_of(response: Response<Incoming>) -> Result<String, ClientError> {
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
    let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
        Ok(error) => ClientError::Connection(*error),
        Err(error) if error.is::<LengthLimitError>() => ClientError::TooLong(ANSWER_MAX),
        Err(error) => ClientError::Answer(error.to_string()),
    })?;
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    if status.is_success() {
        Ok(text)
    } else {
        Err(refusal(status, &text))
    }
}

fn refusal(status: StatusCode, text: &str) -> ClientError {
    let message = match serde_json::from_str::<Fault>(text) {
        Ok(fault) => escaped(&fault.fault_message).into_owned(),
        Err(_) => format!("refused with HTTP status {status}"),
    };
    ClientError::Refused { status, message }
}
