//! Why a VM did not do as asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper::StatusCode;

use crate::server::v1::types::StateV1;

/// Why a VM did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no VM listens on {}: `cutover vm list` shows those that do", .0.display())]
    NotThere(PathBuf),
    /// The socket cannot be used.
    #[error("cannot connect to {}", .socket.display())]
    Connect {
        /// The VM's socket.
        socket: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The connection broke, or what came is no HTTP.
    #[error("the connection failed")]
    Connection(#[from] hyper::Error),
    /// It refused.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// The reason it gave.
        message: String,
    },
    /// What came is not what a VM of this version says.
    #[error("an answer that makes no sense: {0}")]
    Answer(String),
    /// The answer is longer than any should be.
    #[error("an answer of more than {0} bytes")]
    TooLong(usize),
    /// The VM is gone without having done as asked.
    #[error("the VM has ended")]
    Ended,
    /// The VM came to another end than asked for.
    #[error("the VM is {0} instead")]
    Otherwise(StateV1),
    /// The connection broke again and again without anything coming over it.
    #[error("the connection broke {0} times in a row")]
    Unstable(u32),
    /// There is no console to attach to.
    #[error("{0}")]
    NoConsole(String),
    /// The terminal or the console's socket failed.
    #[error("the console failed")]
    Console(#[source] io::Error),
}
